"""Two live processes on one queue, and what is left when one of them is killed."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from faults import counts_of, new_reader, read_all

from catchall.engine.pending import Pending
from catchall.engine.queue_reader import QueueReader

PATIENCE_S = 60.0


@pytest.fixture
def reader(tmp_path) -> Iterator[QueueReader]:
    reader = new_reader(tmp_path)
    yield reader
    reader.close()


class Writer:
    """A writer in a process of its own; `recorded` is what it said so far."""

    def __init__(self, folder: Path, start: int, count: int) -> None:
        command = [sys.executable, faults.__file__, "write", str(folder), str(start), str(count)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self._said = b""
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self.recorded = start

    def listen(self) -> bool:
        """Hear what it says. False: it has ended."""
        assert self._process.stdout is not None
        said = os.read(self._process.stdout.fileno(), 1 << 16) if self._readable() else None
        if said:
            *lines, self._said = (self._said + said).split(b"\n")
            self.recorded = int(lines[-1]) if lines else self.recorded
        return said != b""

    def _readable(self) -> bool:
        return bool(select.select([self._process.stdout], [], [], 0.001)[0])

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def end(self) -> int:
        while self.listen():
            pass
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline


def counted(pending: Pending) -> int:
    return sum(delivered for delivered, _ in counts_of(pending).values())


def drain(reader: QueueReader, pending: Pending) -> None:
    reader.discover()
    while reader.drain(pending, 1 << 20):
        pass


def test_two_processes_share_a_queue_and_the_sums_are_exact(tmp_path, reader):
    writer, pending = Writer(tmp_path, 0, 7 * 400), Pending()

    def read_on() -> bool:
        lives = writer.listen()
        recorded = writer.recorded
        drain(reader, pending)
        assert counted(pending) >= recorded, "a read sees what was acknowledged before it"
        return not lives

    until(read_on)
    assert writer.end() == 0
    drain(reader, pending)
    assert counts_of(pending) == {f"n{i}.example": (400, 0) for i in range(7)}
    assert all(found.finished for found in reader._segments.values())


def test_a_killed_writer_loses_nothing_and_its_segment_ends(tmp_path, reader):
    writer, pending = Writer(tmp_path, 0, 10**9), Pending()
    until(lambda: writer.listen() and writer.recorded > 500)
    drain(reader, pending)
    reader.check_writers()
    drain(reader, pending)
    assert not all(found.finished for found in reader._segments.values()), "its writer lives"
    writer.kill()
    assert writer.end() == -signal.SIGKILL
    drain(reader, pending)
    assert writer.recorded <= counted(pending) <= writer.recorded + 1
    # Found out without being asked: by the lock, once the segment has been quiet for a second.
    until(lambda: drain(reader, pending) is None and all(found.finished for found in reader._segments.values()))
    assert writer.recorded <= counted(pending) <= writer.recorded + 1


def test_a_segment_of_a_writer_that_died_before_the_reader_came_is_finished(tmp_path, reader):
    writer = Writer(tmp_path, 0, 10**9)
    until(lambda: writer.listen() and writer.recorded > 10)
    writer.kill()
    writer.end()
    counts = read_all(reader)
    assert writer.recorded <= sum(delivered for delivered, _ in counts.values()) <= writer.recorded + 1
    assert reader.has_finished
