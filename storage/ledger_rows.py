"""What a ledger holds beside the counts of domains, and the checks that tell damaged rows from true ones. Pure."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import xor

HeldId = tuple[bytes, bytes | None, int]  # hash, the digest of its request if it is a key, service seconds when it came
_COUNTS = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True)
class Tallies:
    catch_all: int = 0
    not_catch_all: int = 0
    unknown: int = 0

    def __add__(self, other: Tallies) -> Tallies:
        return Tallies(
            self.catch_all + other.catch_all, self.not_catch_all + other.not_catch_all, self.unknown + other.unknown
        )


@dataclass(frozen=True, slots=True)
class Position:
    consumed: int
    clock: int
    finished: bool = False  # nothing follows, so the file may be gone


@dataclass(frozen=True, slots=True)
class IdChanges:
    """What a flush changes in the table of ids.

    gone   rows that are there; a hash of them may be new again, with another age
    new    rows whose hashes are not there, or among those that go
    """

    new: Sequence[HeldId] = ()
    gone: Sequence[HeldId] = ()
    service_seconds: int = 0


def check_of(name: str, delivered: int, bounced: int, flush: int) -> int:
    """The `chk` of a row: what tells a damaged count from a true one."""
    return zlib.crc32(_COUNTS.pack(delivered, bounced, flush), zlib.crc32(name.encode()))


def check_holds(name: object, delivered: object, bounced: object, flush: object, chk: object) -> bool:
    """Whether a row is what was written, whatever its columns hold."""
    try:
        return chk == check_of(name, delivered, bounced, flush)  # type: ignore[arg-type]
    except (struct.error, TypeError, AttributeError):
        return False


def check_of_values(*values: object) -> int:
    return zlib.crc32("\0".join(map(str, values)).encode())


def is_id(hash: object, digest: object, age: object) -> bool:
    return isinstance(hash, bytes) and isinstance(digest, bytes | None) and isinstance(age, int)


def check_of_ids(ids: Iterable[HeldId]) -> int:
    """The xor of the checks of rows of `id`: for those that come as for those that go."""
    return reduce(xor, (zlib.crc32(b"%b%b%d" % (hash, digest or b"", age)) for hash, digest, age in ids), 0)


def check_of_positions(positions: Mapping[str, Position]) -> int:
    """The xor of the checks of all rows of `segment`: in whichever order they are read."""
    return reduce(xor, (check_of_values(name, p.consumed, p.clock, int(p.finished)) for name, p in positions.items()), 0)
