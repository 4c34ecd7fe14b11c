"""One flush of one partition: what was pending goes into the ledger, together with how far the queues were read.

    1 cut      on the shard's loop: pending, positions, ids and finished segments, all as of one instant; pending is empty again
    2 absolute in the flush thread: base + delta for every name, base from the cache or else the ledger; which statuses move
    3 commit   rows, positions, ids, rows of segments that are gone for good, tallies, flush number: one transaction
    4 retire   unlink the finished segments and sync the folder; the next flush drops their rows
    5 fold     on the loop: the absolute counts go into the cache, and cut and counts are dropped in the same turn

Died anywhere? Open the ledger and go on from its positions: before 3 nothing happened, after it everything has.

A read between 1 and 5 asks `counts` first, then the cache, then the ledger's row plus the cut: see shard_reads in shard.py.
Nothing here makes one long call that holds the interpreter: names are sorted in buckets, bases loaded 500 at a time and rows
written 250 at a time, so that reads go on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field

from catchall.engine.cache import TwoGenerations
from catchall.engine.ids import IdCut
from catchall.engine.pending import Delta, Pending
from catchall.engine.queue_reader import QueueReader
from catchall.engine.rules import status
from catchall.storage.counts import Row, pack, unpack
from catchall.storage.ledger import NAMES_PER_LOAD, Ledger
from catchall.storage.ledger_failures import LedgerFull
from catchall.storage.ledger_rows import Position, Tallies

log = logging.getLogger("catchall.flush")


@dataclass(slots=True)
class Flush:
    """One flush under way. The loop reads `counts` and `cut` while the flush thread fills the rest."""

    cut: Pending
    positions: dict[str, Position]
    finished: list[str]
    gone: list[str]
    ids: IdCut
    counts: dict[str, int] = field(default_factory=dict)  # absolute, packed; grows until the transaction begins
    rows: list[Row] = field(default_factory=list)  # sorted by name; absolute counts, times of this cut
    new_names: set[str] = field(default_factory=set)
    tallies: Tallies | None = None  # after this flush; set before the transaction begins
    number: int = 0
    bad_lines: int = 0
    events: tuple[int, int] = (0, 0)  # delivered, bounced
    duration_ns: int = 0
    full: LedgerFull | None = None  # rolled back: nothing happened

    def run(self, ledger: Ledger, cache: TwoGenerations, reader: QueueReader) -> None:
        """Steps 2 to 4, in the flush thread.

        Raises  anything but LedgerFull: the outcome is unknown, and the process must exit.
        """
        started = time.monotonic_ns()
        deltas, self.bad_lines = self.cut.fold()
        self.events = sum(d.delivered for d in deltas.values()), sum(d.bounced for d in deltas.values())
        self.tallies = tallies = self._absolute(deltas, ledger, cache)
        try:
            self.number = ledger.write(self.rows, self.positions, self.gone, tallies, self.ids.changes)
        except LedgerFull as full:
            self.full = full
            return
        self.gone = reader.unlink(self.finished)
        self.duration_ns = time.monotonic_ns() - started

    def _absolute(self, deltas: dict[str, Delta], ledger: Ledger, cache: TwoGenerations) -> Tallies:
        """Fill counts, rows and new_names; returns the tallies after this flush."""
        moved: dict[str, int] = defaultdict(int)
        names = sorted_in_pieces(deltas)
        for at in range(0, len(names), NAMES_PER_LOAD):
            some = names[at : at + NAMES_PER_LOAD]
            bases = {name: base for name in some if (base := cache.peek(name)) is not None}
            cold = [name for name in some if name not in bases] if len(bases) < len(some) else []
            if cold:
                bases |= ledger.load(cold)
            for name in some:
                delta = deltas[name]
                base = bases.get(name, 0)
                delivered, bounced = unpack(base)
                if base == 0:
                    self.new_names.add(name)
                else:
                    moved[status(delivered, bounced, ledger.threshold)] -= 1
                delivered += delta.delivered
                bounced += delta.bounced
                moved[status(delivered, bounced, ledger.threshold)] += 1
                self.counts[name] = pack(delivered, bounced)
                self.rows.append(
                    (name, delivered, bounced, delta.first_at, delta.last_delivered_at, delta.last_bounced_at)
                )
        return ledger.meta.tallies + Tallies(moved["catch-all"], moved["not-catch-all"], moved["unknown"])


def sorted_in_pieces(deltas: dict[str, Delta]) -> list[str]:
    """The names in order. Sorted by their first two characters first: one sort of all would hold the interpreter."""
    buckets: dict[str, list[str]] = defaultdict(list)
    for name in deltas:
        buckets[name[:2]].append(name)
    names: list[str] = []
    for start in sorted(buckets):
        bucket = buckets[start]
        bucket.sort()
        names += bucket
    return names
