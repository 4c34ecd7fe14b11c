"""What goes wrong with a ledger's file, in the three words that callers act on: damaged, full, or anything else: in doubt."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What SQLite's primary result codes say about a failed statement; the statements themselves are right, the rest is the file.
_FULL = sqlite3.SQLITE_FULL
# SQLite says FULL only where a write met ENOSPC. A quota, or a file that cannot be made or grown, comes as one of these.
_PERHAPS_FULL = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})
_PROBE_BYTES = 1 << 20
_DAMAGED = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG}
)
_UNREADABLE = frozenset({sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS})


class LedgerDamaged(Exception):
    """The file is no ledger, is damaged, or belongs to another folder or partition. It must be set aside and begun anew."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path


class LedgerFull(Exception):
    """The disk is full. The transaction was rolled back: nothing of it happened."""


@contextlib.contextmanager
def failures_explained(path: Path, opening: bool = False, outcome_known: bool = True) -> Iterator[None]:
    """opening        the schema is read now, so a statement that does not fit it is damage; later it would be a mistake of ours
    outcome_known  whether a statement that failed has changed nothing for good: not so for a COMMIT, unless it says FULL
    """
    try:
        yield
    except UnicodeDecodeError as error:  # of a message of SQLite's that quotes what it found
        raise LedgerDamaged(path, f"what it holds is no text: {error}") from error
    except sqlite3.DatabaseError as error:
        code: int | None = getattr(error, "sqlite_errorcode", None)
        if code is None:  # not SQLite's: text that is no UTF-8 is damage, the use of a closed connection is not
            if isinstance(error, sqlite3.OperationalError):
                raise LedgerDamaged(path, str(error)) from error
            raise
        primary = code & 0xFF
        if primary == _FULL or (primary in _PERHAPS_FULL and outcome_known and _disk_is_full(path.parent)):
            raise LedgerFull(f"{path}: {error}") from error
        # A damaged header can say "read-only"; a file that really is stays where it is.
        unwritable = primary == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK)
        if primary in _DAMAGED or code in _UNREADABLE or unwritable or (opening and primary == sqlite3.SQLITE_ERROR):
            raise LedgerDamaged(path, str(error)) from error
        raise


def _disk_is_full(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, _PROBE_BYTES)
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False
