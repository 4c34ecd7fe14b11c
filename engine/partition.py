"""One partition in the shard that owns it: its queues, what is pending, the flush under way, its ledger and cache.

All of it belongs to the shard's loop; a Flush in the flush thread and the pusher use the ledger beside it.

Read        A name's counts are, in this order: what a flush under way computed, else cache, else the ledger's row plus the
            cut of the flush under way; plus what is pending. Before that the caller drains what was published when the
            request came, so that a read sees everything acknowledged before it was sent.
Recover     lock the partition (waiting for its former owner to be gone); open the ledger, which commits before anything else;
            sync the queue folder; now rows whose files are gone may be dropped; discover, drain, answer.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from catchall.engine.cache import TwoGenerations
from catchall.engine.data_folder import partition_folder, queue_folder
from catchall.engine.disk import Disk, try_lock
from catchall.engine.flush import Flush
from catchall.engine.folder_watch import FolderWatch
from catchall.engine.ids import Ids
from catchall.engine.ledger_opening import condemn, open_ledger, supersede
from catchall.engine.pending import Pending
from catchall.engine.queue_reader import Ends, QueueReader
from catchall.engine.rules import status
from catchall.engine.scrub import Scrub
from catchall.storage.counts import Row, unpack
from catchall.storage.ledger import Ledger
from catchall.storage.ledger_rows import Tallies

COLD_COST = 5  # a name whose base must be read from the ledger counts as so many in memory, for statistics
CATCH_UP_BYTES = 4 << 20  # drained for a read in one go: what is longer would keep the shard from everything else
# Rows of past flushes kept for the push, over all partitions of a host; beyond, the push reads the ledger. A row takes about
# 300 bytes, and while MongoDB is away all of them are held.
RECENT_ROWS_MAX = 200_000
RECENT_FLUSHES_MAX = 1000


@dataclass(frozen=True, slots=True)
class PartitionOptions:
    root: Path
    partitions: int
    host_id: str
    boot_id: bytes
    threshold: int
    synchronous: str  # of the ledger: "FULL" or "OFF"
    ledger_cache: int  # bytes
    cache_names: int
    pending_names_max: int  # a drain stops here until a flush has begun
    keep_rows: bool  # for a push
    ids_window: float  # seconds for which ids are held
    disk: Disk
    watch: FolderWatch | None = None


class Partition:
    def __init__(self, number: int, options: PartitionOptions, lock_fd: int) -> None:
        self.number, self._options, self._lock_fd = number, options, lock_fd
        self._folder = partition_folder(options.root, number)
        self.ledger, ids, self._set_aside = open_ledger(
            self._folder,
            lock_fd,
            options.host_id,
            options.keep_rows,
            partial(
                Ledger,
                host=options.host_id,
                partition=number,
                partitions=options.partitions,
                threshold=options.threshold,
                synchronous=options.synchronous,
                cache_bytes=options.ledger_cache,
            ),
        )
        self.cache = TwoGenerations(options.cache_names)
        self.scrub = Scrub(self)
        self.pending = Pending()
        self.flight: Flush | None = None
        # Everything acknowledged before these (unix ns) is in the last commit; in the last cut. 0: not known yet.
        self.cut_at_ns = self._last_cut_ns = 0
        self.recent = RecentRows(RECENT_ROWS_MAX // options.partitions) if options.keep_rows else None
        self.ids = Ids(ids, self.ledger.meta.service_seconds, window_s=options.ids_window)
        self.reader = QueueReader(
            str(queue_folder(options.root, number)),
            partition=number,
            boot_id=options.boot_id,
            host_id=bytes.fromhex(options.host_id),
            positions=self.ledger.positions(),
            disk=options.disk,
            ids=self.ids,
            watch=options.watch,
        )
        self._droppable: list[str] = []
        try:
            self._open_queues()
        except BaseException:
            self.reader.close()
            self.ledger.close()
            raise

    # ---- open and close

    def _open_queues(self) -> None:
        self._options.disk.sync_folder(self.reader.folder)
        self.reader.remove_leftovers()
        self.reader.discover()
        self._droppable = self.reader.rows_without_a_file()

    def condemn(self, why: str) -> None:
        """Have the next opening set the damaged ledger aside. The process must exit now."""
        condemn(self._folder, why)

    def supersede(self, why: str) -> None:
        """MongoDB knows a later state of this ledger: have the next opening begin a new one. The process must exit now."""
        supersede(self._folder, self.ledger.meta.component, why)

    def close(self) -> None:
        self.reader.close()
        self.ledger.close()
        os.close(self._lock_fd)

    # ---- drain

    def drain(self, bytes_max: int) -> int:
        """Count what is published, at most about `bytes_max`, unless too many names are pending. Returns bytes taken."""
        if self.full:
            return 0
        return self.reader.drain(self.pending, bytes_max)

    @property
    def full(self) -> bool:
        """So many names or new ids are pending that a flush has to come first."""
        return max(self.pending.names, self.ids.pending) >= self._options.pending_names_max

    def arrived(self) -> Ends | None:
        """Discover, and return what a read that comes now has to see drained: the segments and where they end now.

        None: not all of them could be opened yet.
        """
        self.reader.discover()
        return self.reader.unread() if self.reader.complete else None

    def catch_up(self, ends: Ends | None = None) -> bool:
        """Drain towards `ends`, at most CATCH_UP_BYTES, and take from `ends` what is drained. False: call it again.

        Something remains when there is more, when a flush has to make room first, or when not all segments could be opened.
        """
        if ends is None:
            ends = self.arrived()
        if ends and not self.full:
            self.reader.drain_to(self.pending, ends, CATCH_UP_BYTES)
        if ends != []:
            return False
        self.reader.unread()  # notes up to when everything is drained
        return True

    # ---- read

    def known(self, name: str, key: bytes) -> int | None:
        """The packed counts of a name, or None if its base is not in memory: then `load` it."""
        flight = self.flight
        packed: int | None
        if flight is None:
            packed = self.cache.get(name)
        else:
            packed = flight.counts.get(name)
            if packed is None:
                packed = self.cache.get(name)
                if packed is not None:
                    packed += flight.cut.get(key)
        return None if packed is None else packed + self.pending.get(key)

    def load(self, names: dict[str, bytes]) -> dict[str, int]:
        """The packed counts of names that are not in memory, {name: key}; those without a row count from 0."""
        rows = self.ledger.load(list(names))
        flight = self.flight
        counts = {}
        bases = {}
        for name, key in names.items():
            base = rows.get(name, 0)
            bases[name] = base
            if flight is not None:
                # If the transaction has begun, `counts` holds every name of the cut, and the row may be the new one already.
                absolute = flight.counts.get(name)
                base = base + flight.cut.get(key) if absolute is None else absolute
            counts[name] = base + self.pending.get(key)
        if flight is None:
            self.cache.update(bases)
        return counts

    # ---- flush

    @property
    def due(self) -> bool:
        """Whether a flush has anything to do."""
        return self.flight is None and bool(
            self.pending or self.ids.dirty or self._droppable or self.reader.has_finished
        )

    def begin_flush(self) -> Flush:
        """Step 1: the cut."""
        positions, finished = self.reader.cut()
        flight = Flush(self.pending, positions, finished, self._droppable, self.ids.cut())
        self.pending, self._droppable = Pending(), []
        self._last_cut_ns = self.reader.caught_up_ns
        self.flight = flight
        return flight

    def end_flush(self, flight: Flush) -> None:
        """Step 5; or, when the disk was full, everything back as if the cut had not been."""
        if flight.full is not None:
            flight.cut.merge(self.pending)
            flight.cut.bad_lines += self.pending.bad_lines
            self.pending = flight.cut
            self._droppable = flight.gone
            self.reader.uncut(flight.positions)
            self.ids.uncut(flight.ids)
        else:
            self.cache.update(flight.counts)
            self.cut_at_ns = self._last_cut_ns
            self.scrub.note_new(flight.new_names)
            self.reader.forget(flight.gone)
            self._droppable = flight.gone
            if self.recent is not None:
                self.recent.add(flight.number, flight.rows, flight.new_names)
        self.flight = None

    # ---- damage

    @property
    def copied(self) -> bool:
        """Whether MongoDB holds a copy of the ledger."""
        return self._options.keep_rows

    @property
    def set_aside(self) -> int:
        """How often this object set something aside."""
        return self._set_aside + self.reader.corrupt_files

    def corrupt_files(self) -> int:
        """How many *.corrupt are in its folders now."""
        return sum(entry.endswith(".corrupt") for folder in (self._folder, self.reader.folder) for entry in os.listdir(folder))

    # ---- tallies

    def tallies(self, names_max: int, now_ns: int) -> tuple[Tallies, int] | None:
        """(domains by status, the instant in unix ns before which every acknowledged event is included).

        As of now if at most `names_max` names are pending, else as of the last cut, if there was one since the start. None: ask
        again in a moment. The caller has caught up, and `now_ns` is from before that.
        """
        base, flight, as_of_ns = self.ledger.meta.tallies, self.flight, self.cut_at_ns
        if flight is not None:
            if flight.tallies is None:
                return None if flight.cut.names <= names_max or not as_of_ns else (base, as_of_ns)
            base, as_of_ns = flight.tallies, self._last_cut_ns
        if self.pending.names > names_max and as_of_ns:
            return base, as_of_ns
        keys = {key.decode(): key for key in self.pending.known_names()}
        counts = {name: self.known(name, key) for name, key in keys.items()}
        cold = {name: keys[name] for name, packed in counts.items() if packed is None}
        if len(cold) > names_max // COLD_COST and as_of_ns:
            return base, as_of_ns
        if cold and self.ledger.in_commit:  # to load them would wait for it; a small one is over in a moment
            small = flight is None or flight.cut.names <= names_max
            return None if small or not as_of_ns else (base, as_of_ns)
        counts |= self.load(cold)
        moved = {"catch-all": 0, "not-catch-all": 0, "unknown": 0}
        threshold = self._options.threshold
        for name, key in keys.items():
            after = counts[name]
            assert after is not None
            before = after - self.pending.get(key)
            if before:
                moved[status(*unpack(before), threshold)] -= 1
            moved[status(*unpack(after), threshold)] += 1
        return base + Tallies(moved["catch-all"], moved["not-catch-all"], moved["unknown"]), now_ns


class RecentRows:
    """The rows of the last flushes, for a push that does not want to scan the ledger. Used by two threads."""

    def __init__(self, rows_max: int) -> None:
        self._lock = threading.Lock()
        self._rows_max = rows_max
        self._flushes: list[tuple[int, list[Row], set[str]]] = []
        self._rows = 0

    def add(self, number: int, rows: list[Row], new_names: set[str]) -> None:
        with self._lock:
            self._flushes.append((number, rows, new_names))
            self._rows += len(rows)
            while self._rows > self._rows_max or len(self._flushes) > RECENT_FLUSHES_MAX:
                self._rows -= len(self._flushes.pop(0)[1])

    def take(self, after: int) -> tuple[list[Row], set[str], int] | None:
        """All rows since flush `after`: the latest of each name, sorted; the names new in them; the last flush's number.

        None: not all of them are held. What is returned, and what is older, is no longer held.
        """
        with self._lock:
            flushes, self._flushes, self._rows = self._flushes, [], 0
        flushes = [entry for entry in flushes if entry[0] > after]
        if not flushes or flushes[0][0] != after + 1 or flushes[-1][0] != after + len(flushes):
            return None
        merged: dict[str, Row] = {}
        new_names: set[str] = set()
        for _, rows, new in flushes:
            new_names |= new
            for row in rows:
                old = merged.get(row[0])
                merged[row[0]] = row if old is None else _later(old, row)
        return sorted(merged.values()), new_names, flushes[-1][0]


def _later(old: Row, new: Row) -> Row:
    first = min(old[3], new[3]) if old[3] and new[3] else old[3] or new[3]
    return (new[0], new[1], new[2], first, max(old[4], new[4]), max(old[5], new[5]))


def lock_partition(root: Path, number: int, disk: Disk) -> int | None:
    """The descriptor that holds a partition, or None while its former owner, perhaps a stopped process, still has it."""
    fd = disk.open(str(partition_folder(root, number) / "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    if try_lock(fd):
        return fd
    os.close(fd)
    return None
