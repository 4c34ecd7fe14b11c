"""What a host of the model was sent, and the books of it: which events may be counted, and which must be.

Books        For every name: acknowledged <= counted <= sent, for reads, ledgers and tallies. `sent` is what was acknowledged
             and what is ambiguous: its writer died, or its sync failed, before the answer. No power cut may take what was
             `synced` or, the highest count that was committed, what was `kept`; `seen` is the highest that a read returned.
Ids          An event with an id is in a book once, however often it is sent: so where all that was sent is acknowledged at
             last, the two bounds meet, and counted is exactly that. Of ONCE, the names that have no other events, the ledger
             counts at any time what the ids stand for that it holds. No power cut takes one without the other.
Keys         What was once said to be a key's request is said again. Of the others that use it nothing may be counted: their
             events are in no book. The limit of it: of several requests with one key, an owner that dies before it has
             committed which one it is (`loose`) may be followed by one that reads their lines in another order (`changed`).
Forgotten    An id that the window let go may count again. Requests with one are not sent again, and its count stays.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from catchall.engine import lines
from catchall.engine.ids import event_id, ids_of_request, key_id, request_digest
from catchall.engine.rules import partition_of

PARTITIONS = 2
ONCE = ["once0.example", "once1.example"]  # all events of these have ids
NAMES = [f"n{i}.example" for i in range(6)] + ONCE
NAMES_OF = [[name for name in NAMES if partition_of(name.encode(), PARTITIONS) == p] for p in range(PARTITIONS)]

Event = tuple[int, str, int]  # which name, "+" or "-", count
Key = tuple[str, str]  # name, "+" or "-"


class Line(NamedTuple):
    """One line of a request. `id` is none if it counts every time it is recorded."""

    text: bytes
    key: Key
    count: int
    id: bytes | None


@dataclass(frozen=True)
class Claim:
    """The Idempotency-Key of a request, and the digest of it: in hex digits."""

    key: bytes
    digest: bytes

    @property
    def partition(self) -> int:
        return int(self.key, 16) % PARTITIONS

    @property
    def line(self) -> bytes:
        return lines.key_line(self.key, self.digest)

    @property
    def held(self) -> tuple[bytes, bytes]:
        return bytes.fromhex(self.key.decode()), bytes.fromhex(self.digest.decode())


@dataclass(frozen=True)
class Request:
    parts: dict[int, list[Line]]  # by partition
    claim: Claim | None = None

    @property
    def blobs(self) -> dict[int, bytes]:
        return {p: b"".join(line.text for line in part) for p, part in self.parts.items()}

    @property
    def events(self) -> set[bytes]:
        """Ids of them."""
        return {line.id for part in self.parts.values() for line in part if line.id is not None}

    @property
    def hashes(self) -> set[bytes]:
        return self.events if self.claim is None else {*self.events, self.claim.held[0]}


def request(events: list[Event]) -> Request:
    """One without ids. Some requests fill segments."""
    parts: dict[int, list[Line]] = {}
    for which, sign, count in events:
        name = NAMES[which].encode()
        line = Line(lines.encode(sign.encode(), name, count), (NAMES[which], sign), count, None)
        parts.setdefault(partition_of(name, PARTITIONS), []).extend([line] * (30 if which % 2 else 1))
    return Request(parts)


def request_with_ids(events: list[Event], number: int, key: int | None) -> Request:
    """The same, with an id for every line: of its own, or made from a key that other requests may use too.

    number  differs from that of every other request
    """
    claim = None if key is None else Claim(key_id(b"%d" % key), request_digest(b"%d" % number))
    id_of = None if claim is None else ids_of_request(claim.key, claim.digest)
    parts: dict[int, list[Line]] = {}
    index = 0
    for which, sign, count in events:
        name, kind = NAMES[which].encode(), sign.encode()
        for _ in range(30 if which % 2 else 1):
            digits = event_id(f"{number} {index}", kind, name) if id_of is None else id_of(index)
            text = lines.with_id(lines.encode(kind, name, count), digits)
            line = Line(text, (NAMES[which], sign), count, bytes.fromhex(digits.decode()))
            parts.setdefault(partition_of(name, PARTITIONS), []).append(line)
            index += 1
    return Request(parts, claim)


class Book:
    """Events: those with an id once, all others as often as they are written down."""

    def __init__(self) -> None:
        self.counts: Counter[Key] = Counter()
        self.ids: dict[bytes, Line] = {}

    def add(self, part: Iterable[Line]) -> None:
        for line in part:
            if line.id is None:
                self.counts[line.key] += line.count
            elif line.id not in self.ids:
                self.ids[line.id] = line
                self.counts[line.key] += line.count

    def begin_anew(self, counted: Counter[Key], ids: dict[bytes, Line]) -> None:
        """The ids are in these counts already."""
        self.counts, self.ids = Counter(counted), dict(ids)


class Books:
    def __init__(self) -> None:
        self.acknowledged, self.sent, self.synced = Book(), Book(), Book()
        self.kept: Counter[Key] = Counter()
        self.seen: Counter[Key] = Counter()
        self.kept_ids: set[bytes] = set()  # a commit that returned holds them
        self.keys: dict[bytes, bytes] = {}  # key -> digest, as it was told
        self.claims: dict[bytes, set[bytes]] = {}  # key -> digests that were recorded for it
        self.loose: set[bytes] = set()
        self.changed: set[bytes] = set()
        self.forgotten: set[bytes] = set()  # of what was counted, whether a ledger holds it or not
        self.without: Counter[Key] = Counter()  # what was counted and has no id any more

    def check(self, counted: Counter[Key], least: Counter[Key], who: str, names: list[str]) -> None:
        most = self.sent.counts
        for key in ((name, sign) for name in names for sign in "+-"):
            assert least[key] <= counted[key] <= most[key], f"{who}: {least[key]} <= {counted[key]} <= {most[key]} of {key}"

    def claim(self, key: bytes, digest: bytes) -> None:
        """A line is recorded, whatever comes of it."""
        self.claims.setdefault(key, set()).add(digest)

    def tell(self, key: bytes, digest: bytes | None) -> None:
        """What a key is said to stand for, after all that was published was drained; or what a ledger holds of it."""
        assert digest in self.claims[key], "a key that was recorded is known, and stands for a request that used it"
        if key in self.loose and self.keys[key] != digest:
            self.keys[key] = digest
            self.changed.add(key)
        self.loose.discard(key)
        assert self.keys.setdefault(key, digest) == digest, "a key stands for one request"

    def check_ids(self, held: dict[bytes, bytes | None], counted: Counter[Key], names: list[str], cut: bool = False) -> None:
        """What a partition holds when everything is flushed, beside what it counted.

        cut  the power was: what was forgotten shortly before may be counted or not
        """
        events = {hash for hash, digest in held.items() if digest is None}
        assert events <= self.sent.ids.keys(), "an id that was never recorded"
        for key, digest in held.items():
            if digest is not None and not cut:
                self.tell(key, digest)
        least, most = self._standing_for(events), self._standing_for(events | self.forgotten)
        for key in ((name, sign) for name in names if name in ONCE for sign in "+-"):
            told = f"{counted[key]} of {key} are counted, and ids are held for {least[key]} to {most[key]}"
            assert (least if cut else most)[key] <= counted[key] <= most[key], told

    def _standing_for(self, ids: set[bytes]) -> Counter[Key]:
        counts = Counter(self.without)
        for hash in ids & self.sent.ids.keys():
            counts[self.sent.ids[hash].key] += self.sent.ids[hash].count
        return counts

    def begin_anew(self, counted: Counter[Key], held: dict[bytes, bytes | None], always: bool) -> None:
        """After a power cut: what it took is gone for good, and what it left stays."""
        assert self.kept_ids - self.forgotten <= held.keys(), "an id that was committed is gone"
        if always:
            assert self.acknowledged.ids.keys() - self.forgotten <= held.keys(), "an id that was acknowledged is gone"
            told = self.keys.keys() - self.forgotten - self.loose
            assert all(held.get(key) == self.keys[key] for key in told), "a key that was told stands for another request"
        self.loose = set()
        self.keys = {key: digest for key, digest in held.items() if digest is not None}
        ids = {hash: self.sent.ids[hash] for hash, digest in held.items() if digest is None}
        for book in (self.acknowledged, self.sent, self.synced):
            book.begin_anew(counted, ids)
        self.kept, self.seen = Counter(counted), Counter(counted)
        self.kept_ids, self.forgotten, self.without = set(held), set(), Counter()
        self.without = counted - self._standing_for(set(held))
