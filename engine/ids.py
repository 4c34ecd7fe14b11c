"""What makes a resend count once: the ids of one partition that were counted, an exact set with a bounded window. Pure.

Event id    of an event that its sender gave an `id`: a hash of that, the kind and the name, so that one message id may serve
            for a delivery and for a bounce.
Key         an Idempotency-Key. Its line, with a digest of the whole request, goes to the partition that the key's own hash
            names; the first digest recorded there is the one that holds. Only then are the request's events recorded, each
            with an id made of key, digest and its index, so that a repeat counts whatever part of it was not counted before.
Decided     in the drain and nowhere else: lines of one partition are read by one process, one after the other. What was
            decided since a cut is durable together with the counts and positions of that cut, or not at all.
Window      an id is forgotten `window_s` seconds after it came, or earlier when the partitions of its shard together hold more
            than a given number (`forget_oldest`). Seconds are those that the partition was in service: they do not grow while
            it is down, nor jump with the wall clock.
Repeats     for each segment the offsets of the lines that were repeats, so that who wrote them can ask how many there were.
"""

from __future__ import annotations

import bisect
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import merge
from itertools import islice, takewhile

from catchall.engine import lines
from catchall.storage.ledger_rows import HeldId, IdChanges

ID_BYTES = 16
INDEX_DIGITS = 8
OUTDATED_MAX = 20_000  # forgotten at one cut: about 10 ms
REPEATS_MAX = 1 << 16  # remembered of one segment


def event_id(given: str, sign: bytes, name: bytes) -> bytes:
    """The id, in hex digits, of an event to which its sender gave an id. `name` is in normal form, which has no NUL."""
    return blake2b(b"%b%b\0%b" % (sign, name, given.encode()), digest_size=ID_BYTES, person=b"event").hexdigest().encode()


def key_id(given: bytes) -> bytes:
    """The hash of an Idempotency-Key, in hex digits."""
    return blake2b(given, digest_size=ID_BYTES, person=b"key").hexdigest().encode()


def request_digest(content: bytes) -> bytes:
    """What tells the request of a key from any other request, in hex digits."""
    return blake2b(content, digest_size=ID_BYTES, person=b"request").hexdigest().encode()


def ids_of_request(key: bytes, digest: bytes) -> Callable[[int], bytes]:
    """index -> the id, in hex digits, of that event of a request with a key."""
    start = blake2b(key + digest, digest_size=ID_BYTES, person=b"index").hexdigest().encode()[:-INDEX_DIGITS]
    return lambda index: b"%b%08x" % (start, index)


@dataclass(frozen=True, slots=True)
class IdCut:
    """What a flush makes durable, and how many events were repeats since the last one."""

    changes: IdChanges
    repeats: int


class Ids:
    """The ids that one partition holds.

    held             what the ledger knows, oldest first
    service_seconds  what the ledger says of them
    clock            monotonic seconds
    """

    def __init__(
        self, held: Iterable[HeldId], service_seconds: int, *, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        plain: dict[int, tuple[int, bytes | None]] = {}  # one entry for all ids of a second, as `count` makes them
        self._held: dict[bytes, tuple[int, bytes | None]] = {
            hash: plain.setdefault(age, (age, None)) if digest is None else (age, digest) for hash, digest, age in held
        }
        self._window_s, self._clock = window_s, clock
        self._start = clock() - service_seconds
        self._new: list[HeldId] = []
        self._forgotten: list[HeldId] = []
        self._repeats = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def service_seconds(self) -> int:
        return int(self._clock() - self._start)

    @property
    def oldest_s(self) -> int:
        """How many seconds ago the oldest id that is held came; 0 if none is."""
        for came, _ in self._held.values():
            return max(0, self.service_seconds - came)
        return 0

    def count(self, chunk: bytes, at: int, repeats: Repeats) -> bytes:
        """Take the ids out of whole lines: new ones are held from now on, and lines whose id is held are left out.

        at       offset of the chunk in its segment's payload
        repeats  of that segment
        """
        kept: list[bytes] = []
        age = self.service_seconds
        entry = (age, None)
        for line in chunk.split(b"\n"):
            sign = line[:1]
            if sign == lines.KEY:
                if self._claim(line, age):
                    at += len(line) + 1
                    continue
            elif lines.ID in line:
                event, _, digits = line.partition(b" #")
                hash = lines.id_of(digits)
                if hash is not None:
                    if hash in self._held:
                        parsed = lines.parse(event)
                        repeats.add(at, 0 if parsed is None else parsed[1])
                        self._repeats += 0 if parsed is None else parsed[1]
                        at += len(line) + 1
                        continue
                    self._held[hash] = entry
                    self._new.append((hash, None, age))
                    at += len(line) + 1
                    kept.append(event)
                    continue
            at += len(line) + 1
            kept.append(line)
        return b"\n".join(kept)

    def _claim(self, line: bytes, age: int) -> bool:
        """Hold the key of a `=` line, unless it is held. False: it is no such line."""
        key, _, digest = line[1:].partition(b" ")
        hash, content = lines.id_of(key), lines.id_of(digest)
        if hash is None or content is None:
            return False
        if hash not in self._held:
            self._held[hash] = (age, content)
            self._new.append((hash, content, age))
        return True

    def digest_of(self, key: bytes) -> bytes | None:
        """The digest (16 bytes) for which a key (16 bytes) was first used; None if it is not held."""
        entry = self._held.get(key)
        return None if entry is None else entry[1]

    # ---- flush

    @property
    def pending(self) -> int:
        """How many ids came since the last cut."""
        return len(self._new)

    @property
    def dirty(self) -> bool:
        """Whether a cut would have something to save."""
        return bool(self._new or self._forgotten or self._repeats)

    def cut(self) -> IdCut:
        """What came and what goes, as of now. Ids whose time is over are forgotten here, so many at a time."""
        held = self._held
        seconds = self.service_seconds
        outdated = takewhile(lambda hash: seconds - held[hash][0] > self._window_s, held)
        self._forget(islice(outdated, OUTDATED_MAX))
        new, gone = self._new, self._forgotten
        if new and gone and not set(new).isdisjoint(gone):  # some came and went, or went and came, within one second
            came, went = Counter(new), Counter(gone)
            new, gone = list((came - went).elements()), list((went - came).elements())
        cut = IdCut(IdChanges(new, gone, seconds), self._repeats)
        self._new, self._forgotten, self._repeats = [], [], 0
        return cut

    def uncut(self, cut: IdCut) -> None:
        """The flush of that cut did not happen: what it had to save is to be saved by the next one."""
        self._new = [*cut.changes.new, *self._new]
        self._forgotten = [*cut.changes.gone, *self._forgotten]
        self._repeats += cut.repeats

    def ages(self, place: int) -> Iterator[tuple[int, int]]:
        """(minus how many seconds ago it came, place) of every id that is held, oldest first."""
        seconds = self.service_seconds
        return ((came - seconds, place) for came, _ in self._held.values())

    def forget_first(self, number: int) -> None:
        """Forget the oldest so many ids."""
        self._forget(islice(self._held, number))

    def _forget(self, hashes: Iterable[bytes]) -> None:
        for hash in list(hashes):
            came, digest = self._held.pop(hash)
            self._forgotten.append((hash, digest, came))


def forget_oldest(partitions: Sequence[Ids], number_max: int) -> None:
    """Have the partitions of a shard hold no more than so many ids together: the oldest go first, wherever they are."""
    surplus = sum(map(len, partitions)) - number_max
    if surplus > 0:  # one pass: each look at the oldest of a dict steps over all that were taken from its front before
        oldest = islice(merge(*(ids.ages(place) for place, ids in enumerate(partitions))), surplus)
        for place, number in Counter(place for _, place in oldest).items():
            partitions[place].forget_first(number)


def window_held(partitions: Sequence[Ids], number_max: int, window_s: float) -> float:
    """A repeat of what came less than so many seconds ago is recognised for sure."""
    if sum(map(len, partitions)) < number_max:
        return window_s
    return min(window_s, max(ids.oldest_s for ids in partitions))


class Repeats:
    """Which lines of one segment were repeats.

    start   payload offset from which this is known
    """

    __slots__ = ("_counts", "_offsets", "start")

    def __init__(self, start: int) -> None:
        self.start = start
        self._offsets, self._counts = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, offset: int, count: int) -> None:
        if len(self._offsets) >= REPEATS_MAX:
            half = REPEATS_MAX // 2
            self.start = self._offsets[half]
            del self._offsets[:half], self._counts[:half]
        self._offsets.append(offset)
        self._counts.append(count)

    def between(self, start: int, end: int) -> int | None:
        """How many events of the lines in payload[start:end] were repeats; None if that is not known any more."""
        if start < self.start:
            return None
        return sum(self._counts[bisect.bisect_left(self._offsets, start) : bisect.bisect_left(self._offsets, end)])
