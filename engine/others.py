"""What other hosts counted, for reads under storage `mongodb`: asked of MongoDB in batches, kept for the cache's time to live.

A domain with a bounce is not-catch-all for good, but its counts still grow, so it is asked for like any other. While MongoDB
is away, what was last known is served at once, and one question a second finds out whether it is back: this host's own counts
do not depend on it, and a read waits for it at most ANSWER_S.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from catchall.engine.logs import BadState
from catchall.storage.counts import pack
from catchall.storage.mongodb import MongoCopy, MongoError, MongoOptions

log = logging.getLogger("catchall.others")

RETRY_S = 1.0  # while MongoDB is away, one question is asked so often
ANSWER_S = 2.0  # a read waits no longer than this for a server that is there, half of it for one that is not


class Others:
    """{name: packed counts of all other components}, bounded in two generations.

    ttl_s      how long an answer is good; 0: ask for every read
    answered   called from a thread when a question was answered or failed
    """

    def __init__(self, options: MongoOptions, *, ttl_s: float, names_max: int, answered: Callable[[], None]) -> None:
        self._copy = MongoCopy(
            replace(
                options,
                server_selection_timeout=min(options.server_selection_timeout, ANSWER_S / 2),
                socket_timeout=min(options.socket_timeout, ANSWER_S),
            )
        )
        self._probed = self._failed = 0.0
        self._ttl_s, self._half, self._answered = ttl_s, max(1, names_max // 2), answered
        self._young: dict[str, tuple[float, int]] = {}  # name -> (good until, packed)
        self._old: dict[str, tuple[float, int]] = {}
        self._asking = ThreadPoolExecutor(1, "ask-mongodb")
        self._away = BadState(log)

    def get(self, name: str) -> int | None:
        """The packed counts, if they are known and still good, or MongoDB is away; None: ask."""
        entry = self._young.get(name) or self._old.get(name)
        now = time.monotonic()
        if entry is not None and entry[0] >= now:
            return entry[1]
        if self._away.lasts and now < self._probed + RETRY_S:
            return 0 if entry is None else entry[1]
        self._probed = now
        return None

    def ask(self, names: Mapping[str, str]) -> dict[str, int]:
        """Start to ask for {name: own component}; the result is filled before `answered` is called."""
        result: dict[str, int] = {}
        self._asking.submit(self._ask, dict(names), result)
        return result

    def _ask(self, names: dict[str, str], result: dict[str, int]) -> None:
        now = time.monotonic()
        if self._away.lasts and now < self._failed + RETRY_S:  # it failed while this question waited its turn
            result.update(self._last_known(names))
            self._answered()
            return
        try:
            found = self._copy.others(list(names), names.__getitem__)
        except Exception as error:  # also a document that is none of ours: whoever waits must get an answer
            if not isinstance(error, MongoError):
                log.exception("an answer of MongoDB cannot be read")
            self._failed = time.monotonic()
            self._away.enter(f"reads show this host's counts and the last known ones of others: {error}", now)
            result.update(self._last_known(names))
        else:
            self._away.leave("reads show the counts of all hosts again", now)
            fresh = {}
            for name in names:
                fresh[name] = (now + self._ttl_s, pack(*found.get(name, (0, 0))))
            self._keep(fresh, result)
        self._answered()

    def _last_known(self, names: Iterable[str]) -> dict[str, int]:
        return {name: (self._young.get(name) or self._old.get(name) or (0, 0))[1] for name in names}

    def _keep(self, entries: dict[str, tuple[float, int]], result: dict[str, int]) -> None:
        """Only ever in the one asking thread; the loop reads."""
        if len(self._young) + len(entries) > self._half:
            self._old, self._young = self._young, {}
        self._young.update(entries)
        result.update({name: packed for name, (_, packed) in entries.items()})

    def close(self) -> None:
        self._asking.shutdown(cancel_futures=True)
        self._copy.close()
