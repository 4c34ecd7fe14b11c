"""What one HTTP worker's queues promise together: all or nothing, refusal with a reason, and an orderly end."""

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from faults import BOOT, HOST, NOW, counting, counts_of, disk_of, failing

from catchall.engine import queue_set
from catchall.engine.data_folder import make_partitions, queue_folder
from catchall.engine.disk import DISK, Disk
from catchall.engine.event_queue import OpenSegment
from catchall.engine.ids import Ids
from catchall.engine.metrics_page import MetricsPage
from catchall.engine.pending import Pending
from catchall.engine.queue_reader import QueueReader
from catchall.engine.queue_set import APPENDED_BYTES, SEGMENTS_MADE, SYNC_FAILURES, QueueSet, Refused
from catchall.engine.settings import Data

PARTITIONS = 4
PATIENCE_S = 30.0
SEGMENT = 65_536
BLOBS = {0: b"+a.example\n", 2: b"-b.example 3\n+c.example\n"}
POLICIES = ["interval", "always", "never"]


@contextlib.asynccontextmanager
async def queues(
    root: Path, disk: Disk = DISK, write_timeout_s: float = PATIENCE_S, **data: Any
) -> AsyncIterator[QueueSet]:
    """A running set of queues; closed at the end."""
    make_partitions(root, PARTITIONS)
    root.joinpath("run").mkdir(exist_ok=True)
    create = not root.joinpath("run", "metrics.page").exists()
    page = MetricsPage(root / "run", shards=1, http_places=1, create=create)
    options: dict[str, Any] = {
        "segment_size": SEGMENT, "min_free_space": 0, "hold": 0.0, "fsync_interval": 0.001, "backlog_max": 1 << 30,
    }  # fmt: skip
    made = QueueSet(
        root,
        partitions=PARTITIONS,
        host_id=bytes.fromhex(HOST),
        boot_id=BOOT,
        data=Data(**options | data),
        slot=page.slot("http", 0),
        disk=disk,
        write_timeout_s=write_timeout_s,
        now_s=lambda: NOW,
    )
    made.start()
    try:
        yield made
    finally:
        await made.close()


class Readers:
    """The other ends of all queues."""

    def __init__(self, root: Path) -> None:
        make_partitions(root, PARTITIONS)
        self.pending = [Pending() for _ in range(PARTITIONS)]
        self.readers = [
            QueueReader(
                str(queue_folder(root, p)),
                partition=p,
                boot_id=BOOT,
                host_id=bytes.fromhex(HOST),
                positions={},
                disk=DISK,
                ids=Ids([], 0, window_s=3600.0),
            )
            for p in range(PARTITIONS)
        ]

    def counts(self) -> dict[str, tuple[int, int]]:
        counts: dict[str, tuple[int, int]] = {}
        for reader, pending in zip(self.readers, self.pending, strict=True):
            reader.discover()
            while reader.drain(pending, 1 << 20):
                pass
            counts |= counts_of(pending)
        return counts

    def retire(self) -> None:
        for reader in self.readers:
            reader.forget(reader.unlink(reader.cut()[1]))

    @property
    def all_finished(self) -> bool:
        self.counts()
        return all(found.finished for reader in self.readers for found in reader._segments.values())

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


@pytest.fixture
def readers(tmp_path):
    readers = Readers(tmp_path)
    yield readers
    readers.close()


async def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


def reason_of(answer: object) -> str:
    assert isinstance(answer, Refused), answer
    return answer.reason


def cell(made: QueueSet, index: int) -> int:
    return made._slot.cells[index]


def segments_held(root: Path) -> list[str]:
    """Those in a folder that this process has open."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if ".seg" in link and link.startswith(str(root))]


def expected(times: int, blobs: Mapping[int, bytes] = BLOBS) -> dict[str, tuple[int, int]]:
    assert blobs is BLOBS
    return {"a.example": (times, 0), "b.example": (0, 3 * times), "c.example": (times, 0)} if times else {}


# ---- all of them


@pytest.mark.parametrize("fsync", POLICIES)
def test_what_is_acknowledged_can_be_read_at_once_and_all_segments_end(tmp_path, readers, fsync):
    async def main() -> None:
        async with queues(tmp_path, fsync=fsync) as made:
            assert made.hot == (fsync != "always")
            for times in range(1, 21):
                await made.record(BLOBS)
                assert readers.counts() == expected(times)
            assert cell(made, APPENDED_BYTES) == 20 * sum(map(len, BLOBS.values()))

    asyncio.run(main())
    assert readers.counts() == expected(20)
    assert readers.all_finished


@pytest.mark.parametrize("fsync", POLICIES)
def test_many_requests_at_once_are_each_recorded_once(tmp_path, readers, fsync):
    padding = {1: b"+filler.example\n" * 100}

    async def main() -> None:
        async with queues(tmp_path, fsync=fsync) as made:
            await asyncio.gather(*(made.record(BLOBS | padding if i % 2 else BLOBS) for i in range(400)))
            assert cell(made, SEGMENTS_MADE) >= 7, "several segments were made meanwhile"

    asyncio.run(main())
    assert readers.counts() == expected(400) | {"filler.example": (20_000, 0)}
    assert readers.all_finished


@pytest.mark.parametrize("fsync", POLICIES)
def test_a_request_larger_than_a_segment_is_recorded(tmp_path, readers, fsync):
    async def main() -> None:
        async with queues(tmp_path, fsync=fsync) as made:
            await made.record({0: b"+a.example\n"})
            await asyncio.gather(*(made.record({0: b"+a.example\n" * 20_000, 1: b"+b.example\n"}) for _ in range(3)))

    asyncio.run(main())
    assert readers.counts() == {"a.example": (60_001, 0), "b.example": (3, 0)}
    assert readers.all_finished


@pytest.mark.parametrize("fsync", POLICIES)
@pytest.mark.parametrize("on", range(1, 13))
@pytest.mark.parametrize("call", ["open", "allocate", "fsync"])
def test_a_request_whose_make_fails_is_recorded_in_no_partition(tmp_path, readers, fsync, on, call):
    blobs = {p: b"+n%d.example\n" % p for p in range(PARTITIONS)}
    disk = disk_of(**{call: failing(getattr(DISK, call), on=on)})
    recorded = 0

    async def main() -> None:
        nonlocal recorded
        async with queues(tmp_path, disk, fsync=fsync) as made:
            for _ in range(3):
                with contextlib.suppress(Refused):
                    await made.record(blobs)
                    recorded += 1
                assert set(readers.counts().values()) == ({(recorded, 0)} if recorded else set())

    asyncio.run(main())
    assert recorded >= 2
    assert readers.all_finished


def test_an_unreadable_folder_is_a_refusal_and_no_crash(tmp_path, readers, monkeypatch):
    async def main() -> None:
        async with queues(tmp_path) as made:
            with monkeypatch.context() as patch:
                patch.setattr(queue_set.os, "statvfs", failing(os.statvfs, on=1, error=errno.EIO))
                with pytest.raises(Refused, match="Input/output"):
                    await made.record(BLOBS)
            await made.record(BLOBS)

    asyncio.run(main())
    assert readers.counts() == expected(1)


# ---- limits


def test_a_backlog_that_is_full_refuses_with_its_reason_and_recovers_when_it_is_read(tmp_path, readers):
    lines = {0: b"+a.example\n" * 2000}

    async def main() -> int:
        recorded = 0
        async with queues(tmp_path, backlog_max=4 * SEGMENT) as made:
            with pytest.raises(Refused, match="backlog_max") as refused:  # noqa: PT012
                while True:
                    await made.record(lines)
                    recorded += 1
            assert refused.value.reason == "backlog"
            assert refused.value.retry_after_s > 0
            assert readers.counts() == {"a.example": (2000 * recorded, 0)}
            assert made.allocated_bytes() <= 4 * SEGMENT
            readers.retire()
            await made.record(lines)
        return recorded + 1

    recorded = asyncio.run(main())
    assert recorded > 4
    assert readers.counts() == {"a.example": (2000 * recorded, 0)}


def test_a_request_is_held_while_the_backlog_is_being_read(tmp_path, readers):
    lines = {0: b"+a.example\n" * 5000}

    async def main() -> None:
        async with queues(tmp_path, backlog_max=3 * SEGMENT, hold=PATIENCE_S) as made:
            await made.record({1: b"+b.example\n"})
            await made.record(lines)
            await made.record(lines)  # in the segment that was made ahead
            held = asyncio.create_task(made.record(lines))
            await until(lambda: made._refusing.lasts)
            assert not held.done()
            await made.record({1: b"+b.example\n"})  # which has room goes on
            while not held.done():
                readers.counts()
                readers.retire()
                await asyncio.sleep(0)
            await held

    asyncio.run(main())
    assert readers.counts() == {"a.example": (15_000, 0), "b.example": (2, 0)}


def test_a_disk_below_its_least_free_space_refuses_with_its_reason(tmp_path, readers):
    async def main() -> None:
        async with queues(tmp_path, min_free_space=1 << 62) as made:
            with pytest.raises(Refused, match="min_free_space") as refused:
                await made.record(BLOBS)
            assert refused.value.reason == "no_space"

    asyncio.run(main())
    assert readers.counts() == {}


# ---- syncs


def test_interval_syncs_what_is_dirty_and_nothing_when_idle(tmp_path):
    fdatasync = counting(os.fdatasync)

    async def main() -> None:
        async with queues(tmp_path, disk_of(fdatasync=fdatasync)) as made:
            await made.record(BLOBS)
            await until(lambda: not any(queue.untidy for queue in made._queues))
            assert fdatasync.uses == 2

    asyncio.run(main())
    assert fdatasync.uses == 2, "nothing was left to sync"


def test_never_syncs_nothing(tmp_path):
    fdatasync, fsync = counting(os.fdatasync), counting(os.fsync)

    async def main() -> None:
        async with queues(tmp_path, disk_of(fdatasync=fdatasync, fsync=fsync), fsync="never") as made:
            await made.record(BLOBS)
            assert not any(queue.untidy for queue in made._queues)

    asyncio.run(main())
    assert fdatasync.uses == fsync.uses == 0


def test_a_failed_sync_under_interval_is_told_and_begins_a_new_segment_and_loses_nothing(tmp_path, readers, caplog):
    disk = disk_of(fdatasync=failing(os.fdatasync, on=1, error=errno.EIO))

    async def main() -> None:
        async with queues(tmp_path, disk) as made:
            await made.record({0: b"+a.example\n"})
            await until(lambda: made._queues[0]._current is None)
            assert cell(made, SYNC_FAILURES) == 1
            assert "Its segment is sealed and a new one is begun" in caplog.text
            await made.record({0: b"+a.example\n"})

    asyncio.run(main())
    assert readers.counts() == {"a.example": (2, 0)}
    assert readers.all_finished


class Gate:
    """An fdatasync that waits until it is let through."""

    def __init__(self) -> None:
        self.open, self.calls, self.fails = threading.Event(), 0, False

    def __call__(self, fd: int) -> None:
        self.calls += 1
        assert self.open.wait(PATIENCE_S)
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.fdatasync(fd)


def test_always_shows_nothing_before_its_sync_and_one_sync_serves_many(tmp_path, readers):
    gate = Gate()

    async def main() -> None:
        async with queues(tmp_path, disk_of(fdatasync=gate), fsync="always") as made:
            first = asyncio.create_task(made.record({0: b"+a.example\n"}))
            await until(lambda: gate.calls == 1)
            rest = [asyncio.create_task(made.record({0: b"+a.example\n"})) for _ in range(50)]
            await until(lambda: made._commit is not None and len(made._commit._waiting) == 50)
            assert readers.counts() == {}
            assert not first.done()
            gate.open.set()
            await asyncio.gather(first, *rest)
            assert gate.calls == 2, "one for the first, one for all others"

    asyncio.run(main())
    assert readers.counts() == {"a.example": (51, 0)}


def test_a_failed_group_commit_tells_those_it_held_and_no_one_else(tmp_path, readers):
    gate = Gate()
    gate.open.set()

    async def main() -> None:
        async with queues(tmp_path, disk_of(fdatasync=gate), fsync="always") as made:
            await made.record(BLOBS)
            gate.fails = True
            answers = await asyncio.gather(*(made.record(BLOBS) for _ in range(10)), return_exceptions=True)
            assert {type(answer) for answer in answers} == {Refused}
            assert {answer.reason for answer in answers} == {"sync"}  # type: ignore[union-attr]
            gate.fails = False
            await made.record(BLOBS)
            assert cell(made, APPENDED_BYTES) == 2 * sum(map(len, BLOBS.values()))

    asyncio.run(main())
    assert readers.counts() == expected(2)
    assert readers.all_finished


def test_a_sync_that_hangs_holds_a_request_for_its_time_out_and_later_ones_not_at_all(tmp_path, readers):
    gate = Gate()

    async def main() -> None:
        async with queues(tmp_path, disk_of(fdatasync=gate), fsync="always", write_timeout_s=0.05) as made:
            answers = asyncio.gather(*(made.record(BLOBS) for _ in range(3)), return_exceptions=True)
            await until(lambda: gate.calls == 1)
            behind = asyncio.create_task(made.record(BLOBS))  # not even staged
            assert {reason_of(answer) for answer in await answers} == {"sync"}
            with pytest.raises(Refused, match="has not come back") as refused:
                await behind
            assert refused.value.reason == "disk"
            with pytest.raises(Refused) as at_once:
                await made.record(BLOBS)
            assert at_once.value.reason == "disk"
            assert made._commit is not None
            assert not made._commit._waiting, "nothing piles up behind it"
            assert readers.counts() == {}
            gate.open.set()
            await until(lambda: made._commit is not None and made._commit._sync_since is None)
            await made.record(BLOBS)

    asyncio.run(main())
    assert readers.counts() == expected(4), "those that were told so did count"
    assert readers.all_finished


@pytest.mark.parametrize("fsync", POLICIES)
def test_a_segment_that_is_never_made_holds_a_request_for_its_time_out_only(tmp_path, readers, fsync):
    go = threading.Event()

    def hanging(*args: Any) -> None:
        assert go.wait(PATIENCE_S)
        os.posix_fallocate(*args)

    async def main() -> None:
        async with queues(tmp_path, disk_of(allocate=hanging), fsync=fsync, write_timeout_s=0.05) as made:
            answers = await asyncio.gather(*(made.record(BLOBS) for _ in range(5)), return_exceptions=True)
            assert {reason_of(answer) for answer in answers} == {"disk"}
            go.set()
            await until(lambda: not made._making)
            await made.record(BLOBS)

    asyncio.run(main())
    assert readers.counts() == expected(1)
    assert readers.all_finished


@pytest.mark.parametrize("where", ["sync_staged", "publish", "stage"])
def test_an_error_nobody_thought_of_leaves_no_request_of_a_group_without_an_answer(tmp_path, readers, monkeypatch, where):
    async def main() -> None:
        async with queues(tmp_path, fsync="always") as made:
            await made.record(BLOBS)
            with monkeypatch.context() as patch:
                patch.setattr(queue_set.EventQueue, where, lambda *_: 1 / 0)
                answers = await asyncio.gather(*(made.record(BLOBS) for _ in range(10)), return_exceptions=True)
            assert {type(answer) for answer in answers} == {Refused}
            assert "sync" in {reason_of(answer) for answer in answers}
            assert {reason_of(answer) for answer in answers} <= {"sync", "disk"}
            await made.record(BLOBS)

    asyncio.run(main())
    assert readers.counts() == expected(2)
    assert readers.all_finished


def test_an_error_nobody_thought_of_ends_no_syncing(tmp_path, monkeypatch):
    async def main() -> None:
        async with queues(tmp_path) as made:
            with monkeypatch.context() as patch:
                broken = counting(lambda _: 1 / 0)
                patch.setattr(queue_set.EventQueue, "sync", lambda queue: broken(queue))
                await made.record(BLOBS)
                await until(lambda: broken.uses > 1)
            await until(lambda: not any(queue.untidy for queue in made._queues))

    asyncio.run(main())


@pytest.mark.parametrize(("error", "reason"), [(errno.EIO, "disk"), (errno.ENOSPC, "no_space"), (errno.EDQUOT, "no_space")])
def test_a_segment_that_cannot_be_made_is_refused_with_what_the_disk_said(tmp_path, readers, error, reason):
    async def main() -> None:
        async with queues(tmp_path, disk_of(allocate=failing(os.posix_fallocate, on=1, error=error))) as made:
            with pytest.raises(Refused) as refused:
                await made.record({0: b"+a.example\n"})
            assert refused.value.reason == reason

    asyncio.run(main())
    assert readers.counts() == {}


@pytest.mark.parametrize("fsync", POLICIES)
def test_a_request_that_is_held_when_the_queues_close_is_refused(tmp_path, readers, fsync):
    async def main() -> None:
        async with queues(tmp_path, fsync=fsync, min_free_space=1 << 62, hold=PATIENCE_S) as made:
            held = [asyncio.create_task(made.record(BLOBS)) for _ in range(3)]
            await until(lambda: made._refusing.lasts)
            await made.close()
            assert {reason_of(answer) for answer in await asyncio.gather(*held, return_exceptions=True)} == {"stopping"}
            with pytest.raises(Refused):
                await made.record(BLOBS)

    asyncio.run(main())
    assert readers.counts() == {}


def test_files_that_were_set_aside_are_no_backlog(tmp_path):
    async def main() -> None:
        async with queues(tmp_path) as made:
            await made.record({0: b"+a.example\n"})
            held = made.allocated_bytes()
            (queue_folder(tmp_path, 1) / "0123456789abcdef.corrupt").write_bytes(bytes(1 << 20))
            assert made.allocated_bytes() == held >= SEGMENT
            (queue_folder(tmp_path, 1) / "0123456789abcdef.tmp").write_bytes(bytes(100))
            assert made.allocated_bytes() == held + 100

    asyncio.run(main())


@pytest.mark.parametrize("fsync", POLICIES)
def test_a_caller_that_goes_away_disturbs_no_one(tmp_path, readers, fsync):
    gate = Gate()

    async def main() -> None:
        async with queues(tmp_path, disk_of(fdatasync=gate), fsync=fsync) as made:
            leaving = [asyncio.create_task(made.record(BLOBS)) for _ in range(20)]
            await asyncio.sleep(0)
            for task in leaving:
                task.cancel()
            gate.open.set()
            await asyncio.gather(*(made.record({3: b"+d.example\n"}) for _ in range(20)))
            await asyncio.gather(*leaving, return_exceptions=True)

    asyncio.run(main())
    counts = Counter({name: sum(pair) for name, pair in readers.counts().items()})
    assert counts["d.example"] == 20
    assert counts["a.example"] == counts["c.example"] <= 20
    assert readers.all_finished


@pytest.mark.parametrize("fsync", POLICIES)
@pytest.mark.parametrize("turns", range(0, 12, 2))
def test_close_ends_every_segment_even_those_being_made(tmp_path, readers, fsync, turns):
    answers: list[Any] = []

    async def main() -> None:
        async with queues(tmp_path, fsync=fsync) as made:
            tasks = [asyncio.create_task(made.record(BLOBS | {1: b"+filler.example\n" * 2100})) for _ in range(5)]
            for _ in range(turns):
                await asyncio.sleep(0)
            closing = asyncio.create_task(made.close())
            answers.extend(await asyncio.gather(*tasks, return_exceptions=True))
            await closing

    asyncio.run(main())
    recorded = sum(answer is None for answer in answers)
    counts = readers.counts()
    assert counts.get("a.example", (0, 0))[0] == recorded
    readers.retire()
    assert readers.all_finished
    assert not list(tmp_path.glob("*/q/*.tmp"))
    assert not segments_held(tmp_path)


@pytest.mark.parametrize("fsync", POLICIES)
def test_a_request_that_comes_in_the_very_turn_in_which_a_smaller_segment_was_made_gets_its_own(tmp_path, readers, fsync):
    async def main() -> None:
        async with queues(tmp_path, fsync=fsync) as made:
            queue, late = made._queues[0], []
            install = queue.install

            def install_and_ask(segment: OpenSegment) -> None:
                install(segment)
                if not late:  # its first step runs before anything that waits for the task that is ending here
                    late.append(asyncio.create_task(made.record({0: b"+a.example\n" * 20_000})))

            queue.install = install_and_ask  # type: ignore[method-assign]
            await made.record({0: b"+b.example\n"})
            await asyncio.gather(*late)

    asyncio.run(main())
    assert readers.counts() == {"a.example": (20_000, 0), "b.example": (1, 0)}
    assert readers.all_finished
