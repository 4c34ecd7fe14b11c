"""Rows of a ledger that are not what was written: each is said in the log once, and kept as it was found.

    rows.corrupt    beside the ledger; a JSON line for each row: when, name and all columns that a check covers

The row stays in the ledger and its counts are served as they are, since nobody knows better ones: the next flush of the name
goes on from them. The file is what keeps the service degraded until a person has looked at it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

log = logging.getLogger("catchall.ledger")

NAMES_MAX = 1000  # said and kept by one process; what is beyond is only counted
COUNT_MAX = 1 << 62  # no count ever gets there; twice it does not fit into a ledger


class DamagedRows:
    """found  how many names this process found damaged"""

    def __init__(self, ledger: Path) -> None:
        self._path = ledger.with_name("rows.corrupt")
        self._ledger = ledger
        self._names: set[str] = set()
        self.found = 0

    def note(self, row: Sequence[object]) -> None:
        """row  name, delivered, bounced, flush, chk, whatever they are"""
        name = repr(row[0])
        if name in self._names:
            return
        self.found += 1
        if len(self._names) >= NAMES_MAX:
            return
        self._names.add(name)
        log.error("%s: the row of %s is damaged: delivered %r, bounced %r, flush %r do not match their check. It is served as "
                  "it is, and noted in %s", self._ledger, name, *row[1:4], self._path.name)  # fmt: skip
        line = {"at": int(time.time()), "name": name, "delivered": row[1], "bounced": row[2], "flush": row[3], "chk": row[4]}
        try:
            with open(self._path, "ab") as file:
                file.write(msgspec.json.encode(line, enc_hook=repr) + b"\n")
        except OSError as error:
            log.error("%s could not be written: %s", self._path, error)


def usable(count: object) -> int:
    """What a count that failed its check is served as: itself if it can be one at all, else 0."""
    return count if isinstance(count, int) and 0 <= count <= COUNT_MAX else 0
