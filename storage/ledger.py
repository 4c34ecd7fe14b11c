"""The ledger of one partition: one SQLite file that holds counts, reading positions, ids and tallies, changed only together.

One connection ever, in one process, with the file locked. Under synchronous=FULL a COMMIT that returned is durable. Two
threads share the connection: a flush writes while reads go on. Each statement runs under a lock, so a read waits for one
statement at most; `in_commit` tells a reader that would rather do something else that the one under way is the COMMIT.

Opening commits before anything else is read (`opened`), because a predecessor that was killed may have left a commit that is
visible but not yet durable.

Damage      A `chk` covers the counts of each row; one over the row of `meta` covers the rest: `meta.positions` is the xor of
            the checks of all rows of `segment`. What these or SQLite find wrong is LedgerDamaged, but for a row of `domain`:
            that is noted (damaged_rows.py) and served. The trace (ledger_trace.py) tells a ledger that lost its end.

Source  SQLite: page size 16384 and many rows a statement doubled the rate of flushes at 10 million rows.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

from catchall.storage.counts import Row, pack
from catchall.storage.damaged_rows import DamagedRows, usable
from catchall.storage.ledger_failures import LedgerDamaged, LedgerFull, failures_explained
from catchall.storage.ledger_rows import (
    HeldId,
    IdChanges,
    Position,
    Tallies,
    check_holds,
    check_of,
    check_of_ids,
    check_of_positions,
    check_of_values,
    is_id,
)
from catchall.storage.ledger_trace import Trace

FORMAT = 2
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
_INSERT_IDS = "insert into id values {}"
_DELETE_IDS = "delete from id where hash in ({})"
_LOAD_MANY = _LOAD.format(",".join("?" * NAMES_PER_LOAD))

_META = (
    "format, uuid, host, component, partition, partitions, "
    "flush, pushed, threshold, catch_all, not_catch_all, unknown, positions, ids, service_seconds"
)
_SET_META = (
    "update meta set flush = ?, pushed = ?, threshold = ?, "
    "catch_all = ?, not_catch_all = ?, unknown = ?, positions = ?, ids = ?, service_seconds = ?, chk = ?"
)
_SEGMENT = "insert or replace into segment values (?, ?, ?, ?)"
_SCHEMA = "select m.name, c.name, c.type, c.pk from sqlite_schema m, pragma_table_info(m.name) c order by m.name, c.cid"


@dataclass(slots=True)
class Meta:
    uuid: str
    component: str
    flush: int
    pushed: int
    tallies: Tallies
    ids: int = 0  # xor of the checks of all that are held
    service_seconds: int = 0


class Ledger:
    """An open ledger.

    component   the name to give its counts in MongoDB if the file is made now
    begin       if it is made now: where to go on in the queues
    must_exist  it was made before: not to make it but to raise LedgerDamaged if the file holds nothing
    threshold   the rule's; the tallies are counted anew when they were made with another
    synchronous "FULL", or "OFF" on tmpfs
    is_new      whether it was made now
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
        begin: Mapping[str, Position] | None = None,
        must_exist: bool = False,
    ) -> None:
        self.path, self.threshold = path, threshold
        self.in_commit = False
        self.trace: Trace | None = None  # notes every commit
        self._damaged_rows = DamagedRows(path)
        self._identity = (FORMAT, host, partition, partitions)
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._transaction = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=32)
        try:
            with failures_explained(path, opening=True):
                self._configure(synchronous, cache_bytes)
                self._db.execute("begin immediate")
                self.is_new = not self._is_made()
                if self.is_new:
                    if must_exist:
                        raise LedgerDamaged(path, "nothing is in it, and this partition had a ledger")
                    self._make(component, begin or {})
                self._db.execute("update meta set opened = opened + 1")
                self._db.execute("commit")
                if self.is_new:  # so that a -wal which is lost later takes the last flushes with it, and not the whole ledger
                    self._db.execute("pragma wal_checkpoint(passive)")
                self._positions: dict[str, Position] = {}
                self._read_meta()
        except BaseException:
            self._db.close()
            raise

    @property
    def damaged_rows(self) -> int:
        """Rows that were read and whose check did not hold."""
        return self._damaged_rows.found

    def _configure(self, synchronous: str, cache_bytes: int) -> None:
        run = self._db.execute
        run("pragma page_size = 16384")
        run("pragma locking_mode = exclusive")
        run("pragma journal_mode = wal")
        run(f"pragma synchronous = {synchronous}")
        run(f"pragma cache_size = {-max(1024, cache_bytes // 1024)}")
        run("pragma journal_size_limit = 67108864")

    def _is_made(self) -> bool:
        """Whether it has its tables. Raises LedgerDamaged if it has others: what is missing must not be made again, empty."""
        found = self._db.execute(_SCHEMA).fetchall()
        if found and found != _expected_schema():
            raise LedgerDamaged(self.path, "its tables are not those of a ledger")
        return bool(found)

    def _make(self, component: str, begin: Mapping[str, Position]) -> None:
        run = self._db.execute
        for statement in schema():
            run(statement)
        form, *where = self._identity
        check = check_of_positions(begin)
        meta = [form, uuid4().hex, where[0], component, *where[1:], 0, 0, self.threshold, 0, 0, 0, check, 0, 0]
        run(f"insert into meta ({_META}, chk, opened, one) values ({'?,' * 15} ?, 0, 1)", [*meta, check_of_values(*meta)])
        for name, at in begin.items():
            run(_SEGMENT, (name, at.consumed, at.clock, at.finished))

    def _read_meta(self) -> None:
        form, uuid, host, component, partition, partitions, flush, pushed, threshold, *rest = meta_row(self._db, self.path)
        *tallies, positions, ids, seconds = rest
        if (form, host, partition, partitions) != self._identity:
            ours = "format {}, host {}, partition {} of {}".format(*self._identity)
            raise LedgerDamaged(
                self.path, f"it is of format {form}, host {host}, partition {partition} of {partitions}; this is {ours}"
            )
        self.meta = Meta(uuid, component, flush, pushed, Tallies(*tallies), ids, seconds)
        rows = self._db.execute("select name, consumed, clock, finished from segment").fetchall()
        self._positions = {name: Position(consumed, clock, bool(finished)) for name, consumed, clock, finished in rows}
        if check_of_positions(self._positions) != positions:
            raise LedgerDamaged(self.path, "its reading positions do not match their check")
        if threshold != self.threshold:
            self.meta.tallies = self.count_tallies()
            self._write_meta(self.meta, self._positions)

    def _write_meta(self, meta: Meta, positions: Mapping[str, Position]) -> None:
        form, host, partition, partitions = self._identity
        own = (form, meta.uuid, host, meta.component, partition, partitions)
        tallies = (meta.tallies.catch_all, meta.tallies.not_catch_all, meta.tallies.unknown)
        checks = (check_of_positions(positions), meta.ids)
        values = (meta.flush, meta.pushed, self.threshold, *tallies, *checks, meta.service_seconds)
        self._run(_SET_META, (*values, check_of_values(*own, *values)))

    def count_tallies(self) -> Tallies:
        """By one scan of the table."""
        with self._statement(), failures_explained(self.path):
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
        return dict(self._positions)

    def ids(self) -> tuple[list[HeldId], bool]:
        """(the ids that are held, oldest first; whether they are what was written). What is damaged of them stays as it is.

        Raises  LedgerDamaged, also for rows that cannot be ids at all.
        """
        with self._statement(), failures_explained(self.path):
            held = self._db.execute("select hash, digest, age from id order by age").fetchall()
        if not all(is_id(*row) for row in held):
            raise LedgerDamaged(self.path, "some of its ids are none")
        expected, self.meta.ids = self.meta.ids, check_of_ids(held)
        return held, expected == self.meta.ids

    def load(self, names: Sequence[str]) -> dict[str, int]:
        """The packed counts of those names that have a row. A row under an open transaction of `write` counts as it is."""
        found: dict[str, int] = {}
        for at in range(0, len(names), NAMES_PER_LOAD):
            some = names[at : at + NAMES_PER_LOAD]
            query = _LOAD_MANY if len(some) == NAMES_PER_LOAD else _LOAD.format(",".join("?" * len(some)))
            with self._statement(), failures_explained(self.path):
                rows = self._db.execute(query, some).fetchall()
            for name, delivered, bounced, flush, chk in rows:
                if not check_holds(name, delivered, bounced, flush, chk):
                    self._damaged_rows.note((name, delivered, bounced, flush, chk))
                    delivered, bounced = usable(delivered), usable(bounced)
                found[name] = pack(delivered, bounced)
        return found

    def write(
        self,
        rows: Sequence[Row],
        positions: Mapping[str, Position],
        gone: Sequence[str],
        tallies: Tallies,
        ids: IdChanges | None = None,
    ) -> int:
        """One flush: rows, positions, the rows of segments whose unlink is durable, tallies, ids. Returns its number.

        rows    sorted by name
        Raises  LedgerFull: rolled back, nothing happened. Any other error: the outcome is unknown, and the process must
                exit and open the ledger anew.
        """
        with self._transaction:
            meta = replace(self.meta, flush=self.meta.flush + 1, tallies=tallies)
            if ids is not None:
                meta.ids ^= check_of_ids(ids.gone) ^ check_of_ids(ids.new)
                meta.service_seconds = ids.service_seconds
            number = meta.flush
            after = {**self._positions, **positions}
            for name in gone:
                after.pop(name, None)
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
                    self._run(_SEGMENT, (name, position.consumed, position.clock, position.finished))
                for name in gone:
                    self._run("delete from segment where name = ?", (name,))
                if ids is not None:
                    self._write_ids(ids)
                self._write_meta(meta, after)
                self.in_commit = True
                self._run("commit")
            except LedgerFull:
                if self._db.in_transaction:
                    self._run("rollback")
                raise
            finally:
                self.in_commit = False
            if self.trace is not None:
                with contextlib.suppress(OSError):  # an older number there proves less, and is never wrong
                    self.trace.note(number)
            self.meta, self._positions = meta, after
        return number

    def _write_ids(self, ids: IdChanges) -> None:
        for at in range(0, len(ids.gone), NAMES_PER_LOAD):
            hashes = [hash for hash, _, _ in ids.gone[at : at + NAMES_PER_LOAD]]
            self._run(_DELETE_IDS.format(",".join("?" * len(hashes))), hashes)
        for at in range(0, len(ids.new), ROWS_PER_STATEMENT):
            some = ids.new[at : at + ROWS_PER_STATEMENT]
            self._run(_INSERT_IDS.format(",".join(["(?,?,?)"] * len(some))), [field for row in some for field in row])

    def _run(self, statement: str, values: Sequence[str | int | bytes | None] = ()) -> None:
        with self._statement(), failures_explained(self.path, outcome_known=not self.in_commit):
            self._db.execute(statement, values)

    def scan(self, after: int) -> Iterator[list[Row]]:
        """The rows of flushes later than `after`, in key order and in pieces, never while a transaction is open.

        A damaged row is left out: what MongoDB once took of it could never be lowered again.
        """
        name: str | None = ""
        while name is not None:
            piece, name = self._piece(name, after, ROWS_PER_SCAN)
            if rows := [row[:6] for row in piece if self._sound(row)]:
                yield rows

    def verify(self, after: str, rows_max: int) -> tuple[int, str | None]:
        """Check the next rows after a name: (how many there were, where to go on; None at the end). Raises LedgerDamaged."""
        rows, last = self._piece(after, -1, rows_max)
        for row in rows:
            self._sound(row)
        return len(rows), last

    def _sound(self, row: tuple[Any, ...]) -> bool:
        checked = (row[0], row[1], row[2], row[6], row[7])
        if check_holds(*checked):
            return True
        self._damaged_rows.note(checked)
        return False

    def _piece(self, name: str, after: int, rows_max: int) -> tuple[list[tuple[Any, ...]], str | None]:
        with self._transaction, self._statement(), failures_explained(self.path):
            rows = self._db.execute(
                "select name, delivered, bounced, first_at, last_delivered_at, last_bounced_at, flush, chk from domain "
                "where name > ? and flush > ? order by name limit ?",
                (name, after, rows_max),
            ).fetchall()
        for row in rows:  # or else a look-up goes astray, and a scan round and round
            if not isinstance(row[0], str) or row[0] <= name:
                raise LedgerDamaged(self.path, f"its rows are not in order: {row[0]!r} comes after {name!r}")
            name = row[0]
        return rows, name if rows else None

    def set_pushed(self, pushed: int) -> None:
        with self._transaction:
            meta = replace(self.meta, pushed=pushed)
            self.in_commit = True  # this statement is one
            try:
                self._write_meta(meta, self._positions)
            finally:
                self.in_commit = False
            self.meta = meta


def meta_row(db: sqlite3.Connection, path: Path) -> tuple[Any, ...]:
    """The columns of _META. Raises LedgerDamaged if they do not match their check."""
    with failures_explained(path, opening=True):
        row = db.execute(f"select {_META}, chk from meta").fetchone()
    if row is None or check_of_values(*row[:-1]) != row[-1]:
        raise LedgerDamaged(path, "what it says about itself does not match its check")
    return tuple(row[:-1])


def schema() -> list[str]:
    """The statements that make a ledger's tables."""
    text = files("catchall.storage").joinpath("schema.sql").read_text()
    return [statement for statement in text.split(";\n") if statement.strip()]


@cache
def _expected_schema() -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for statement in schema():
            db.execute(statement)
        return db.execute(_SCHEMA).fetchall()
