"""Load for drills: threads that send events and note what each request was told (drill_record.py).

    with Load(service) as load:           # writes until the block ends
        service.kill("shard", 0)
        load.more()                       # that many more requests were acknowledged
        with load.paused(): ...           # nothing is under way
    assert not load.record.mismatches(load.record.counted(service.client()))

Without ids nothing is sent twice. With ids an ambiguous request is sent again, with the same id, until an answer makes it sure.
Meanwhile a thread reads: what was acknowledged before a read was sent must be in its answer.
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from catchall.tools.drill_client import KINDS, NDJSON, Answer, Client, NotSent
from catchall.tools.drill_record import ACKNOWLEDGED, AMBIGUOUS, REFUSED, Key, Record
from catchall.tools.drill_service import Service
from catchall.tools.polling import WITHIN_S, eventually

NAMES = [f"load-{number}.example" for number in range(60)]
BULK_SHARE, BULK_EVENTS_MAX = 0.2, 40
BOUNCED_SHARE = 0.1
FLOOD_EVENTS = 400
PAUSE_S = 0.004  # between requests: what is drilled needs the processors too
PAUSE_FAILED_S = 0.02
READ_PAUSE_S = 0.01
TIMEOUT_S = 45.0  # of a request: longer than anything that a drill stops stays stopped


class BrokenPromise(Exception):
    """Answers that must not be."""


class Load:
    """seed  chooses names and sizes     ids  every write carries an id     reads  False: nobody reads meanwhile"""

    def __init__(
        self,
        service: Service,
        *,
        names: Sequence[str] = NAMES,
        threads: int = 3,
        seed: int = 0,
        ids: bool = False,
        reads: bool = True,
    ) -> None:
        self.record = Record(names)
        self.flood = False  # large bulks without a pause
        self.ids = ids
        self._service = service
        self._workers: list[tuple[_Work, random.Random, str]] = [
            (self._write, random.Random(f"{seed} {n}"), f"{seed}-{n}") for n in range(threads)
        ]
        if reads:
            self._workers.append((self._read, random.Random(seed), ""))
        self._pool = ThreadPoolExecutor(len(self._workers))
        self._futures: list[Future[None]] = []
        self._turn = threading.Condition()
        self._open, self._busy = True, 0
        self._end = threading.Event()

    def __enter__(self) -> Load:
        self._futures = [self._pool.submit(self._run, work, chance, name) for work, chance, name in self._workers]
        try:
            self.more()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self.check()

    def _stop(self) -> None:
        self._end.set()
        with self._turn:
            self._turn.notify_all()
        self._pool.shutdown()

    def more(self, requests: int = 300, within_s: float = WITHIN_S) -> None:
        """Wait until that many more requests were acknowledged. Raises TimeoutError, BrokenPromise."""
        target = self.record.requests[ACKNOWLEDGED] + requests

        def acknowledged() -> bool:
            self.check()
            return self.record.requests[ACKNOWLEDGED] >= target

        eventually(f"{requests} more requests are acknowledged", acknowledged, within_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Every request under way has ended, and no new one begins. Raises TimeoutError, BrokenPromise."""
        with self._turn:
            self._open = False
            if not self._turn.wait_for(lambda: not self._busy, WITHIN_S):
                raise TimeoutError(f"{self._busy} requests under way did not end within {WITHIN_S:.0f} s")
        self.check()
        yield
        with self._turn:
            self._open = True
            self._turn.notify_all()

    def check(self) -> None:
        """Raises BrokenPromise if an answer was strange, and what a thread died of."""
        for future in self._futures:
            if future.done():
                future.result()
        if self.record.strange:
            raise BrokenPromise("; ".join(self.record.strange[:5]))

    # ---- threads

    def _run(self, work: _Work, chance: random.Random, name: str) -> None:
        client = self._service.client(TIMEOUT_S)
        number = 0
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._open or self._end.is_set())
                if self._end.is_set():
                    return
                self._busy += 1
            try:
                number += 1
                pause_s = work(client, chance, f"{name}-{number}")
            finally:
                with self._turn:
                    self._busy -= 1
                    self._turn.notify_all()
            self._end.wait(pause_s)

    def _write(self, client: Client, chance: random.Random, name: str) -> float:
        """One request, or as many as it takes to be sure of it; returns how long to rest."""
        size = 1 if chance.random() >= BULK_SHARE else chance.randint(2, BULK_EVENTS_MAX)
        if self.flood:
            size = FLOOD_EVENTS
        events = [(chance.choice(self.record.names), KINDS[chance.random() < BOUNCED_SHARE]) for _ in range(size)]
        request = self._request(events, name, one_key=chance.random() < 0.25)
        outcome = self._send(client, request)
        while outcome == AMBIGUOUS and self.ids and not self._end.is_set():
            self.record.requests["sent again"] += 1
            self._end.wait(PAUSE_FAILED_S)
            # A refusal says that this one was not recorded, and nothing about the one before: go on until one is acknowledged.
            outcome = ACKNOWLEDGED if self._send(client, request) == ACKNOWLEDGED else AMBIGUOUS
        self.record.note(outcome, events)
        if outcome != ACKNOWLEDGED:
            return PAUSE_FAILED_S
        return 0.0 if self.flood else PAUSE_S

    def _request(self, events: Sequence[Key], name: str, one_key: bool) -> _Request:
        key = {"idempotency-key": name} if self.ids else {}
        if len(events) == 1:
            ((domain, kind),) = events
            return "PUT", f"/events/{domain}/{kind}", None, key
        lines = [{"domain": domain, "type": kind} for domain, kind in events]
        if self.ids and not one_key:
            key = {}
            for number, line in enumerate(lines):
                line["id"] = f"{name}-{number}"
        return "POST", "/events", b"".join(json.dumps(line).encode() + b"\n" for line in lines), key | NDJSON

    def _send(self, client: Client, request: _Request) -> str:
        try:
            answer = client.request(*request)
        except NotSent as error:
            self.record.last_refusal = f"{client.host}:{client.port}: {error}"
            return REFUSED
        except OSError:
            return AMBIGUOUS
        if answer.status == 200:
            return ACKNOWLEDGED
        if answer.status != 503:
            self._strange(answer)
        self.record.last_refusal = f"{answer.status} {answer.body!r}"
        return REFUSED if b"Nothing was recorded." in answer.body else AMBIGUOUS

    def _read(self, client: Client, chance: random.Random, _: str) -> float:
        name = chance.choice(self.record.names)
        least = self.record.least(name)
        try:
            answer = client.request("GET", f"/domains/{name}")
        except (NotSent, OSError):
            return PAUSE_FAILED_S
        if answer.status == 200:
            found = answer.json
            if found["delivered"] < least[0] or found["bounced"] < least[1]:
                self.record.strange.append(f"{least} were acknowledged before {found} was asked for")
        elif answer.status != 503:
            self._strange(answer)
        return READ_PAUSE_S

    def _strange(self, answer: Answer) -> None:
        self.record.strange.append(f"{answer.status} {answer.body!r}")


_Request = tuple[str, str, bytes | None, dict[str, str]]  # method, path, body, headers
_Work = Callable[[Client, random.Random, str], float]
