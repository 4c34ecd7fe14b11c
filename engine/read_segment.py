"""One segment as its reader has it: where it goes on, how far it may go, and whether what is there can be trusted."""

from __future__ import annotations

import logging
import mmap
import os
import time
import zlib

from catchall.engine import segment
from catchall.engine.disk import try_lock
from catchall.engine.ids import Repeats
from catchall.engine.segment import HEADER_SIZE, PUBLISHED, SEALED, BadSegment
from catchall.storage.ledger_rows import Position

log = logging.getLogger("catchall.queues")

UNWRITTEN_WAIT_S = 1.0  # how long what contradicts itself may be a store that has not arrived yet
QUIET_S = 1.0  # a segment in which nothing new was published for so long is asked whether its writer lives


class ReadSegment:
    """consumed  payload bytes that are counted      clock  the second told by the last clock line below
    final     its length, once it is known that nothing will follow      repeats  which of its lines were repeats
    """

    __slots__ = (
        "_checked", "_orphaned", "_seen", "_unwritten_since", "clock", "consumed", "fd", "final", "map", "name", "path",
        "payload_size", "repeats", "words",
    )  # fmt: skip

    def __init__(self, path: str, name: str, fd: int, payload_size: int, position: Position) -> None:
        self.path, self.name, self.fd, self.payload_size = path, name, fd, payload_size
        self.map = mmap.mmap(fd, HEADER_SIZE + payload_size, prot=mmap.PROT_READ)
        self.words = memoryview(self.map)[:HEADER_SIZE].cast("Q")
        self.consumed, self.clock = position.consumed, position.clock
        self.repeats = Repeats(self.consumed)
        self.final: int | None = None
        self._orphaned = False  # its writer is dead: neither word will change
        self._seen = -1  # `published` when the writer's life was last checked
        self._checked = 0.0
        self._unwritten_since: float | None = None

    def close(self) -> None:
        self.words.release()
        self.map.close()
        os.close(self.fd)

    @property
    def finished(self) -> bool:
        return self.final is not None and self.consumed >= self.final

    # ---- what was found when it was opened

    def examine(self, same_boot: bool) -> int:
        """Compare it with its ledger row and its newest mark. Of another boot, a power cut may have hurt it: find its end.

        Returns  bytes that are to be counted though no mark covers them.   Raises  BadSegment.
        """
        if self.consumed > self.payload_size:
            raise BadSegment(f"the ledger counted {self.consumed} bytes of {self.payload_size}")
        before = HEADER_SIZE + self.consumed - 1
        if self.consumed and self.map[before] not in b"\n\0":  # a power cut may have taken what was counted
            raise BadSegment(f"the ledger counted {self.consumed} bytes of it, where no line ends")
        if same_boot:  # nothing was lost, so the newest mark must match
            mark = segment.newest_mark(self.map)
            if mark is not None and mark.offset > self.consumed:  # not a living writer's new segment, which costs nothing
                self._verified(self.payload_size)
            return 0
        stop = HEADER_SIZE + self.payload_size
        self.final = segment.end_after_power_cut(self.map, HEADER_SIZE + self.consumed, stop) - HEADER_SIZE
        # What was counted before the power cut may itself be gone from the file: a mark above that was never synced.
        lost = self.map.find(b"\0", HEADER_SIZE, HEADER_SIZE + self.consumed) - HEADER_SIZE
        return max(0, self.final - self._verified(self.final if lost < 0 else lost))

    def _verified(self, whole: int) -> int:
        """How many bytes its newest mark proves, if it lies within `whole`, or were counted. Raises BadSegment."""
        mark = segment.newest_mark(self.map)
        if mark is None or mark.offset > whole:
            return self.consumed
        with memoryview(self.map) as view:
            crc = zlib.crc32(view[HEADER_SIZE : HEADER_SIZE + mark.offset])
        if crc != mark.crc:
            raise BadSegment(f"the crc of its first {mark.offset} bytes does not match its mark")
        return max(self.consumed, mark.offset)

    # ---- how far it may be read

    def stop(self, now: float) -> int:
        """How far it may be read now; notes its final length when that is known. Raises BadSegment."""
        if self.final is not None:
            return self.final
        if not self._orphaned and now - self._checked >= QUIET_S and self.words[SEALED] == 0:
            self._check_writer(now)
        sealed = self.words[SEALED]  # in this order: `published` is final when `sealed` is set
        published = self.words[PUBLISHED]
        beyond = not self.consumed <= published <= self.payload_size
        if beyond or (sealed and sealed != published + 1 and self.stays_unwritten()):
            raise BadSegment(f"published {published}, sealed {sealed}, consumed {self.consumed} contradict")
        if self._orphaned or sealed == published + 1:
            self.final = published
            end = HEADER_SIZE + published
            if not sealed and self.map[end : end + 1] > b"\0":
                log.warning("%s: its writer died with lines behind byte %d that it had not published; they are not counted",
                            self.path, published)  # fmt: skip
        return published

    def _check_writer(self, now: float) -> None:
        """One that has been quiet: if its lock can be taken, its writer is dead, and it has ended."""
        self._checked = now
        published = self.words[PUBLISHED]
        self._orphaned = self._seen == published and try_lock(self.fd)
        self._seen = published

    def check_writer_now(self) -> None:
        """As if it had been quiet: for the last drain, when all writers should be dead."""
        if self.final is None and not self._orphaned:
            self._seen = self.words[PUBLISHED]
            self._check_writer(time.monotonic())
            self._checked = 0.0

    def stays_unwritten(self) -> bool:
        """Whether what contradicts itself has done so for longer than any store takes to arrive."""
        now = time.monotonic()
        if self._unwritten_since is None:
            self._unwritten_since = now
        return now - self._unwritten_since >= UNWRITTEN_WAIT_S

    def is_written(self) -> None:
        """What contradicted itself does so no more."""
        self._unwritten_since = None
