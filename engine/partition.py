"""One partition in the shard that owns it: its queues, what is pending, the flush under way, its ledger and cache.

All of it belongs to the shard's loop; a Flush in the flush thread and the pusher use the ledger beside it.

Read        A name's counts are, in this order: what a flush under way computed, else cache, else the ledger's row plus the
            cut of the flush under way; plus what is pending. Before that the caller drains what was published when the
            request came, so that a read sees everything acknowledged before it was sent.
Recover     lock the partition (waiting for its former owner to be gone); open the ledger, which commits before anything else;
            sync the queue folder; now rows whose files are gone may be dropped; discover, drain, answer.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from catchall.engine.cache import TwoGenerations
from catchall.engine.data_folder import partition_folder, queue_folder
from catchall.engine.disk import Disk, try_lock
from catchall.engine.flush import Flush
from catchall.engine.folder_watch import FolderWatch
from catchall.engine.pending import Pending
from catchall.engine.queue_reader import QueueReader
from catchall.engine.rules import status
from catchall.storage.counts import Row, unpack
from catchall.storage.ledger import Ledger, LedgerDamaged, LedgerFull, Position, Tallies

log = logging.getLogger("catchall.partition")

COLD_COST = 5  # a name whose base must be read from the ledger counts as so many in memory, for statistics
CATCH_UP_BYTES = 1 << 20  # drained for a read before it is looked at what is left
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
    disk: Disk
    watch: FolderWatch | None = None


class Partition:
    def __init__(self, number: int, options: PartitionOptions, lock_fd: int) -> None:
        self.number, self._options, self._lock_fd = number, options, lock_fd
        self._folder = partition_folder(options.root, number)
        self.corrupt_ledgers = 0
        self.ledger, positions = self._open_ledger()
        self.cache = TwoGenerations(options.cache_names)
        self.pending = Pending()
        self.flight: Flush | None = None
        # Everything acknowledged before these (unix ns) is in the last commit; in the last cut. 0: not known yet.
        self.cut_at_ns = self._last_cut_ns = 0
        self.recent = RecentRows(RECENT_ROWS_MAX // options.partitions) if options.keep_rows else None
        self.reader = QueueReader(
            str(queue_folder(options.root, number)),
            partition=number,
            boot_id=options.boot_id,
            host_id=bytes.fromhex(options.host_id),
            positions=positions,
            disk=options.disk,
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

    def _open_ledger(self) -> tuple[Ledger, dict[str, Position]]:
        path = self._folder / "ledger.db"
        mark = self._folder / "ledger.superseded"
        try:
            if not path.exists():
                mark.unlink(missing_ok=True)  # it was set aside, and a death came before the end of that
            return self._succeed(path, mark) if mark.exists() else self._ledger(path)
        except LedgerDamaged as damage:
            living = self._set_ledger_aside(path, mark, damage)
            ledger, _ = self._ledger(path)
            ledger.write([], living, [], ledger.meta.tallies)
            return ledger, living

    def _ledger(self, path: Path, mark: str = "") -> tuple[Ledger, dict[str, Position]]:
        options = self._options
        former = sum(1 for end in ("corrupt", "superseded") for _ in self._folder.glob(f"ledger-*.{end}"))  # each had its own
        ledger = Ledger(
            path,
            host=options.host_id,
            component=options.host_id if former == 0 else f"{options.host_id}-{former + 1}{mark}",
            partition=self.number,
            partitions=options.partitions,
            threshold=options.threshold,
            synchronous=options.synchronous,
            cache_bytes=options.ledger_cache,
        )
        try:
            return ledger, ledger.positions()
        except BaseException:
            ledger.close()
            raise

    def _succeed(self, path: Path, mark: Path) -> tuple[Ledger, dict[str, Position]]:
        """Keep a ledger that `supersede` marked, and go on from its positions in a new one: it is whole, so nothing that was
        acknowledged is counted twice or left out here. The mark names the component that is over, so that a death anywhere
        leaves all of it to do, or nothing but the mark. Raises LedgerDamaged, LedgerFull.
        """
        component, _, why = mark.read_text().partition("\n")
        ledger, positions = self._ledger(path)
        if ledger.meta.component != component:
            mark.unlink()
            return ledger, positions
        ledger.close()
        if path.with_name(f"{path.name}-wal").exists():
            raise LedgerFull(f"{path}: what its last flushes wrote beside it could not be moved into it")
        aside = self._folder / f"ledger-{time.time_ns()}.superseded"
        os.link(path, aside)
        self.corrupt_ledgers += 1
        log.error("%s: %s. It is kept as %s; counts of partition %d begin anew beside what MongoDB has",
                  path, why.strip(), aside.name, self.number)  # fmt: skip
        fresh = self._folder / "ledger.new"
        for left_over in self._folder.glob("ledger.new*"):
            left_over.unlink()
        ledger, _ = self._ledger(fresh, f"-{secrets.token_hex(4)}")  # the other copy of this folder may be doing the same
        ledger.write([], positions, [], ledger.meta.tallies)
        ledger.close()
        fresh.rename(path)
        self._options.disk.sync_folder(str(self._folder))
        mark.unlink()
        return self._ledger(path)

    def _set_ledger_aside(self, path: Path, mark: Path, damage: LedgerDamaged) -> dict[str, Position]:
        """Start anew: the old file, and what was in segments whose positions only it knew, are kept and not counted.

        Returns where to go on in the segments whose writers live: what they publish from now on is counted, and what they
        had published is kept in a copy. The ledger's own name goes last, so that a death before that leaves all of it to do.
        """
        self.corrupt_ledgers += 1
        stamp = time.time_ns()
        aside = self._folder / f"ledger-{stamp}.corrupt"
        log.error("%s. It is set aside as %s; counts of partition %d begin anew", damage, aside.name, self.number)
        living: dict[str, Position] = {}
        for segment in (self._folder / "q").glob("*.seg"):
            log.error("%s (%d bytes): its position is not known, so it is set aside", segment, segment.stat().st_size)
            fd = os.open(segment, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if try_lock(fd):
                    segment.rename(segment.with_suffix(".corrupt"))
                else:
                    content = segment.read_bytes()
                    segment.with_suffix(".corrupt").write_bytes(content)
                    living[segment.stem] = Position(int.from_bytes(content[64:72], "little"), 0)
            finally:
                os.close(fd)
        for suffix in ("-wal", ""):
            source = path.with_name(path.name + suffix)
            if source.exists():
                source.rename(aside.with_name(f"{aside.name}{suffix}"))
        mark.unlink(missing_ok=True)
        return living

    def supersede(self, why: str) -> None:
        """MongoDB knows a later state of this ledger: have the next opening set it aside. The process must exit now."""
        (self._folder / "ledger.superseded").write_text(f"{self.ledger.meta.component}\n{why}\n")

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
        """So many names are pending that a flush has to come first."""
        return self.pending.names >= self._options.pending_names_max

    def catch_up(self) -> bool:
        """Discover, and drain what is published now. False: not yet, a flush has to make room first."""
        self.reader.discover()
        behind = self.reader.unread()
        while behind:
            if not self.drain(CATCH_UP_BYTES):
                return False
            behind = [(found, limit) for found, limit in behind if found.consumed < limit]
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
        return self.flight is None and bool(self.pending or self._droppable or self.reader.has_finished)

    def begin_flush(self) -> Flush:
        """Step 1: the cut."""
        positions, finished = self.reader.cut()
        flight = Flush(self.pending, positions, finished, self._droppable)
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
        else:
            self.cache.update(flight.counts)
            self.cut_at_ns = self._last_cut_ns
            self.reader.forget(flight.gone)
            self._droppable = flight.gone
            if self.recent is not None:
                self.recent.add(flight.number, flight.rows, flight.new_names)
        self.flight = None

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
            small = flight is not None and flight.cut.names <= names_max
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
