"""What other hosts counted, for reads under storage `mongodb`: asked of MongoDB in batches, kept for the cache's time to live.

A domain with a bounce is not-catch-all for good, but its counts still grow, so it is asked for like any other. While MongoDB
is away, what was last known is served at once, and one question a second, for which no read waits, finds out if it is back:
this host's own counts do not depend on it. A read waits at most ANSWER_S, and only for a server that was there until then.

One question is asked at a time. Names that are wanted meanwhile go into the next one together, so a slow server makes questions
larger and never a longer queue of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from catchall.engine.logs import BadState
from catchall.storage.counts import pack
from catchall.storage.mongodb import BadMongoURI, MongoCopy, MongoError, MongoOptions

log = logging.getLogger("catchall.others")

RETRY_S = 1.0  # while MongoDB is away, one question is asked so often
ANSWER_S = 2.0  # a read waits no longer than this for a server that is there, half of it for one that is not


class Others:
    """{name: packed counts of all other components}, bounded in two generations.

    ttl_s      how long an answer is good; 0: ask for every read
    answered   called from a thread when a question was answered or failed
    """

    def __init__(self, options: MongoOptions, *, ttl_s: float, names_max: int, answered: Callable[[], None]) -> None:
        self._options = replace(
            options,
            server_selection_timeout=min(options.server_selection_timeout, ANSWER_S / 2),
            socket_timeout=min(options.socket_timeout, ANSWER_S),
        )
        self._copy: MongoCopy | None = None  # made by the first question
        self._probed = self._failed = 0.0
        self._ttl_s, self._half, self._answered = ttl_s, max(1, names_max // 2), answered
        self._young: dict[str, tuple[float, int]] = {}  # name -> (good until, packed)
        self._old: dict[str, tuple[float, int]] = {}
        self._asking = ThreadPoolExecutor(1, "ask-mongodb")
        self._lock = threading.Lock()
        self._wanted: list[tuple[Mapping[str, str], dict[str, int]]] = []  # names and where their counts go
        self._busy = False
        self._away = BadState(log)

    def get(self, name: str, own: str) -> int | None:
        """The packed counts, if they are known and still good, or MongoDB is away; None: ask. `own` is the own component."""
        entry = self._young.get(name) or self._old.get(name)
        now = time.monotonic()
        if entry is not None and entry[0] >= now:
            return entry[1]
        if not self._away.lasts:
            return None
        if now >= self._probed + RETRY_S:
            self._probed = now
            self.ask({name: own})
        return 0 if entry is None else entry[1]

    def ask(self, names: Mapping[str, str]) -> dict[str, int]:
        """Start to ask for {name: own component}; the result is filled before `answered` is called."""
        result: dict[str, int] = {}
        with self._lock:
            self._wanted.append((dict(names), result))
            if not self._busy:
                self._busy = True
                self._asking.submit(self._ask_all)
        return result

    def _ask_all(self) -> None:
        while True:
            with self._lock:
                wanted, self._wanted = self._wanted, []
                if not wanted:
                    self._busy = False
                    return
            names: dict[str, str] = {}
            for some, _ in wanted:
                names.update(some)
            counts = self._ask(names)
            for some, result in wanted:
                result.update({name: counts[name] for name in some})
            self._answered()

    def _ask(self, names: dict[str, str]) -> dict[str, int]:
        now = time.monotonic()
        if self._away.lasts and now < self._failed + RETRY_S:  # it failed while this question waited its turn
            return self._last_known(names)
        try:
            if self._copy is None:
                self._copy = MongoCopy(self._options)
            found = self._copy.others(list(names), names.__getitem__)
        except Exception as error:  # also a document that is none of ours: whoever waits must get an answer
            if not isinstance(error, MongoError | BadMongoURI):
                log.exception("an answer of MongoDB cannot be read")
            self._failed = time.monotonic()
            self._away.enter(f"reads show this host's counts and the last known ones of others: {error}", now)
            return self._last_known(names)
        self._away.leave("reads show the counts of all hosts again", now)
        counts = {name: pack(*found.get(name, (0, 0))) for name in names}
        self._keep({name: (now + self._ttl_s, packed) for name, packed in counts.items()})
        return counts

    def _last_known(self, names: Iterable[str]) -> dict[str, int]:
        return {name: (self._young.get(name) or self._old.get(name) or (0, 0))[1] for name in names}

    def _keep(self, entries: dict[str, tuple[float, int]]) -> None:
        """Only ever in the one asking thread; the loop reads."""
        if len(self._young) + len(entries) > self._half:
            self._old, self._young = self._young, {}
        self._young.update(entries)

    def close(self) -> None:
        """Waits for the question under way: at most ANSWER_S, and half of it to find a server."""
        with self._lock:
            self._wanted.clear()
        self._asking.shutdown(cancel_futures=True)
        if self._copy is not None:
            self._copy.close()
