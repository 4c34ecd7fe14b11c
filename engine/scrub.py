"""Reads all rows of a partition's ledger once after each start, in small pieces when there is time, and checks them.

A row whose check fails is found when it is read; a row that cannot be reached any more, because a page of the tree lost it, is
not: its name would silently count from 0. So the rows are counted too, and at the end there must be as many as the tallies
say. Rows that a flush adds meanwhile are counted if they lie in the part that was read already; the rest is still to be read.
With a copy in MongoDB a ledger that lost rows is set aside as damaged; else it is used, and a note says how many there were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from catchall.engine.ledger_opening import leave_note
from catchall.storage.ledger_failures import LedgerDamaged

if TYPE_CHECKING:
    from catchall.engine.partition import Partition

log = logging.getLogger("catchall.partition")

ROWS_PER_STEP = 300  # about half a millisecond


class Scrub:
    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._name: str | None = ""  # all rows up to here were read; None: all rows
        self._rows = 0  # how many there are up to there

    def step(self) -> bool:
        """Read the next piece, unless a flush or a commit is under way. False: all is done. Raises LedgerDamaged."""
        partition = self._partition
        if self._name is not None and partition.flight is None and not partition.ledger.in_commit:
            rows, self._name = partition.ledger.verify(self._name, ROWS_PER_STEP)
            self._rows += rows
            if self._name is None:
                self._compare()
        return self._name is not None

    def note_new(self, names: Iterable[str]) -> None:
        """A flush has added rows of these names."""
        if self._name is not None:
            done = self._name
            self._rows += sum(name <= done for name in names)

    def _compare(self) -> None:
        ledger = self._partition.ledger
        tallies = ledger.meta.tallies
        total = tallies.catch_all + tallies.not_catch_all + tallies.unknown
        if self._rows != total:
            what = f"{self._rows} domains can be read, its tallies say {total}"
            if self._partition.copied:  # MongoDB holds more of the lost ones than what would be counted from now on
                raise LedgerDamaged(ledger.path, what)
            what = f"{ledger.path}: {what}; those that are lost count from 0"
            log.error("%s", what)
            leave_note(ledger.path.parent, "rows-lost", what)
