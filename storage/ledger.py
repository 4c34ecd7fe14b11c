"""The ledger of one partition: one SQLite file that holds counts, reading positions and tallies, changed only together.

One connection ever, in one process, with the file locked. Under synchronous=FULL a COMMIT that returned is durable. Two
threads share the connection: a flush writes while reads go on. Each statement runs under a lock, so a read waits for one
statement at most; `in_commit` tells a reader that would rather do something else that the one under way is the COMMIT.

Opening commits before anything else is read (`opened`), because a predecessor that was killed may have left a commit that is
visible but not yet durable.

Source  SQLite: page size 16384 and many rows a statement doubled the rate of flushes at 10 million rows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from uuid import uuid4

from catchall.storage.counts import Row, pack

FORMAT = 1
ROWS_PER_STATEMENT = 250
NAMES_PER_LOAD = 500
ROWS_PER_SCAN = 2000

_UPSERT = """insert into domain values {values} on conflict (name) do update set
    delivered = excluded.delivered, bounced = excluded.bounced,
    first_at = case when 0 in (domain.first_at, excluded.first_at) then max(domain.first_at, excluded.first_at)
        else min(domain.first_at, excluded.first_at) end,
    last_delivered_at = max(domain.last_delivered_at, excluded.last_delivered_at),
    last_bounced_at = max(domain.last_bounced_at, excluded.last_bounced_at),
    flush = excluded.flush, chk = excluded.chk"""
_UPSERT_ONE = _UPSERT.format(values="(?,?,?,?,?,?,?,?)")
_UPSERT_MANY = _UPSERT.format(values=",".join(["(?,?,?,?,?,?,?,?)"] * ROWS_PER_STATEMENT))
_LOAD = "select name, delivered, bounced, flush, chk from domain where name in ({})"
_LOAD_MANY = _LOAD.format(",".join("?" * NAMES_PER_LOAD))

# SQLite's primary result codes that say what a failed statement means for the transaction.
_FULL = sqlite3.SQLITE_FULL
# SQLite says FULL only where a write met ENOSPC. A quota, or a file that cannot be made or grown, comes as one of these.
_PERHAPS_FULL = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_PROBE_BYTES = 1 << 20
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


_COUNTS = struct.Struct("<QQQ")


class LedgerDamaged(Exception):
    """The file is no ledger, is damaged, or belongs to another folder or partition."""


class LedgerFull(Exception):
    """The disk is full. The transaction was rolled back: nothing of it happened."""


@dataclass(frozen=True, slots=True)
class Tallies:
    catch_all: int = 0
    not_catch_all: int = 0
    unknown: int = 0

    def __add__(self, other: Tallies) -> Tallies:
        return Tallies(
            self.catch_all + other.catch_all, self.not_catch_all + other.not_catch_all, self.unknown + other.unknown
        )


@dataclass(slots=True)
class Meta:
    component: str
    flush: int
    pushed: int
    tallies: Tallies


@dataclass(frozen=True, slots=True)
class Position:
    consumed: int
    clock: int


def check_of(name: str, delivered: int, bounced: int, flush: int) -> int:
    """The `chk` of a row: what tells a damaged count from a true one."""
    return zlib.crc32(_COUNTS.pack(delivered, bounced, flush), zlib.crc32(name.encode()))


class Ledger:
    """An open ledger.

    component   the name to give its counts in MongoDB if the file is made now
    threshold   the rule's; the tallies are counted anew when they were made with another
    synchronous "FULL", or "OFF" on tmpfs
    Raises      LedgerDamaged; LedgerFull or sqlite3.OperationalError when the disk does not let it be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        host: str,
        component: str,
        partition: int,
        partitions: int,
        threshold: int,
        synchronous: str = "FULL",
        cache_bytes: int = 16 << 20,
    ) -> None:
        self.path, self.threshold = path, threshold
        self.in_commit = False
        self.damaged_rows = 0  # rows loaded whose chk did not match
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._transaction = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=32)
        try:
            with _failures_explained(path):
                self._open(host, component, partition, partitions, synchronous, cache_bytes)
        except BaseException:
            self._db.close()
            raise

    def _open(
        self, host: str, component: str, partition: int, partitions: int, synchronous: str, cache_bytes: int
    ) -> None:
        run = self._db.execute
        run("pragma page_size = 16384")
        run("pragma locking_mode = exclusive")
        run("pragma journal_mode = wal")
        run(f"pragma synchronous = {synchronous}")
        run(f"pragma cache_size = {-max(1024, cache_bytes // 1024)}")
        run("pragma journal_size_limit = 67108864")
        run("begin immediate")
        for statement in files("catchall.storage").joinpath("schema.sql").read_text().split(";\n"):
            if statement.strip():
                run(statement)
        run(
            "insert or ignore into meta values (1, ?, ?, ?, ?, ?, ?, 0, 0, ?, 0, 0, 0, 0)",
            (FORMAT, str(uuid4()), host, component, partition, partitions, self.threshold),
        )
        run("update meta set opened = opened + 1")
        run("commit")
        row = run(
            "select format, host, partition, partitions, component, flush, pushed, threshold, "
            "catch_all, not_catch_all, unknown from meta"
        ).fetchone()
        if row[:4] != (FORMAT, host, partition, partitions):
            raise LedgerDamaged(
                f"{self.path} says format {row[0]}, host {row[1]}, partition {row[2]} of {row[3]}; "
                f"this is format {FORMAT}, host {host}, partition {partition} of {partitions}"
            )
        self.meta = Meta(row[4], row[5], row[6], Tallies(*row[8:]))
        if row[7] != self.threshold:
            self.meta.tallies = self._count_tallies()
            run(
                "update meta set threshold = ?, catch_all = ?, not_catch_all = ?, unknown = ?",
                (self.threshold, self.meta.tallies.catch_all, self.meta.tallies.not_catch_all, self.meta.tallies.unknown),
            )

    def _count_tallies(self) -> Tallies:
        """One scan of the table, at a start with another threshold."""
        row = self._db.execute(
            "select count(*) filter (where bounced = 0 and delivered > ?1), count(*) filter (where bounced > 0), "
            "count(*) filter (where bounced = 0 and delivered <= ?1) from domain",
            (self.threshold,),
        ).fetchone()
        return Tallies(*row)

    @contextlib.contextmanager
    def _statement(self) -> Iterator[None]:
        """One statement at a time, and whoever waits is next: without the turn, a flush that runs statement after statement
        takes the lock again before a waiting read wakes, and the read waits for all of the flush, COMMIT included."""
        with self._turn:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def close(self) -> None:
        self._db.close()

    def positions(self) -> dict[str, Position]:
        """How far each segment is in the counts, by name."""
        with self._statement(), _failures_explained(self.path):
            return {name: Position(*rest) for name, *rest in self._db.execute("select name, consumed, clock from segment")}

    def load(self, names: Sequence[str]) -> dict[str, int]:
        """The packed counts of those names that have a row. A row under an open transaction of `write` counts as it is."""
        found: dict[str, int] = {}
        for at in range(0, len(names), NAMES_PER_LOAD):
            some = names[at : at + NAMES_PER_LOAD]
            query = _LOAD_MANY if len(some) == NAMES_PER_LOAD else _LOAD.format(",".join("?" * len(some)))
            with self._statement(), _failures_explained(self.path):
                rows = self._db.execute(query, some).fetchall()
            for name, delivered, bounced, flush, chk in rows:
                if chk != check_of(name, delivered, bounced, flush):
                    self.damaged_rows += 1
                found[name] = pack(delivered, bounced)
        return found

    def write(
        self,
        rows: Sequence[Row],
        positions: Mapping[str, Position],
        gone: Sequence[str],
        tallies: Tallies,
    ) -> int:
        """One flush: rows, positions, the rows of segments whose unlink is durable, tallies. Returns its number.

        rows    sorted by name
        Raises  LedgerFull: rolled back, nothing happened. Any other error: the outcome is unknown, and the process must
                exit and open the ledger anew.
        """
        number = self.meta.flush + 1
        with self._transaction:
            self._run("begin immediate")
            try:
                for at in range(0, len(rows) - len(rows) % ROWS_PER_STATEMENT, ROWS_PER_STATEMENT):
                    values: list[str | int] = []
                    for name, delivered, bounced, first, last_d, last_b in rows[at : at + ROWS_PER_STATEMENT]:
                        chk = check_of(name, delivered, bounced, number)
                        values += (name, delivered, bounced, first, last_d, last_b, number, chk)
                    self._run(_UPSERT_MANY, values)
                for row in rows[len(rows) - len(rows) % ROWS_PER_STATEMENT :]:
                    self._run(_UPSERT_ONE, (*row, number, check_of(row[0], row[1], row[2], number)))
                for name, position in positions.items():
                    self._run("insert or replace into segment values (?, ?, ?)", (name, position.consumed, position.clock))
                for name in gone:
                    self._run("delete from segment where name = ?", (name,))
                self._run(
                    "update meta set flush = ?, catch_all = ?, not_catch_all = ?, unknown = ?",
                    (number, tallies.catch_all, tallies.not_catch_all, tallies.unknown),
                )
                self.in_commit = True
                self._run("commit")
            except LedgerFull:
                if self._db.in_transaction:
                    self._run("rollback")
                raise
            finally:
                self.in_commit = False
        self.meta.flush, self.meta.tallies = number, tallies
        return number

    def _run(self, statement: str, values: Sequence[str | int] = ()) -> None:
        with self._statement(), _failures_explained(self.path, outcome_known=not self.in_commit):
            self._db.execute(statement, values)

    def scan(self, after: int) -> Iterator[list[Row]]:
        """The rows of flushes later than `after`, in key order and in pieces, never while a transaction is open."""
        name = ""
        while True:
            with self._transaction, self._statement(), _failures_explained(self.path):
                rows = self._db.execute(
                    "select name, delivered, bounced, first_at, last_delivered_at, last_bounced_at from domain "
                    "where name > ? and flush > ? order by name limit ?",
                    (name, after, ROWS_PER_SCAN),
                ).fetchall()
            if not rows:
                return
            yield rows
            name = rows[-1][0]

    def set_pushed(self, pushed: int) -> None:
        with self._transaction:
            self._run("update meta set pushed = ?", (pushed,))
        self.meta.pushed = pushed


@contextlib.contextmanager
def _failures_explained(path: Path, outcome_known: bool = True) -> Iterator[None]:
    """outcome_known  whether a statement that failed has changed nothing for good: not so for a COMMIT, unless it says FULL"""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == _FULL or (code in _PERHAPS_FULL and outcome_known and _disk_is_full(path.parent)):
            raise LedgerFull(f"{path}: {error}") from error
        if code in _DAMAGED:
            raise LedgerDamaged(f"{path}: {error}") from error
        raise


def _disk_is_full(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, _PROBE_BYTES)
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False
