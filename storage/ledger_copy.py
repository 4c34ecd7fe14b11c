"""Look into a ledger that must not be touched: in a copy of it and its -wal, so that what SQLite puts right is put right there.

Opening a ledger in place would commit, checkpoint and remove its -wal; opening it read-only leaves out what only the -wal has.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from catchall.storage.ledger import meta_row
from catchall.storage.ledger_failures import LedgerDamaged


@contextlib.contextmanager
def copied(path: Path, room: Path | None = None) -> Iterator[Path]:
    """A copy of a ledger for the time of the block. room: where, else the system's folder for such. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix="catchall-", dir=room) as folder:
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            if source.exists():
                shutil.copyfile(source, Path(folder) / source.name)
        yield Path(folder) / path.name


def identity_of(path: Path) -> tuple[str, int]:
    """(host id, partitions) that a ledger says it belongs to. Raises LedgerDamaged, OSError."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as db:
            row = meta_row(db, path)
    except (LedgerDamaged, sqlite3.Error):  # a young one has everything in its -wal
        with copied(path) as copy, contextlib.closing(sqlite3.connect(copy)) as db:
            row = meta_row(db, path)
    return row[2], row[5]
