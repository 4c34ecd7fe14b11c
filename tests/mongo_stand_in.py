"""MongoDB in memory, for tests that stop a push at any step: the meaning of MongoCopy without its server.

A MemoryServer is what a majority holds; any number of MemoryCopies write to it, each the copy of one process. What it means
to claim, send and advance is checked against the real thing by test_copy_contract.py, which runs on both.

    MemoryCopy(server, at)    `at(point)` is called at each of POINTS. It may raise: Died, when the process ends there, or
                              MongoUnavailable, when the answer does not come; what was applied before stays applied.
    server.spoil(name)        rows of that name are refused from now on, as a document of another shape would make it
"""

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any

from catchall.engine import push as engine
from catchall.engine.partition import Partition
from catchall.storage.counts import Row
from catchall.storage.mongodb import Fence, PushFailed

POINTS = ("claim", "claimed", "send", "half sent", "sent", "advance", "advanced")

Document = dict[str, Any]


def nothing(_: str) -> None:
    """What happens at a point of a push that is left in peace."""


class MemoryServer:
    """documents: {name: {field: ...}}; fences: {"component/PP": {"component", "claim", "flush"?}}."""

    def __init__(self) -> None:
        self.documents: dict[str, Document] = {}
        self.fences: dict[str, Document] = {}
        self._spoiled: set[str] = set()

    def spoil(self, name: str) -> None:
        self._spoiled.add(name)

    def mend(self, name: str) -> None:
        self._spoiled.discard(name)

    def snapshot(self) -> tuple[dict[str, Document], dict[str, Document]]:
        return copy.deepcopy((self.documents, self.fences))

    def restore(self, snapshot: tuple[dict[str, Document], dict[str, Document]]) -> None:
        """Everything is as it was then, claims included."""
        self.documents, self.fences = copy.deepcopy(snapshot)

    def merge(self, row: Row, component: str) -> bool:
        """One row of an unordered write. False: refused."""
        name, delivered, bounced, first_at, last_delivered_at, last_bounced_at = row
        if name in self._spoiled:
            return False
        document = self.documents.setdefault(name, {})
        for field, count in (("delivered", delivered), ("bounced", bounced)):
            if count:
                shares = document.setdefault(field, {})
                shares[component] = max(shares.get(component, 0), count)
        for field, at in (("last_delivered_at", last_delivered_at), ("last_bounced_at", last_bounced_at)):
            if at:
                document[field] = max(document.get(field, 0), at)
        if first_at:
            document["first_at"] = min(document.get("first_at", first_at), first_at)
        return True


class MemoryCopy:
    """What push needs of MongoCopy."""

    def __init__(self, server: MemoryServer, at: Callable[[str], None] = nothing) -> None:
        self.server, self._at = server, at

    def claim(self, component: str, partition: int, claim: str) -> Fence:
        self._at("claim")
        fence = self.server.fences.setdefault(f"{component}/{partition:02d}", {})
        before = Fence(fence.get("flush"), fence.get("claim"))
        fence |= {"component": component, "claim": claim}
        self._at("claimed")
        return before

    def send(self, rows: Sequence[Row], component: str, new_names: Container[str] = frozenset()) -> None:
        self._at("send")
        told = sorted(row for row in rows if row[1] or row[2])
        # Inserts go first, and a batch that fails in the middle leaves any part of itself: every second row, here.
        told.sort(key=lambda row: row[0] not in new_names)
        refused = [row for row in told[::2] if not self.server.merge(row, component)]
        self._at("half sent")
        refused += [row for row in told[1::2] if not self.server.merge(row, component)]
        self._at("sent")
        if refused:
            raise PushFailed(f"push of {len(told)} rows: {len(refused)} refused")

    def advance(self, component: str, partition: int, claim: str, flush: int) -> bool:
        self._at("advance")
        fence = self.server.fences.get(f"{component}/{partition:02d}", {})
        held = fence.get("claim") == claim
        if held:
            fence["flush"] = max(fence.get("flush", 0), flush)
        self._at("advanced")
        return held

    def others(self, names: Sequence[str], component_of: Callable[[str], str]) -> dict[str, tuple[int, int]]:
        held = {}
        for name in names:
            if (document := self.server.documents.get(name)) is not None:
                shares = [document.get(field, {}) for field in ("delivered", "bounced")]
                own = component_of(name)
                delivered, bounced = (sum(n for component, n in share.items() if component != own) for share in shares)
                held[name] = (delivered, bounced)
        return held


def push(partition: Partition, copy: MemoryCopy, from_zero: bool = False) -> tuple[int, bool]:
    """One push, as the push thread of the process that opened this partition makes it."""
    claimed: set[int] = partition.__dict__.setdefault("claimed_by_test", set())
    return engine.push(partition, copy, f"{id(partition):016x}", claimed, from_zero)  # type: ignore[arg-type]
