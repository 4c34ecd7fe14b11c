"""The reading end of a partition's event queues: all its segments, whichever writers made them.

Discover    List the folder. There is no registration, and no order between segments: a segment is read because its name is
            there. Before every batch of reads and every drain.
Drain       Load `sealed`, then `published`, in this order, and take what lies between `consumed` and there, slice by slice.
            A segment of another boot is one that a power cut may have hurt: its end is its first NUL, cut back to the last
            newline, and its newest mark must match.
Finished    `consumed` = the final length of a sealed segment, = `published` of one whose writer is dead (its lock can be
            taken), = the end found after a power cut.
Caught up   A drain that leaves nothing behind has all that was acknowledged before the folder was last listed.
Retire      After a durable commit that holds the finished position: unlink, then sync the folder. Only then may the next
            flush drop its row: a name that comes back in a crash is then known to be counted.
Set aside   What is no segment, cannot be read or does not match its mark becomes NAME.corrupt, with its bytes in the log, and
            nothing of it is counted. A file that only cannot be opened now stays, and is tried again.
Too many    With no descriptor left, what is open is drained and retired first; reads wait until the rest could be opened.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from catchall.engine import logs, segment
from catchall.engine.disk import Disk, try_lock
from catchall.engine.folder_watch import FolderWatch
from catchall.engine.ids import Ids, Repeats
from catchall.engine.ledger_opening import leave_note
from catchall.engine.pending import Pending
from catchall.engine.read_segment import ReadSegment
from catchall.engine.segment import HEADER_SIZE, PUBLISHED, BadSegment
from catchall.storage.ledger_rows import Position

log = logging.getLogger("catchall.queues")

SLICE = 128 << 10  # bytes of a slice: larger ones count slower, and delay answers
CATCH_UP_S = 0.03  # of work; lines with ids take seven times as long as others
PAST_SEGMENTS = 64  # retired ones of which it is still known which lines were repeats
PAST_REPEATS_MAX = 1 << 17  # of them, all together: 16 bytes each
SPARE_FILES = 64  # descriptors that segments leave to ledgers, sockets and the syncing of folders
NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # these say nothing about the file
UNREADABLE = frozenset({errno.EIO, errno.EISDIR, errno.ESPIPE, errno.ELOOP, errno.ENXIO, errno.EUCLEAN})


Ends = list[tuple[ReadSegment, int]]  # segments, and the payload bytes up to which each is to be drained


class QueueReader:
    """Reads the queues of one partition into a Pending.

    watch           tells when the folder must be listed again; its owner polls it before `discover`
    positions       what the ledger knows: where to go on in each segment
    caught_up_ns    unix time before which everything acknowledged has been drained; 0 before that is known
    """

    def __init__(
        self, folder: str, *, partition: int, boot_id: bytes, host_id: bytes, positions: Mapping[str, Position], disk: Disk,
        ids: Ids, watch: FolderWatch | None = None,
    ) -> None:
        self.folder, self._partition, self._boot_id, self._host_id, self._disk = folder, partition, boot_id, host_id, disk
        self._folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # listing by it saves a system call
        self._watch = watch
        if watch is not None:
            watch.add(folder)
        self._segments: dict[str, ReadSegment] = {}
        self._ids = ids
        self._past: dict[str, Repeats] = {}  # of the last segments that were retired
        self._known = dict(positions)  # segments that are not open here: finished ones, or not yet discovered
        self._changed: set[str] = set()  # positions that moved since the last cut
        self._ignored: set[str] = set()
        self._fd_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES  # the lowest free number is given out first
        self._unopened = logs.BadState(log)
        self.complete = True  # the last listing could be opened, all of it that is there to be read
        self.corrupt_files = self.unverified_bytes = 0
        self._listed_ns = self.caught_up_ns = 0

    # ---- discover

    def discover(self) -> None:
        """List the folder and open what is new. With a watch that was just polled, only if something is.

        Raises OSError if the folder cannot be listed.
        """
        watch = self._watch
        if watch is not None and not watch.changed(self.folder):
            self._listed_ns = watch.polled_ns
            return
        try:
            names = os.listdir(self._folder_fd)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._later(self.folder, error)
            return
        segments = self._segments
        now = time.time_ns()
        self.complete = opened = True
        for entry in names:
            if entry[:-4] not in segments and entry.endswith(".seg") and entry not in self._ignored:
                opened &= self._open(entry)
                if not self.complete:
                    return  # what is open is drained and retired first
        self._listed_ns = now
        if opened:
            self._unopened.leave(f"all of {self.folder} could be opened", time.monotonic())
            if watch is not None:
                watch.listed(self.folder)

    def _later(self, path: str, error: OSError) -> None:
        self.complete &= error.errno not in NO_ROOM
        self._unopened.enter(f"{path} cannot be opened now, and is tried again: {error}", time.monotonic())

    def remove_leftovers(self) -> None:
        """Unlink .tmp files whose writers are dead."""
        for entry in os.listdir(self.folder):
            if entry.endswith(".tmp"):
                path = f"{self.folder}/{entry}"
                try:
                    fd = self._disk.open(path, os.O_RDWR | os.O_CLOEXEC, 0)
                except OSError:
                    continue
                try:
                    if try_lock(fd):
                        self._disk.unlink(path)
                except FileNotFoundError:
                    pass  # renamed by its living writer in between
                finally:
                    os.close(fd)

    def _open(self, entry: str) -> bool:
        """Open one segment, or set it aside. False: it must be tried again later."""
        name, path = entry[:-4], f"{self.folder}/{entry}"
        fd = -1
        try:
            fd = self._disk.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0)
            if fd >= self._fd_max:
                raise OSError(errno.EMFILE, "as many segments are open as there may be", path)
            header = segment.parse_header(os.pread(fd, 64, 0), os.fstat(fd).st_size)
            if header.partition != self._partition or header.host_id != self._host_id:
                raise BadSegment(f"belongs to partition {header.partition} of host {header.host_id.hex()}")
            found = ReadSegment(path, name, fd, header.payload_size, self._known.get(name, Position(0, 0)))
        except FileNotFoundError:
            return True
        except (OSError, BadSegment) as bad:
            if fd >= 0:
                os.close(fd)
            if isinstance(bad, OSError) and bad.errno not in UNREADABLE:
                self._later(path, bad)
                return False
            self._set_aside(path, str(bad))
            return True
        try:
            unverified = found.examine(header.boot_id == self._boot_id)
        except BadSegment as bad:
            self._give_up(found, str(bad))
            return True
        if unverified:
            self.unverified_bytes += unverified
            log.warning("%s: a power cut left %d bytes that no mark covers; they are counted", path, unverified)
        self._known.pop(name, None)
        self._segments[name] = found
        return True

    def _give_up(self, found: ReadSegment, why: str) -> None:
        found.close()
        self._segments.pop(found.name, None)
        self._set_aside(found.path, why)

    def _set_aside(self, path: str, why: str) -> None:
        aside = path.removesuffix(".seg") + ".corrupt"
        self.corrupt_files += 1
        log.error("%s: %s. Set aside as %s; nothing more of it is counted", path, why, aside)
        try:
            self._disk.rename(path, aside)
        except OSError as error:
            log.error("%s could not be renamed: %s", path, error)
            self._ignored.add(os.path.basename(path))

    # ---- drain

    @property
    def backlog(self) -> int:
        """Published bytes that were not drained, in the segments that are open here."""
        return sum(limit - found.consumed for found, limit in self.unread())

    def unread(self) -> Ends:
        """What was published and not drained, in the segments that are open here: [(segment, where it ends now)]."""
        behind = []
        for found in self._segments.values():
            limit = found.words[PUBLISHED] if found.final is None else found.final
            if found.consumed < limit:
                behind.append((found, limit))
        if not behind:
            self.caught_up_ns = self._listed_ns
        return behind

    def drain_to(self, pending: Pending, ends: Ends, bytes_max: int) -> None:
        """Count at most about `bytes_max` bytes towards `ends`, for about CATCH_UP_S at most, and take from `ends` what is
        drained or no longer there."""
        now, until = time.monotonic(), time.thread_time() + CATCH_UP_S
        for found, limit in ends:
            if self._segments.get(found.name) is found:
                stop = min(self._stop(found, now), limit)
                while found.consumed < stop and bytes_max > 0 and (step := self._slice(found, stop, pending)):
                    bytes_max = bytes_max - step if time.thread_time() < until else 0
        ends[:] = [(f, limit) for f, limit in ends if f.consumed < limit and self._segments.get(f.name) is f]

    def drain(self, pending: Pending, bytes_max: int) -> int:
        """Count at most about `bytes_max` bytes of what is published. Returns how many it took; 0: all was drained."""
        taken = 0
        now = time.monotonic()
        caught_up = True
        for found in list(self._segments.values()):
            stop = self._stop(found, now)
            while found.consumed < stop and taken < bytes_max:
                step = self._slice(found, stop, pending)
                if step == 0:
                    break
                taken += step
            caught_up &= found.consumed >= stop
        if caught_up:
            self.caught_up_ns = self._listed_ns
        return taken

    def _stop(self, found: ReadSegment, now: float) -> int:
        """How far a segment may be read now. One that contradicts itself is set aside."""
        try:
            return found.stop(now)
        except BadSegment as bad:
            self._give_up(found, str(bad))
            return found.consumed

    def _slice(self, found: ReadSegment, stop: int, pending: Pending) -> int:
        """Count one slice; returns its bytes, 0 if it must be looked at again later."""
        start = HEADER_SIZE + found.consumed
        end = min(HEADER_SIZE + stop, start + SLICE)
        if end < HEADER_SIZE + stop:
            end = found.map.rfind(b"\n", start, end) + 1 or end  # no line is longer than a slice
        chunk = found.map[start:end]
        if b"\0" in chunk or chunk[-1:] != b"\n":
            return self._unwritten(found, chunk, pending)
        found.is_written()
        self._count(found, chunk, pending)
        return len(chunk)

    def _count(self, found: ReadSegment, chunk: bytes, pending: Pending) -> None:
        """Count whole lines, and be past them."""
        size = len(chunk)
        if b"#" in chunk or b"=" in chunk:  # in no line without an id or a key
            chunk = self._ids.count(chunk, found.consumed, found.repeats)
        found.clock = pending.count(chunk, found.clock)
        self._advance(found, size)

    def _unwritten(self, found: ReadSegment, chunk: bytes, pending: Pending) -> int:
        """A NUL or half a line below `published`: take what is whole, look again at once, and after a second skip the rest."""
        nul = chunk.find(b"\0")
        whole = chunk.rfind(b"\n", 0, nul if nul >= 0 else len(chunk)) + 1
        if whole:
            self._count(found, chunk[:whole], pending)
            return whole
        if not found.stays_unwritten():
            return 0
        self.corrupt_files += 1
        aside = f"{self.folder}/{found.name}-{found.consumed}.corrupt"
        log.error("%s: bytes %d to %d are no lines. They are kept in %s and not counted",
                  found.path, found.consumed, found.consumed + len(chunk), aside)  # fmt: skip
        try:
            with open(aside, "wb") as file:
                file.write(chunk)
        except OSError as error:
            log.error("%s could not be written: %s", aside, error)
        found.is_written()
        self._advance(found, len(chunk))
        return len(chunk)

    def _advance(self, found: ReadSegment, size: int) -> None:
        found.consumed += size
        self._changed.add(found.name)

    # ---- flush and retire

    def cut(self) -> tuple[dict[str, Position], list[str]]:
        """(positions that moved since the last cut, segments that are finished), as of this instant."""
        finished = [found for found in self._segments.values() if found.finished]
        names = self._changed | {found.name for found in finished}
        self._changed = set()
        moved = [self._segments[name] for name in names if name in self._segments]
        return {f.name: Position(f.consumed, f.clock, f.finished) for f in moved}, [found.name for found in finished]

    @property
    def has_finished(self) -> bool:
        return any(found.finished for found in self._segments.values())

    def uncut(self, positions: Iterable[str]) -> None:
        """The flush of that cut did not happen: its positions are to be saved by the next one."""
        self._changed.update(positions)

    def unlink(self, finished: Iterable[str]) -> list[str]:
        """After the commit that holds their positions: unlink segments, durably. In the flush thread.

        Returns the names whose rows the next flush may drop. Raises OSError if the folder cannot be synced.
        """
        gone = []
        for name in finished:
            try:
                self._disk.unlink(f"{self.folder}/{name}.seg")
            except FileNotFoundError:
                pass
            except OSError as error:
                log.error("%s/%s.seg cannot be removed: %s", self.folder, name, error)
                continue
            gone.append(name)
        if gone:
            self._disk.sync_folder(self.folder)
        return gone

    def forget(self, gone: Iterable[str]) -> None:
        """Close segments that were unlinked."""
        for name in gone:
            found = self._segments.pop(name, None)
            if found is not None:
                self._past[name] = found.repeats
                found.close()
        while len(self._past) > PAST_SEGMENTS or sum(map(len, self._past.values())) > PAST_REPEATS_MAX:
            del self._past[next(iter(self._past))]

    def repeats(self, name: str, start: int, end: int) -> int | None:
        """How many events of a segment's payload[start:end] were repeats; None if that is not known, or not any more."""
        found = self._segments.get(name)
        if found is not None:
            return found.repeats.between(start, end) if found.consumed >= end else None
        past = self._past.get(name)
        return None if past is None else past.between(start, end)

    def rows_without_a_file(self) -> list[str]:
        """Rows of the ledger whose segments are gone for good. Only at start, after the folder was synced and discovered."""
        present = {os.path.splitext(entry) for entry in os.listdir(self.folder)}
        gone = [name for name in self._known if (name, ".seg") not in present]
        for name in gone:
            if not self._known[name].finished and (name, ".corrupt") not in present:
                self.corrupt_files += 1
                counted = self._known[name].consumed
                what = f"{self.folder}/{name}.seg is gone; {counted} bytes of it were counted, and no more can be"
                log.error("%s", what)
                leave_note(Path(self.folder), f"{name}-gone", what)
        return gone

    @property
    def at_rest(self) -> bool:
        """No segment is left."""
        return not self._segments

    def check_writers(self) -> None:
        """Find out now which writers are dead; for the last drain, when all of them should be."""
        for found in self._segments.values():
            found.check_writer_now()

    def close(self) -> None:
        for found in self._segments.values():
            found.close()
        self._segments.clear()
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1
