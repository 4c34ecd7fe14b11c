"""Counts that are not in the ledger yet: what a partition's lines said since the last cut. Pure.

Lines are counted at C speed straight into a dict {sign + name: count}, one dict a second of the writers' clocks, so that the
times of a domain's first and last events come out exact to the second and cost the counting nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from catchall.engine import lines
from catchall.storage.counts import ONE_BOUNCED

_Count = Callable[[dict[bytes, int], Iterable[bytes]], None]
try:
    from collections import _count_elements  # type: ignore[attr-defined]  # what Counter.update calls, without the overhead

    count_elements: _Count = _count_elements
except ImportError:  # pragma: no cover

    def count_elements(counts: dict[bytes, int], elements: Iterable[bytes]) -> None:
        for element, n in Counter(elements).items():
            counts[element] = counts.get(element, 0) + n


class Delta:
    """What one flush adds to one domain."""

    __slots__ = ("bounced", "delivered", "first_at", "last_bounced_at", "last_delivered_at")

    def __init__(self, first_at: int) -> None:
        self.delivered = self.bounced = self.last_delivered_at = self.last_bounced_at = 0
        self.first_at = first_at


class Pending:
    """The counts of one partition since one cut.

    bad_lines   lines with a count that were no events: skipped. Those without one are found by `fold`.
    """

    __slots__ = ("_by_second", "bad_lines", "bounced", "delivered")

    def __init__(self) -> None:
        self._by_second: dict[int, dict[bytes, int]] = {}
        self.bad_lines = 0

    def __bool__(self) -> bool:
        return bool(self._by_second)

    @property
    def names(self) -> int:
        """About how many names are held: one that both delivered and bounced, or over several seconds, counts again."""
        return sum(map(len, self._by_second.values()))

    def count(self, chunk: bytes, clock: int) -> int:
        """Count whole lines, the last newline included; `clock` is the second before them. Returns the second after them."""
        start = 0
        while (at := chunk.find(lines.CLOCK, start)) >= 0:
            end = chunk.find(b"\n", at)
            second = lines.clock_of(chunk[at:end])
            line_start = chunk.rfind(b"\n", start, at) + 1 or start
            if line_start != at or second is None:  # an @ within a line, or no number behind it
                self._count(chunk[start:line_start], clock)
                self.bad_lines += 1
            else:
                self._count(chunk[start:at], clock)
                clock = second
            start = end + 1
        self._count(chunk[start:], clock)
        return clock

    def _count(self, chunk: bytes, clock: int) -> None:
        if not chunk:
            return
        counts = self._by_second.setdefault(clock, {})
        events = chunk[:-1].split(b"\n")
        if b" " in chunk:
            for line in events:
                if b" " in line:
                    if (parsed := lines.parse(line)) is None:
                        self.bad_lines += 1
                    else:
                        counts[parsed[0]] = counts.get(parsed[0], 0) + parsed[1]
            events = [line for line in events if b" " not in line]
        count_elements(counts, events)

    def get(self, name: bytes) -> int:
        """The packed counts of one name."""
        delivered = bounced = 0
        for counts in self._by_second.values():
            delivered += counts.get(lines.DELIVERED + name, 0)
            bounced += counts.get(lines.BOUNCED + name, 0)
        return delivered + bounced * ONE_BOUNCED

    def merge(self, other: Pending) -> None:
        """Take over the counts of a cut whose flush did not happen."""
        for second, counts in other._by_second.items():
            mine = self._by_second.setdefault(second, {})
            for key, n in counts.items():
                mine[key] = mine.get(key, 0) + n

    def fold(self) -> tuple[dict[str, Delta], int]:
        """({name: Delta}, lines that were no events). A plain loop, so that other threads get their turn."""
        deltas: dict[str, Delta] = {}
        bad = 0
        for second in sorted(self._by_second):
            for key, n in self._by_second[second].items():
                sign = key[:1]
                name = key[1:].decode("ascii", "replace")
                delta = deltas.get(name)
                if delta is None:
                    if lines.parse(key) is None:
                        bad += n
                        continue
                    delta = deltas[name] = Delta(second)
                if sign == lines.DELIVERED:
                    delta.delivered += n
                    delta.last_delivered_at = second
                elif sign == lines.BOUNCED:
                    delta.bounced += n
                    delta.last_bounced_at = second
                else:
                    bad += n
                    continue
                delta.first_at = delta.first_at or second
        return deltas, bad

    def known_names(self) -> Iterator[bytes]:
        """The names that `fold` would count, each once."""
        seen: set[bytes] = set()
        for counts in self._by_second.values():
            for key in counts:
                if key[1:] not in seen and lines.parse(key) is not None:
                    seen.add(key[1:])
                    yield key[1:]
