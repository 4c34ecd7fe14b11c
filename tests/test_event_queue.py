"""What one event queue promises its writer, its reader, and both of them when the other dies."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from faults import (
    DISK_CALLS,
    NOW,
    OTHER_BOOT,
    append,
    counting,
    disk_of,
    dying,
    failing,
    new_queue,
    new_reader,
    read_all,
)

from catchall.engine.disk import DISK, Disk
from catchall.engine.event_queue import EventQueue
from catchall.engine.pending import Pending
from catchall.engine.queue_reader import QueueReader


def payload_of(path: Path) -> bytes:
    return path.read_bytes()[4096:].rstrip(b"\0")


def payloads(folder: Path) -> list[bytes]:
    return [payload_of(path) for path in folder.glob("*.seg")]


def segments(folder: Path) -> int:
    return len(list(folder.glob("*.seg")))


def is_locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@pytest.fixture
def reader(tmp_path) -> Iterator[QueueReader]:
    reader = new_reader(tmp_path)
    yield reader
    reader.close()


# ---- append


def test_what_was_appended_is_what_is_read(tmp_path, reader):
    queue, pending = new_queue(tmp_path), Pending()
    for i in range(500):
        append(queue, b"+n%d.example\n-b.example 3\n" % (i % 10))
        if i % 50 == 0:
            assert read_all(reader, pending)["b.example"] == (0, 3 * (i + 1))
    queue.close()
    assert read_all(reader, pending) == {f"n{i}.example": (50, 0) for i in range(10)} | {"b.example": (0, 1500)}
    assert segments(tmp_path) > 2


def test_an_append_without_room_touches_nothing(tmp_path):
    asked: list[EventQueue] = []
    queue = new_queue(tmp_path, wants_next=asked.append)
    assert not queue.append(b"+a.example\n")
    assert not list(tmp_path.iterdir())
    queue.install(queue.make())
    while queue.append(b"+a.example\n"):
        pass
    assert asked == [queue]
    (path,) = tmp_path.glob("*.seg")
    before = path.read_bytes()
    for size in (11, 100, 4096, 100_000):
        assert not queue.append(b"+%b\n" % (b"a" * (size - 2)))
        assert not queue.stage(b"+%b\n" % (b"a" * (size - 2)))
    assert path.read_bytes() == before
    queue.close()


def test_an_append_whose_request_for_the_next_segment_fails_touches_nothing(tmp_path, reader):
    def fail(_: EventQueue) -> None:
        raise RuntimeError("no loop is running")

    queue = new_queue(tmp_path, wants_next=fail)
    queue.install(queue.make())
    with pytest.raises(RuntimeError):
        queue.append(b"+a.example\n" * 300)
    assert queue.append(b"+b.example\n")
    queue.close()
    assert read_all(reader) == {"b.example": (1, 0)}


def test_the_next_segment_is_asked_for_once_when_half_is_used(tmp_path):
    asked: list[EventQueue] = []
    queue = new_queue(tmp_path, wants_next=asked.append)
    queue.install(queue.make())
    used = 0
    while queue.append(b"+a.example\n"):
        used += 11
        assert len(asked) == (used + len("@1790000000\n") > 2048)
    assert used + 12 + 11 + 16 > 4096, "the segment is used to its end, but for the room of a clock line"
    queue.close()


@pytest.mark.parametrize("size", [4080, 4081, 4096, 4097, 50_000, 500_000])
def test_lines_larger_than_a_segment_get_one_of_their_own(tmp_path, reader, size):
    queue, pending = new_queue(tmp_path), Pending()
    append(queue, b"+a.example\n")
    lines = b"+b.example\n" * (size // 11)
    append(queue, lines)
    append(queue, b"+a.example\n")
    queue.close()
    assert read_all(reader, pending) == {"a.example": (2, 0), "b.example": (size // 11, 0)}
    assert sum(lines in payload for payload in payloads(tmp_path)) == 1


@pytest.mark.parametrize("segment_size", [8191, 8193, 9000, 65_537])
def test_a_segment_may_have_any_size(tmp_path, reader, segment_size):
    queue = new_queue(tmp_path, segment_size=segment_size)
    for _ in range(1000):
        append(queue, b"+a.example\n")
    queue.close()
    assert read_all(reader) == {"a.example": (1000, 0)}


# ---- the clock


def test_each_segment_begins_with_the_clock(tmp_path):
    queue = new_queue(tmp_path)
    for _ in range(1000):
        append(queue, b"+a.example\n")
    queue.close()
    filled = [payload for payload in payloads(tmp_path) if payload]
    assert len(filled) > 2
    assert all(payload.startswith(b"@%d\n+" % NOW) and payload.count(b"@") == 1 for payload in filled)


def test_the_clock_is_written_at_most_once_a_second_and_never_when_idle(tmp_path):
    now = float(NOW)
    queue = new_queue(tmp_path, now_s=lambda: now)
    append(queue, b"+a.example\n")
    for _ in range(5):
        queue.start_second()  # of the same second
        append(queue, b"+a.example\n")
    for _ in range(100):
        now += 1
        queue.start_second()
    append(queue, b"+b.example\n")
    append(queue, b"+b.example\n")
    queue.close()
    assert [p for p in payloads(tmp_path) if p] == [
        b"@%d\n%b@%d\n%b" % (NOW, b"+a.example\n" * 6, NOW + 100, b"+b.example\n" * 2)
    ]


# ---- make and roll


def test_the_lock_comes_before_the_name(tmp_path):
    seen = []

    def rename(source: str, target: str) -> None:
        seen.append(is_locked(Path(source)))
        os.rename(source, target)

    queue = new_queue(tmp_path, disk=disk_of(rename=rename))
    append(queue, b"+a.example\n")
    (path,) = tmp_path.glob("*.seg")
    assert is_locked(path)
    queue.close()
    assert seen == [True]
    assert not is_locked(path)


@pytest.mark.parametrize(("durable", "syncs"), [(True, 2), (False, 0)])
def test_a_segment_and_its_name_are_synced_before_use_unless_never(tmp_path, durable, syncs):
    fsync, fdatasync = counting(os.fsync), counting(os.fdatasync)
    queue = new_queue(tmp_path, durable=durable, disk=disk_of(fsync=fsync, fdatasync=fdatasync))
    append(queue, b"+a.example\n")
    assert fsync.uses == syncs
    assert queue.untidy == durable
    queue.close()
    assert fdatasync.uses == (1 if durable else 0)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(("call", "on"), [("open", 1), ("open", 2), ("allocate", 1), ("pwrite", 1), ("fsync", 1), ("fsync", 2),
                                          ("rename", 1)])  # fmt: skip
def test_a_make_that_fails_leaves_nothing_behind(tmp_path, reader, call, on, error):
    before = len(os.listdir("/proc/self/fd"))
    queue = new_queue(tmp_path, disk=disk_of(**{call: failing(getattr(DISK, call), on=on, error=error)}))
    with pytest.raises(OSError, match=os.strerror(error)):
        append(queue, b"+a.example\n")
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before
    append(queue, b"+a.example\n")
    queue.close()
    assert read_all(reader) == {"a.example": (1, 0)}


@pytest.mark.parametrize("call", [name for name in DISK_CALLS if name not in ("fdatasync", "unlink")])
def test_a_make_that_dies_leaves_nothing_that_is_counted(tmp_path, call):
    queue = new_queue(tmp_path, disk=disk_of(**{call: dying(getattr(DISK, call), on=1)}))
    with pytest.raises(faults.Died):
        append(queue, b"+a.example\n")
    reader = new_reader(tmp_path)
    reader.remove_leftovers()
    assert read_all(reader) == {}
    assert not list(tmp_path.glob("*.tmp"))
    assert all(found.finished for found in reader._segments.values())
    reader.close()


def test_a_reader_that_takes_a_new_file_for_left_over_only_costs_a_second_try(tmp_path, reader):
    attempts = 0

    def open_and_lose(path: str, flags: int, mode: int) -> int:
        nonlocal attempts
        fd = os.open(path, flags, mode)
        if path.endswith(".tmp") and (attempts := attempts + 1) == 1:
            reader.remove_leftovers()  # the moment between step 1 and step 2
        return fd

    queue = new_queue(tmp_path, disk=disk_of(open=open_and_lose))
    append(queue, b"+a.example\n")
    queue.close()
    assert attempts == 2
    assert read_all(reader) == {"a.example": (1, 0)}


def test_leftovers_go_unless_their_writer_lives(tmp_path, reader):
    (tmp_path / "00000000000000aa.tmp").write_bytes(b"dead")
    living = tmp_path / "00000000000000bb.tmp"
    living.write_bytes(b"living")
    fd = os.open(living, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    reader.remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == [living.name]
    os.close(fd)
    reader.remove_leftovers()
    assert not list(tmp_path.iterdir())


def test_a_waiting_segment_that_is_too_small_is_sealed_unused(tmp_path, reader):
    queue = new_queue(tmp_path)
    queue.install(queue.make())
    append(queue, b"+a.example\n" * 1000)
    queue.close()
    assert segments(tmp_path) >= 2
    assert read_all(reader) == {"a.example": (1000, 0)}
    assert all(found.finished for found in reader._segments.values())


def test_nothing_stays_open_after_close(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    queue = new_queue(tmp_path, disk=disk_of(fdatasync=failing(os.fdatasync, on=2, error=errno.EIO)))
    for _ in range(2000):
        append(queue, b"+a.example\n")
    with contextlib.suppress(OSError):
        queue.close()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- sync


def test_a_sync_marks_what_it_covered_and_is_idle_when_nothing_is_new(tmp_path):
    fdatasync = counting(os.fdatasync)
    queue = new_queue(tmp_path, disk=disk_of(fdatasync=fdatasync))
    assert not queue.sync()
    append(queue, b"+a.example\n")
    assert queue.sync()
    assert not queue.sync()
    assert not queue.untidy
    assert fdatasync.uses == 1
    append(queue, b"+b.example\n")
    reader = new_reader(tmp_path, boot=OTHER_BOOT)
    assert read_all(reader) == {"a.example": (1, 0), "b.example": (1, 0)}
    assert reader.unverified_bytes == len(b"+b.example\n")
    reader.close()
    queue.close()
    reader = new_reader(tmp_path, boot=OTHER_BOOT)
    read_all(reader)
    assert reader.unverified_bytes == 0
    reader.close()


@pytest.mark.parametrize("rolled", [False, True])
def test_a_failed_sync_seals_the_segment_and_the_queue_goes_on_in_a_new_one(tmp_path, reader, rolled):
    queue = new_queue(tmp_path, disk=disk_of(fdatasync=failing(os.fdatasync, on=1, error=errno.EIO)))
    events = 400 if rolled else 1
    for _ in range(events):
        append(queue, b"+a.example\n")
    with pytest.raises(OSError, match="Input/output"):
        queue.tidy() if rolled else queue.sync()
    queue.abandon()
    append(queue, b"+a.example\n")
    queue.tidy()
    assert queue.sync()
    queue.close()
    assert read_all(reader) == {"a.example": (events + 1, 0)}
    assert all(found.finished for found in reader._segments.values())


def test_one_failed_sync_keeps_no_rolled_segment_open(tmp_path):
    queue = new_queue(tmp_path, disk=disk_of(fdatasync=failing(os.fdatasync, on=1, error=errno.EIO)))
    for _ in range(2000):
        append(queue, b"+a.example\n")
    paths = sorted(tmp_path.glob("*.seg"), key=lambda path: not payload_of(path))
    with pytest.raises(OSError, match="Input/output"):
        queue.tidy()
    assert sum(map(is_locked, paths)) == 2 - (not queue._next)
    queue.abandon()
    queue.close()


def test_staged_lines_are_invisible_until_they_are_published(tmp_path, reader):
    queue, pending = new_queue(tmp_path), Pending()
    queue.install(queue.make())
    assert queue.stage(b"+a.example\n")
    assert queue.stage(b"+b.example\n")
    assert queue.staged
    assert read_all(reader, pending) == {}
    queue.sync_staged()
    assert read_all(reader, pending) == {}
    queue.publish()
    assert not queue.staged
    assert not queue.untidy
    assert read_all(reader, pending) == {"a.example": (1, 0), "b.example": (1, 0)}
    queue.close()


def test_a_segment_with_staged_lines_is_not_rolled(tmp_path, reader):
    queue = new_queue(tmp_path)
    queue.install(queue.make())
    assert queue.stage(b"+a.example\n" * 200)
    assert not queue.stage(b"+b.example\n" * 200)
    queue.sync_staged()
    queue.publish()
    assert queue.stage(b"+b.example\n" * 200)
    assert read_all(reader) == {"a.example": (200, 0)}
    queue.publish()
    queue.close()


def test_staged_lines_whose_sync_failed_are_not_counted(tmp_path, reader):
    queue = new_queue(tmp_path, disk=disk_of(fdatasync=failing(os.fdatasync, on=2, error=errno.EIO)))
    queue.install(queue.make())
    assert queue.stage(b"+a.example\n")
    queue.sync_staged()
    queue.publish()
    assert queue.stage(b"+b.example\n")
    with pytest.raises(OSError, match="Input/output"):
        queue.sync_staged()
    queue.abandon()
    assert not queue.staged
    append(queue, b"+c.example\n")
    queue.close()
    assert read_all(reader) == {"a.example": (1, 0), "c.example": (1, 0)}


# ---- what a reader says about its progress


def test_caught_up_is_known_only_after_a_drain_that_left_nothing(tmp_path, reader):
    queue, pending = new_queue(tmp_path), Pending()
    for _ in range(900):
        append(queue, b"+a.example\n")
    before = time.time_ns()
    reader.discover()
    assert reader.drain(pending, 1) > 0
    assert reader.caught_up_ns == 0
    while reader.drain(pending, 1 << 20):
        pass
    assert before <= reader.caught_up_ns <= time.time_ns()
    queue.close()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM])
def test_a_reader_that_runs_out_of_descriptors_sets_nothing_aside(tmp_path, error):
    queue = new_queue(tmp_path)
    append(queue, b"+a.example\n")
    queue.close()
    reader = new_reader(tmp_path, disk=Disk(open=failing(os.open, on=1, error=error)))
    reader.discover()
    assert not reader.complete, "a read must wait for it"
    assert read_all(reader) == {"a.example": (1, 0)}
    assert reader.complete
    assert reader.corrupt_files == 0
    reader.close()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.ENOLCK])
def test_a_segment_that_cannot_be_opened_now_is_tried_again_and_holds_up_nothing(tmp_path, error, caplog):
    for name in ("a", "b"):
        queue = new_queue(tmp_path)
        append(queue, f"+{name}.example\n".encode())
        queue.close()
    reader = new_reader(tmp_path, disk=Disk(open=failing(os.open, on=1, error=error)))
    reader.discover()
    assert reader.complete
    assert len(reader.unread()) == 1
    assert "is tried again" in caplog.text
    assert read_all(reader) == {"a.example": (1, 0), "b.example": (1, 0)}
    assert reader.corrupt_files == 0
    reader.close()


def test_a_segment_on_a_bad_sector_is_set_aside(tmp_path):
    queue = new_queue(tmp_path)
    append(queue, b"+a.example\n")
    queue.close()
    reader = new_reader(tmp_path, disk=Disk(open=failing(os.open, on=1, error=errno.EIO)))
    assert read_all(reader) == {}
    assert reader.corrupt_files == len(list(tmp_path.glob("*.corrupt"))) == 1
    reader.close()


def test_a_segment_that_cannot_be_renamed_is_ignored_and_said_once(tmp_path, caplog):
    (tmp_path / "0000000000000001.seg").write_bytes(b"nonsense")
    reader = new_reader(tmp_path, disk=disk_of(rename=failing(os.rename, on=1, error=errno.EROFS)))
    for _ in range(5):
        assert read_all(reader) == {}
    assert reader.corrupt_files == 1
    assert caplog.text.count("could not be renamed") == 1
    reader.close()
