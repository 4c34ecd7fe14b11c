"""What requests were told, and whether the counts agree with it.

A request is acknowledged (200), refused (an answer that says nothing was recorded, or no connection), or ambiguous: no answer,
or one that says its events may count. So for every domain and kind: acknowledged <= counted <= acknowledged + ambiguous.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from catchall.tools.drill_client import KINDS, Client

Key = tuple[str, str]  # domain, kind
ACKNOWLEDGED, REFUSED, AMBIGUOUS = "acknowledged", "refused", "ambiguous"


class Mismatch(NamedTuple):
    domain: str
    kind: str
    acknowledged: int
    ambiguous: int
    counted: int

    @property
    def lost(self) -> int:
        return max(0, self.acknowledged - self.counted)

    @property
    def doubled(self) -> int:
        return max(0, self.counted - self.acknowledged - self.ambiguous)

    def __str__(self) -> str:
        return f"{self.domain} {self.kind}: {self.acknowledged} + {self.ambiguous} unsure, {self.counted} counted"


class Record:
    """All requests of a drill. Any thread may note."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.acknowledged: Counter[Key] = Counter()
        self.ambiguous: Counter[Key] = Counter()
        self.requests: Counter[str] = Counter()  # by outcome
        self.last_refusal = "none"
        self.strange: list[str] = []  # answers that must not be
        self._lock = threading.Lock()

    def note(self, outcome: str, events: Sequence[Key]) -> None:
        with self._lock:
            self.requests[outcome] += 1
            if outcome == ACKNOWLEDGED:
                self.acknowledged.update(events)
            elif outcome == AMBIGUOUS:
                self.ambiguous.update(events)

    def least(self, name: str) -> tuple[int, int]:
        """What a read that is sent from now on must show at least."""
        with self._lock:
            return self.acknowledged[name, KINDS[0]], self.acknowledged[name, KINDS[1]]

    def mismatches(self, counts: Mapping[str, tuple[int, int]]) -> list[Mismatch]:
        """Where {name: (delivered, bounced)} is not what the answers promised. While nobody writes."""
        found = [
            Mismatch(name, kind, self.acknowledged[name, kind], self.ambiguous[name, kind], counted)
            for name in self.names
            for kind, counted in zip(KINDS, counts[name], strict=True)
        ]
        return [mismatch for mismatch in found if mismatch.lost or mismatch.doubled]

    def counted(self, client: Client) -> dict[str, tuple[int, int]]:
        """{name: (delivered, bounced)} as the service says it of every name. Raises TimeoutError."""
        found = {name: client.read(f"/domains/{name}") for name in self.names}
        return {name: (domain["delivered"], domain["bounced"]) for name, domain in found.items()}


def verdict(mismatches: Sequence[Mismatch], ambiguous: int) -> str:
    """The last line of a drill, in events."""
    lost, doubled = sum(mismatch.lost for mismatch in mismatches), sum(mismatch.doubled for mismatch in mismatches)
    return f"lost={lost} doubled={doubled} ambiguous={ambiguous}"
