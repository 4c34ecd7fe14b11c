"""Load for drills: threads that send events and keep a record of what each request was told; then the counts are compared.

    with Load(service) as load:           # writes until the block ends
        service.kill("shard", 0)
    load.compare(service.client())

A request is acknowledged (200), refused (an answer that says nothing was recorded, or no connection), or ambiguous: no answer,
or one that says its events may count. Nothing is sent twice. Counts must lie between acknowledged and acknowledged + ambiguous.
Meanwhile the threads read too: what was acknowledged before a read was sent must be in its answer.
"""

from __future__ import annotations

import random
import threading
from collections import Counter

from service import KINDS, Client, NotSent, Service, eventually

Key = tuple[str, str]  # domain, kind

THREADS = 3
NAMES = 60
BULK_EVENTS_MAX = 40
READ_SHARE = 0.2
PAUSE_S = 0.002  # between requests: what is drilled needs the processors too
PAUSE_FAILED_S = 0.02


class Load:
    """reads: False where they would wait, and so hold up the writes of their thread."""

    def __init__(self, service: Service, *, reads: bool = True) -> None:
        self._service, self._reads = service, reads
        self.names = [f"load-{number}.example" for number in range(NAMES)]
        self.acknowledged: Counter[Key] = Counter()
        self.ambiguous: Counter[Key] = Counter()
        self.requests: Counter[str] = Counter()  # by outcome
        self._strange: list[str] = []  # answers that must not be
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(random.Random(n),)) for n in range(THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._strange, self._strange[:5]

    def more(self, requests: int = 300) -> None:
        """Wait until that many more requests were acknowledged."""
        target = self.requests["acknowledged"] + requests
        eventually(f"{requests} more requests are acknowledged", lambda: self.requests["acknowledged"] >= target)

    def _run(self, chance: random.Random) -> None:
        client = self._service.client(timeout_s=20.0)
        while not self._stop.is_set():
            size = 1 if chance.random() < 0.8 else chance.randint(2, BULK_EVENTS_MAX)
            events = [(chance.choice(self.names), KINDS[chance.random() < 0.1]) for _ in range(size)]
            outcome = self._send(client, events)
            with self._lock:
                self.requests[outcome] += 1
                if outcome == "acknowledged":
                    self.acknowledged.update(events)
                elif outcome == "ambiguous":
                    self.ambiguous.update(events)
            if self._reads and chance.random() < READ_SHARE:
                self._read(client, chance.choice(self.names))
            self._stop.wait(PAUSE_S if outcome == "acknowledged" else PAUSE_FAILED_S)

    def _send(self, client: Client, events: list[Key]) -> str:
        try:
            if len(events) == 1:
                ((domain, kind),) = events
                answer = client.request("PUT", f"/events/{domain}/{kind}")
            else:
                answer = client.bulk(*({"domain": domain, "type": kind} for domain, kind in events))
        except NotSent:
            return "refused"
        except OSError:
            return "ambiguous"
        if answer.status == 200:
            return "acknowledged"
        if answer.status == 503:
            return "refused" if b"Nothing was recorded." in answer.body else "ambiguous"
        self._strange.append(f"{answer.status} {answer.body!r}")
        return "ambiguous"

    def _read(self, client: Client, name: str) -> None:
        with self._lock:
            least = tuple(self.acknowledged[name, kind] for kind in KINDS)
        try:
            answer = client.request("GET", f"/domains/{name}")
        except (NotSent, OSError):
            return
        if answer.status == 200:
            found = answer.json
            if found["delivered"] < least[0] or found["bounced"] < least[1]:
                self._strange.append(f"{least} were acknowledged before {found} was asked for")
        elif answer.status != 503:
            self._strange.append(f"{answer.status} {answer.body!r}")

    def compare(self, client: Client) -> None:
        """Assert that every domain's counts are what the answers promised."""
        for name in self.names:
            self.check(name, client.counts(name))

    def check(self, name: str, counts: tuple[int, int]) -> None:
        for kind, counted in zip(KINDS, counts, strict=True):
            least, unsure = self.acknowledged[name, kind], self.ambiguous[name, kind]
            assert least <= counted <= least + unsure, f"{name} {kind}: {least} + {unsure} unsure, {counted} counted"
