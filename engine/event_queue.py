"""The writing end of one event queue: the segments of one (HTTP worker, partition).

Append      `append(lines)` copies the lines and stores `published`: no lock, no system call, no wait. From then on the
            events survive the death of any process. False means that there is no room yet: `make` first (it blocks: run it
            in a thread), `install`, then try again. Nothing is touched by an append that answers False.
Stage       under `always`: `stage` copies without publishing, a thread syncs, `publish` shows. Between the two nobody may
            read the lines, since a power cut could still take them.
Make        1 create NAME.tmp with O_EXCL, 2 flock it, 3 allocate, 4 write the header, 5 fsync it, 6 rename it to NAME.seg,
            7 fsync the folder. Only now may it be used. The lock comes before the name: a segment with a name is locked by
            its writer, or its writer is dead. Under `never` steps 5 and 7 are left out.
Roll        final `published` of the old segment, its mark, then `sealed`; then the first append into the new one; then
            sync and close the old one (`tidy`, in a thread).
Sync        under `interval`, once a second in a thread: note `published` and the crc up to it, fdatasync, store them as a
            mark. The first sync that fails seals the segment for good (`abandon`): a second try could only pretend.

`_limit` is the one comparison of the hot path. It is the end of the payload, or less when something is due first: half of
the payload before the next segment was asked for, 0 when the clock line of this second has not been written yet.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import threading
import zlib
from collections.abc import Callable

from catchall.engine import segment
from catchall.engine.disk import Disk, try_lock
from catchall.engine.lines import clock_line
from catchall.engine.segment import HEADER_SIZE, PUBLISHED, SEALED, Header, Mark
from catchall.engine.shard_protocol import PLACE

CLOCK_ROOM = 16  # bytes that a clock line may take before the lines of an append


class OpenSegment:
    """A segment that this process writes. It holds the file's lock for as long as the descriptor is open."""

    __slots__ = ("_crc", "_crc_at", "_marking", "_marks", "end", "fd", "map", "path", "synced", "words")

    def __init__(self, path: str, fd: int, payload_size: int) -> None:
        self.path, self.fd = path, fd
        self.end = HEADER_SIZE + payload_size
        self.map = mmap.mmap(fd, self.end)
        self.words = memoryview(self.map)[:HEADER_SIZE].cast("Q")
        self.synced = 0  # payload bytes that an fdatasync covered
        self._crc = self._crc_at = self._marks = 0
        self._marking = threading.Lock()  # a sync's mark and the roll's last one may meet

    @property
    def name(self) -> str:
        return os.path.basename(self.path).removesuffix(".seg")

    @property
    def published(self) -> int:
        return self.words[PUBLISHED]

    def mark(self, offset: int) -> None:
        """Store the crc of the payload up to `offset`, carried on from the last mark. An older offset is left out."""
        with self._marking, memoryview(self.map) as view:
            if offset < self._crc_at:
                return
            self._crc = zlib.crc32(view[HEADER_SIZE + self._crc_at : HEADER_SIZE + offset], self._crc)
            self._crc_at = offset
            segment.store_mark(self.map, self._marks, Mark(offset, self._crc))
            self._marks += 1

    def close(self) -> None:
        self.words.release()
        self.map.close()
        os.close(self.fd)  # gives up the lock: from here a reader may finish the segment


def make_segment(
    folder: str, *, partition: int, payload_size: int, boot_id: bytes, host_id: bytes, durable: bool, disk: Disk
) -> OpenSegment:
    """Steps 1 to 7 of "make". Raises OSError; then nothing is left behind but, at worst, a .tmp that the reader removes."""
    size = HEADER_SIZE + payload_size
    while True:
        name = f"{folder}/{secrets.token_hex(8)}"
        fd = disk.open(name + ".tmp", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(fd):  # a reader took it for left-over; it unlinks it
                os.close(fd)
                continue
            disk.allocate(fd, 0, size)
            disk.pwrite(fd, segment.pack_header(Header(partition, payload_size, boot_id, host_id)), 0)
            if durable:
                disk.fsync(fd)
            try:
                disk.rename(name + ".tmp", name + ".seg")
            except FileNotFoundError:
                os.close(fd)
                continue
            if durable:
                disk.sync_folder(folder)
            return OpenSegment(name + ".seg", fd, payload_size)
        except BaseException as error:
            if isinstance(error, OSError):
                for left in (name + ".tmp", name + ".seg"):
                    with contextlib.suppress(OSError):
                        disk.unlink(left)
            os.close(fd)
            raise


class EventQueue:
    """One queue. The event loop owns all of it but `make`, which may run in any thread, and `sync` and `tidy`, which
    share one thread of their own.

    now_s       the clock, whole unix seconds
    wants_next  called on the loop when the next segment should be made ahead of need
    durable     names and headers are synced when made (policies `always` and `interval`)
    """

    def __init__(
        self,
        folder: str,
        *,
        partition: int,
        segment_size: int,
        boot_id: bytes,
        host_id: bytes,
        durable: bool,
        disk: Disk,
        now_s: Callable[[], float],
        wants_next: Callable[[EventQueue], None],
    ) -> None:
        self.folder, self.partition = folder, partition
        self._segment_size, self._boot_id, self._host_id = segment_size, boot_id, host_id
        self._durable, self._disk, self._now_s, self._wants_next = durable, disk, now_s, wants_next
        self._current: OpenSegment | None = None
        self._next: OpenSegment | None = None
        self._old: list[OpenSegment] = []
        self._map: mmap.mmap | None = None
        self._words: memoryview | None = None
        self._at = self._limit = 0
        self._asked = False  # the next segment was asked for
        self._stamped_s = -1

    # ---- on the event loop

    def append(self, lines: bytes) -> bool:
        """Publish whole event lines. False: no room yet, and nothing was touched."""
        at = self._at
        end = at + len(lines)
        if end > self._limit:
            return self._append_slowly(lines)
        self._map[at:end] = lines  # type: ignore[index]  # a limit above 0 implies an open segment
        self._words[PUBLISHED] = end - HEADER_SIZE  # type: ignore[index]
        self._at = end
        return True

    def room(self, size: int) -> bool:
        """Whether lines of `size` bytes (and a clock line before them) fit without `make`."""
        return self.room_now(size) or (self._next is not None and HEADER_SIZE + size + CLOCK_ROOM <= self._next.end)

    def stage(self, lines: bytes) -> bool:
        """Copy whole lines without publishing them. False: no room yet, or not before `publish`; nothing was touched."""
        if not self.room_now(len(lines)) and (self.staged or not self.room(len(lines))):
            return False
        self._place(lines)
        return True

    @property
    def staged(self) -> bool:
        """Whether lines were copied that are not published."""
        return self._current is not None and self._current.published != self._at - HEADER_SIZE

    def publish(self) -> None:
        assert self._words is not None
        self._words[PUBLISHED] = self._at - HEADER_SIZE

    def room_now(self, size: int) -> bool:
        """Whether lines of `size` bytes fit into the open segment, without a roll."""
        return self._current is not None and self._at + size + CLOCK_ROOM <= self._current.end

    def place(self, size: int) -> bytes:
        """Where the last `size` bytes that were copied are, as shard_protocol.PLACE. Call it in the same turn of the loop."""
        assert self._current is not None
        end = self._at - HEADER_SIZE
        return PLACE.pack(self.partition, bytes.fromhex(self._current.name), end - size, end)

    def _append_slowly(self, lines: bytes) -> bool:
        if not self.room(len(lines)):
            return False
        self._place(lines)
        self.publish()
        return True

    def _place(self, lines: bytes) -> None:
        """Copy lines where there is room: the roll, the clock line, asking for the next segment."""
        second = int(self._now_s())
        if not self.room_now(len(lines)):
            self._roll()
        current = self._current
        assert current is not None
        if second != self._stamped_s:
            lines = clock_line(second) + lines
        end = self._at + len(lines)
        half = HEADER_SIZE + (current.end - HEADER_SIZE) // 2
        if end > half and not self._asked:
            self._wants_next(self)
            self._asked = True
        current.map[self._at : end] = lines
        self._at = end
        self._stamped_s = second
        self._limit = current.end if self._asked else half

    def _roll(self) -> None:
        if self._current is not None:
            self._seal(self._current)
        self._current, self._next = self._next, None
        assert self._current is not None
        self._map, self._words = self._current.map, self._current.words
        self._at, self._limit, self._asked, self._stamped_s = HEADER_SIZE, 0, False, -1

    def _seal(self, old: OpenSegment) -> None:
        if self._durable:
            old.mark(old.published)
        old.words[SEALED] = old.published + 1
        self._old.append(old)

    def install(self, made: OpenSegment) -> None:
        """Take what `make` returned as the next segment. One that was waiting but is too small is sealed unused."""
        if self._next is not None:
            self._seal(self._next)
        self._next = made

    def start_second(self) -> None:
        """A new second has begun: the next append writes the clock first. Costs an idle queue nothing."""
        self._limit = 0

    def abandon(self) -> None:
        """Seal what is open for good, unmarked: a sync failed, and nothing more may be acknowledged in this segment."""
        current = self._current
        if current is not None:
            current.words[SEALED] = current.published + 1
            current.synced = current.published  # so that `tidy` does not try again
            self._old.append(current)
            self._forget_current()

    def _forget_current(self) -> None:
        self._current = self._map = self._words = None
        self._at = self._limit = 0
        self._stamped_s = -1

    # ---- in threads

    def make(self, size: int = 0) -> OpenSegment:
        """A new segment that holds `size` bytes of lines, for `install`. Raises OSError; nothing changed then."""
        payload_size = max(self._segment_size - HEADER_SIZE, -(-(size + CLOCK_ROOM) // HEADER_SIZE) * HEADER_SIZE)
        return make_segment(
            self.folder,
            partition=self.partition,
            payload_size=payload_size,
            boot_id=self._boot_id,
            host_id=self._host_id,
            durable=self._durable,
            disk=self._disk,
        )

    def sync(self) -> bool:
        """Sync what was published so far and mark it. False: nothing was dirty. Raises OSError: then `abandon`."""
        current = self._current
        if current is None or current.published == current.synced:
            return False
        published = current.published
        self._disk.fdatasync(current.fd)
        if self._current is current:  # else it was rolled meanwhile: `tidy` syncs it
            current.mark(published)
            current.synced = published
        return True

    def sync_staged(self) -> None:
        """Sync what was staged, before it is published. Raises OSError: then `abandon`."""
        current = self._current
        assert current is not None
        self._disk.fdatasync(current.fd)
        current.synced = self._at - HEADER_SIZE  # nothing is staged meanwhile
        current.mark(current.synced)

    @property
    def untidy(self) -> bool:
        """Whether `sync` or `tidy` has something to do."""
        current = self._current
        return bool(self._old) or (self._durable and current is not None and current.published != current.synced)

    def tidy(self) -> None:
        """Sync and close the segments that were rolled. Raises OSError after closing all of them: a sync failed."""
        failure = None
        while self._old:
            old = self._old.pop(0)
            try:
                if self._durable and old.published != old.synced:
                    self._disk.fdatasync(old.fd)
            except OSError as error:
                failure = error
            finally:
                old.close()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Seal and close everything; the last act of a writer. Raises OSError if a sync failed."""
        for last in (self._current, self._next):
            if last is not None:
                self._seal(last)
        self._next = None
        self._forget_current()
        self.tidy()
