"""A bounded table of request paths that were parsed before: {raw path: what to do}, in two generations. Pure."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class PathTable(Generic[T]):
    """At most about `paths_max` entries.

    young  the dict to use for the young generation: the same object for ever, so a hot path may look into it directly; on a
           miss, `get` looks further
    """

    __slots__ = ("_half", "_old", "young")

    def __init__(self, paths_max: int, young: dict[bytes, T]) -> None:
        self._half = paths_max // 2
        self.young = young
        self._old: dict[bytes, T] = {}

    def get(self, path: bytes) -> T | None:
        entry = self.young.get(path)
        if entry is None and (entry := self._old.pop(path, None)) is not None:
            self.put(path, entry)
        return entry

    def put(self, path: bytes, entry: T) -> None:
        if self._half == 0:
            return
        if len(self.young) >= self._half:
            # In place: the hot path holds on to `young` itself.
            self._old = dict(self.young)
            self.young.clear()
        self.young[path] = entry

    def __len__(self) -> int:
        return len(self.young) + len(self._old)
