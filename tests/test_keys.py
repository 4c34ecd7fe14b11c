"""A request with an Idempotency-Key whose worker dies at any step: of all requests with that key one counts, once and wholly.

The HTTP front's own handlers, over real event queues and partitions; only the way to them has no sockets.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import Died, Host, Mortal, Steps, append, leave_for_dead, ledger_counts, settle

from catchall.engine.event_queue import EventQueue
from catchall.engine.partition import Partition
from catchall.engine.rules import partition_of
from catchall.engine.settings import Settings
from catchall.http.events import Events
from catchall.http.problems import Response

PARTITIONS = 2
STEPS = 21  # at least what one request takes, so that the last ones die nowhere
KEY = b"one key"
ONE, OTHER = ({f"{who}{n}.example": 2 for n in range(4)} for who in ("one", "other"))  # domains, and how often each


class Place:
    """A data folder whose partitions all belong to this process, and HTTP workers that come and go."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None) -> None:
        self.host, self.steps = Host(root, PARTITIONS), Steps(dies_at)
        self.mortal = Mortal(monkeypatch, self.steps)
        self.owned: list[Partition] = [self.host.own(p) for p in range(PARTITIONS)]
        self.queues: dict[int, EventQueue] = {}

    # ---- what a worker needs

    async def record(self, blobs: Mapping[int, bytes], places: list[bytes] | None = None) -> None:
        for p, lines in blobs.items():
            if p not in self.queues:
                self.queues[p] = self.host.queue(p, disk=self.steps.disk())
            append(self.queues[p], lines)

    async def digest_of(self, p: int, key: bytes) -> bytes:
        while not self.owned[p].catch_up():
            pass
        return self.owned[p].ids.digest_of(key) or b""

    async def repeats(self, places: Sequence[bytes]) -> None:
        return None

    async def pause_for_backlog(self) -> None:
        pass

    hot = False

    # ---- requests

    def send(self, events: Mapping[str, int], key: bytes = KEY) -> int:
        """One bulk request with a key; returns the status of its answer."""
        body = b"".join(b'{"domain":"%b","type":"delivered"}\n' % name.encode() * n for name, n in events.items())
        runtime = SimpleNamespace(manifest=SimpleNamespace(partitions=PARTITIONS))
        worker: Any = SimpleNamespace(
            runtime=runtime, settings=Settings(), queues=self, shards=[self], slot=SimpleNamespace(cells=Counter()),
            pause_for_backlog=self.pause_for_backlog,
        )  # fmt: skip
        headers = [(b"content-type", b"application/x-ndjson"), (b"idempotency-key", key)]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        response: Response = asyncio.run(Events(worker, {}).bulk({"headers": headers}, receive))
        return int(response.start["status"])

    def bury(self) -> None:
        """The worker is dead; the next one makes queues of its own."""
        self.mortal.bury()
        self.queues.clear()
        self.steps.in_peace()

    def kill_owners(self) -> None:
        for partition in self.owned:
            leave_for_dead(partition)
        self.owned = [self.host.own(p) for p in range(PARTITIONS)]

    def counted(self) -> dict[str, int]:
        counts = {}
        for partition in self.owned:
            settle(partition)
            counts |= {name: delivered for name, (delivered, _) in ledger_counts(partition).items()}
            partition.close()
        return counts


@pytest.mark.parametrize("dies_at", range(1, STEPS + 1))
def test_of_two_requests_with_one_key_one_counts_wherever_the_worker_of_the_first_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    assert {partition_of(name.encode(), PARTITIONS) for name in ONE} == {0, 1}
    place = Place(tmp_path, monkeypatch, dies_at)
    with suppress(Died):
        assert place.send(ONE) == 200
    assert place.steps.taken < STEPS
    place.bury()
    answers = [place.send(events) for events in (OTHER, ONE, OTHER)]
    place.bury()
    assert answers in ([422, 200, 422], [200, 422, 200])
    assert place.counted() == (ONE if answers[1] == 200 else OTHER)


def test_a_key_that_was_used_stands_for_the_same_request_after_the_death_of_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker's request with the same key was refused, and nothing was flushed yet."""
    place = Place(tmp_path, monkeypatch)
    keys = [b"key %d" % number for number in range(20)]

    def send(events: Mapping[str, int]) -> set[int]:
        """With each key, by a worker of its own: so that the owners may read it in any order."""
        answers = set()
        for key in keys:
            answers.add(place.send(events, key))
            place.bury()
        return answers

    assert (send(ONE), send(OTHER)) == ({200}, {422})
    place.kill_owners()
    assert (send(OTHER), send(ONE)) == ({422}, {200})
    assert place.counted() == {name: 2 * len(keys) for name in ONE}
