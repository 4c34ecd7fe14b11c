"""The counters of all processes, in one shared page file with a fixed slot for each process.

    byte 0                   slot 0: the supervisor
    SLOT_BYTES * k           slot k: shards 0..N-1, then the places of HTTP workers
    in a slot, 8-byte words  0 pid, 1 state, 2 heartbeat (monotonic ns), 3 started (unix ns), 4.. the cells of its role

A slot has one writer, which stores whole aligned words; any process may read at any time. Slots belong to places, not to
pids: a process that takes over a place goes on counting in it, so totals survive a death and never pile up. HTTP workers
learn their place by locking `http-K.lock`, which the kernel gives up for them when they die.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

from catchall.engine.disk import try_lock

SLOT_BYTES = 8192
SLOT_WORDS = SLOT_BYTES // 8
PID, STATE, HEARTBEAT, STARTED, FIRST_CELL = 0, 1, 2, 3, 4
STARTING, READY, DRAINING = 1, 2, 3


class Slot:
    """One process's words. `cells[i] += 1` is the whole protocol of a counter."""

    __slots__ = ("cells", "index", "role")

    def __init__(self, role: str, index: int, words: memoryview) -> None:
        self.role, self.index, self.cells = role, index, words

    def take(self) -> None:
        """This process now owns the slot."""
        self.cells[PID] = os.getpid()
        self.cells[STARTED] = time.time_ns()
        self.set_state(STARTING)

    def set_state(self, state: int) -> None:
        self.cells[HEARTBEAT] = time.monotonic_ns()
        self.cells[STATE] = state

    def beat(self) -> None:
        self.cells[HEARTBEAT] = time.monotonic_ns()

    def alive_within(self, seconds: float) -> bool:
        """Whether it beat in the last seconds. The clock is the same in all processes of a boot."""
        return time.monotonic_ns() - self.cells[HEARTBEAT] < seconds * 1e9

    @property
    def pid(self) -> int:
        return self.cells[PID]

    @property
    def state(self) -> int:
        return self.cells[STATE]


class MetricsPage:
    """The mapped page file of a running service.

    shards, http_places  how many slots of each role
    Raises               OSError when the file cannot be made or is of another size.
    """

    def __init__(self, folder: Path, *, shards: int, http_places: int, create: bool = False) -> None:
        self._folder, self._http_places = folder, http_places
        size = SLOT_BYTES * (1 + shards + http_places)
        path = folder / "metrics.page"
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        words = memoryview(self._map).cast("Q")
        roles = [("supervisor", 0), *(("shard", i) for i in range(shards)), *(("http", i) for i in range(http_places))]
        self.slots = [Slot(role, i, words[n * SLOT_WORDS : (n + 1) * SLOT_WORDS]) for n, (role, i) in enumerate(roles)]

    def of(self, role: str) -> Iterator[Slot]:
        return (slot for slot in self.slots if slot.role == role)

    def slot(self, role: str, index: int) -> Slot:
        return next(slot for slot in self.of(role) if slot.index == index)

    def take_http_place(self) -> tuple[Slot, int]:
        """A free place for this HTTP worker and the descriptor that holds it. Raises OSError when there is none."""
        for index in range(self._http_places):
            fd = os.open(self._folder / f"http-{index}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if try_lock(fd):
                slot = self.slot("http", index)
                slot.take()
                return slot, fd
            os.close(fd)
        raise OSError(f"all {self._http_places} places for HTTP workers are taken")
