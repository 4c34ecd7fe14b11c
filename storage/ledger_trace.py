"""What is known about a partition's ledger outside of it: which one it is, how far it got. A line in the partition's `lock`.

    uuid 32 hex digits, flush 20 digits, crc32 of the line before it 8 hex digits

The ledger alone cannot tell that it was emptied, deleted, put back from an older copy, or that SQLite left out the end of a
damaged -wal: each looks like a ledger that did not get so far. So every commit notes its number here before anything acts
on it.

Only the first note of a ledger is synced. Later ones are visible to the next process, whatever dies; a power cut may leave
an older number, which proves less and is never wrong.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

_SIZE = len(f"uuid {0:032x} flush {0:020d} crc {0:08x}\n")


@dataclass(frozen=True, slots=True)
class Noted:
    """uuid  of the ledger; "" if the note cannot be read: there was a ledger, and no more is known"""

    uuid: str
    flush: int


def read(fd: int) -> Noted | None:
    """The note in an open `lock` file. None: there never was a ledger."""
    line = os.pread(fd, _SIZE + 1, 0)
    if not line:
        return None
    body, _, crc = line.decode("ascii", "replace").rstrip("\n").rpartition(" crc ")
    words = body.split(" ")
    if len(line) != _SIZE or len(words) != 4 or crc != f"{zlib.crc32(body.encode()):08x}":
        return Noted("", 0)
    return Noted(words[1], int(words[3]))


class Trace:
    """Notes the commits of one ledger. The descriptor belongs to the caller."""

    def __init__(self, fd: int, uuid: str) -> None:
        self._fd, self._uuid = fd, uuid

    def note(self, flush: int) -> None:
        """Raises OSError."""
        body = f"uuid {self._uuid} flush {flush:020d}"
        os.pwrite(self._fd, f"{body} crc {zlib.crc32(body.encode()):08x}\n".encode(), 0)

    def begin(self, flush: int) -> None:
        """The first note of a ledger that was just opened: durable. Raises OSError."""
        self.note(flush)
        os.ftruncate(self._fd, _SIZE)
        os.fsync(self._fd)
