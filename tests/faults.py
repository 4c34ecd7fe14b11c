"""Faults on purpose, and the least of a host to try them on.

failing, dying, counting    one call that fails, dies or is counted; disk_of makes a Disk of them
Steps                       a death at the n-th of all steps: disk calls, stores into segments, statements of the ledger
leave_for_dead              what is left of an owner that was killed
Host                        one data folder, its writers and owners driven by hand

A death in this process is the exception Died, after which `bury` does what the kernel would: it closes the descriptors, which
gives up the locks, and nothing else. Run as a program, this file is a writer or an owner that can be killed for real.
"""

import dataclasses
import errno
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from catchall.engine import event_queue
from catchall.engine.data_folder import make_partitions, queue_folder
from catchall.engine.disk import DISK, Disk
from catchall.engine.event_queue import EventQueue, OpenSegment
from catchall.engine.flush import Flush
from catchall.engine.ids import Ids
from catchall.engine.partition import Partition, PartitionOptions, lock_partition
from catchall.engine.pending import Pending
from catchall.engine.queue_reader import QueueReader
from catchall.storage.ledger import Ledger
from catchall.storage.ledger_failures import LedgerFull
from catchall.storage.ledger_rows import Position

BOOT, OTHER_BOOT = bytes(range(16)), bytes(range(1, 17))
HOST = "a0" * 16
NOW = 1_790_000_000
DISK_CALLS = tuple(field.name for field in dataclasses.fields(Disk))

Call = Callable[..., Any]


class Died(BaseException):
    """The process is gone. No handler of the code under test may outlive it, so it is no Exception."""


def counting(call: Call) -> Call:
    """Count the uses of a call in its attribute `uses`."""

    def wrapped(*args: Any) -> Any:
        wrapped.uses += 1  # type: ignore[attr-defined]
        return call(*args)

    wrapped.uses = 0  # type: ignore[attr-defined]
    return wrapped


def failing(call: Call, *, on: int, error: int = errno.ENOSPC) -> Call:
    """Raise OSError at the `on`-th use, and at no other."""
    uses = itertools.count(1)

    def wrapped(*args: Any) -> Any:
        if next(uses) == on:
            raise OSError(error, os.strerror(error))
        return call(*args)

    return wrapped


def dying(call: Call, *, on: int, really: bool = False) -> Call:
    """Die before the `on`-th use takes effect: by Died, or, in a child, really."""
    uses = itertools.count(1)

    def wrapped(*args: Any) -> Any:
        if next(uses) == on:
            if really:
                os._exit(9)
            raise Died(call)
        return call(*args)

    return wrapped


def disk_of(**calls: Call) -> Disk:
    """A Disk with some of its calls replaced: disk_of(fsync=failing(os.fsync, on=2))."""
    return dataclasses.replace(DISK, **calls)


class Steps:
    """Counts the steps of a process and lets it die before the `dies_at`-th; None: never.

    full    whether the disk is: no room for a segment or a flush        broken  whether syncs of segments fail
    """

    def __init__(self, dies_at: int | None = None, really: bool = False) -> None:
        self.taken, self.dies_at, self._really = 0, dies_at, really
        self.full = self.broken = False
        self._meanwhile: tuple[int, Callable[[], None]] | None = None

    def step(self) -> None:
        self.taken += 1
        if self.taken == self.dies_at:
            if self._really:
                os._exit(9)
            raise Died(self.taken)
        if self._meanwhile is not None and self.taken >= self._meanwhile[0]:
            action, self._meanwhile = self._meanwhile[1], None
            action()

    def meanwhile(self, after: int, action: Callable[[], None]) -> None:
        """Let another process do something before the step that comes `after` steps from now."""
        self._meanwhile = self.taken + after, action

    def in_peace(self) -> None:
        """Nothing is to happen any more that has not happened yet."""
        self.dies_at = self._meanwhile = None

    def wrap(self, call: Call, name: str = "") -> Call:
        def wrapped(*args: Any) -> Any:
            self.step()
            if self.full and name == "allocate":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.broken and name == "fdatasync":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args)

        return wrapped

    def disk(self, **calls: Call) -> Disk:
        """A Disk whose calls are steps; some of them may be replaced before."""
        return Disk(**{name: self.wrap(calls.get(name, getattr(DISK, name)), name) for name in DISK_CALLS})

    def statements_of(self, ledger: Ledger) -> None:
        """Every statement that a flush runs becomes a step before it and one after it."""
        run = ledger._run

        def stepped(*args: Any) -> None:
            self.step()
            if self.full and args[0] == "commit":
                raise LedgerFull("the disk is full")
            run(*args)
            self.step()

        ledger._run = stepped  # type: ignore[method-assign]


class _Map(mmap.mmap):
    """The mapped bytes of a segment; a writer that dies in a copy leaves half of it behind."""

    steps: Steps | None = None

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.steps is not None:
            try:
                self.steps.step()
            except Died:
                half = len(value) // 2
                super().__setitem__(slice(key.start, key.start + half), value[:half])
                raise
        super().__setitem__(key, value)


class Words:
    """The words of a segment's header: every store by its writer is a step, or, with `loads`, every load by its reader."""

    def __init__(self, words: memoryview, steps: Steps, loads: bool = False) -> None:
        self._words, self._steps, self._loads = words, steps, loads
        self.release = words.release

    def __getitem__(self, at: int) -> int:
        if self._loads:
            self._steps.step()
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._steps.step()
        self._words[at] = value


def make_mortal(made: OpenSegment, steps: Steps) -> None:
    """Every store into this segment becomes a step."""
    made.words.release()
    made.map.close()
    made.map = _Map(made.fd, made.end)
    made.map.steps = steps
    made.words = Words(memoryview(made.map)[:4096].cast("Q"), steps)  # type: ignore[assignment]


def loads_are_steps(reader: QueueReader, steps: Steps) -> None:
    """Every load of a word of the segments that this reader has open becomes a step."""
    for found in reader._segments.values():
        if not isinstance(found.words, Words):
            found.words = Words(found.words, steps, loads=True)  # type: ignore[assignment]


class Mortal:
    """While installed, every store into a segment is a step, and `bury` closes what the dead left open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: Steps) -> None:
        self.open: list[OpenSegment] = []
        mortal = self

        class Segment(OpenSegment):
            def __init__(self, path: str, fd: int, payload_size: int) -> None:
                super().__init__(path, fd, payload_size)
                make_mortal(self, steps)
                mortal.open.append(self)

            def close(self) -> None:
                mortal.open.remove(self)
                super().close()

        monkeypatch.setattr(event_queue, "OpenSegment", Segment)

    def bury(self) -> None:
        for segment in list(self.open):
            segment.close()


# ---- a host


def new_queue(folder: Path, *, partition: int = 0, disk: Disk = DISK, **over: Any) -> EventQueue:
    """A queue with small segments whose next one is made when it is asked for, if that works."""

    def make_next(queue: EventQueue) -> None:
        try:
            queue.install(queue.make())
        except OSError:
            return

    options: dict[str, Any] = {
        "partition": partition,
        "segment_size": 8192,
        "boot_id": BOOT,
        "host_id": bytes.fromhex(HOST),
        "durable": True,
        "now_s": lambda: NOW,
        "wants_next": make_next,
    }
    return EventQueue(str(folder), disk=disk, **options | over)


def append(queue: EventQueue, lines: bytes) -> None:
    """Append, with a new segment if there is no room. Raises OSError: nothing was recorded."""
    while not queue.append(lines):
        queue.install(queue.make(len(lines)))


def new_reader(
    folder: Path, *, boot: bytes = BOOT, positions: Mapping[str, Position] | None = None, disk: Disk = DISK
) -> QueueReader:
    return QueueReader(
        str(folder), partition=0, boot_id=boot, host_id=bytes.fromhex(HOST), positions=positions or {}, disk=disk,
        ids=Ids([], 0, window_s=3600.0),
    )  # fmt: skip


def counts_of(pending: Pending) -> dict[str, tuple[int, int]]:
    return {name: (delta.delivered, delta.bounced) for name, delta in pending.fold()[0].items()}


def read_all(reader: QueueReader, pending: Pending | None = None) -> dict[str, tuple[int, int]]:
    """Discover and drain all there is; returns what has been counted."""
    pending = Pending() if pending is None else pending
    reader.discover()
    reader.check_writers()
    while reader.drain(pending, 1 << 20):
        pass
    return counts_of(pending)


class Host:
    """A data folder. Its partitions are opened one by one, by whoever owns them now."""

    def __init__(self, root: Path, partitions: int = 1, synchronous: str = "OFF", host_id: str = HOST) -> None:
        self.root, self.partitions, self.synchronous, self.host_id = root, partitions, synchronous, host_id
        make_partitions(root, partitions)

    def queue(self, partition: int = 0, disk: Disk = DISK, **over: Any) -> EventQueue:
        options = {"partition": partition, "host_id": bytes.fromhex(self.host_id), **over}
        return new_queue(queue_folder(self.root, partition), disk=disk, **options)

    def segments(self, partition: int = 0) -> list[Path]:
        return sorted(queue_folder(self.root, partition).glob("*.seg"))

    def own(self, partition: int = 0, disk: Disk = DISK, boot: bytes = BOOT, **over: Any) -> Partition:
        options: dict[str, Any] = {
            "root": self.root,
            "partitions": self.partitions,
            "host_id": self.host_id,
            "boot_id": boot,
            "threshold": 10,
            "synchronous": self.synchronous,
            "ledger_cache": 1 << 20,
            "cache_names": 100,
            "pending_names_max": 100_000,
            "keep_rows": False,
            "ids_window": 3600.0,
            "disk": disk,
        }
        lock = lock_partition(self.root, partition, DISK)
        assert lock is not None, "the former owner still lives"
        try:
            return Partition(partition, PartitionOptions(**options | over), lock)
        except BaseException:
            os.close(lock)
            raise


def flush(partition: Partition) -> Flush:
    flight = partition.begin_flush()
    flight.run(partition.ledger, partition.cache, partition.reader)
    partition.end_flush(flight)
    return flight


def settle(partition: Partition) -> None:
    """Drain and flush until nothing is left to do. The disk must not be full."""
    partition.reader.discover()
    partition.reader.check_writers()
    while partition.drain(1 << 20) or partition.due:
        flush(partition)


def leave_for_dead(partition: Partition) -> None:
    """What the kernel does for a process that was killed: descriptors close, and no file changes.

    A connection that is closed would check the ledger's log into its file; so that is taken back.
    """
    path = partition.ledger.path
    files = [path, path.with_name(path.name + "-wal")]
    contents = {file: file.read_bytes() for file in files if file.exists()}
    with suppress(Exception):
        partition.reader.close()
    with suppress(Exception):
        partition.ledger.close()
    for file, content in contents.items():
        file.write_bytes(content)
    with suppress(OSError):
        os.close(partition._lock_fd)


def ledger_counts(partition: Partition) -> dict[str, tuple[int, int]]:
    return {row[0]: (row[1], row[2]) for piece in partition.ledger.scan(0) for row in piece}


# ---- as a program, to be killed


def _write(folder: str, start: int, count: int) -> None:
    """Append one event a call, and say each time how many are recorded."""
    queue = new_queue(Path(folder))
    for i in range(start, start + count):
        append(queue, b"+n%d.example\n" % (i % 7))
        os.write(1, b"%d\n" % (i + 1))
        queue.sync()
        queue.tidy()
    queue.close()


def _own(root: str, dies_at: int) -> None:
    """Count everything, and die before a given step. Exit status 0: it came to its end."""
    steps = Steps(dies_at, really=True)
    partition = Host(Path(root), synchronous="FULL").own(disk=steps.disk())
    steps.statements_of(partition.ledger)
    settle(partition)
    partition.close()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        _write(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        _own(sys.argv[2], int(sys.argv[3]))
