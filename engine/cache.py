"""A bounded cache of packed counts in two generations: as good as least-recently-used, at the price of a dict. Pure."""

from __future__ import annotations

from collections.abc import Mapping


class TwoGenerations:
    """{name: packed counts}, at most `names_max` of them.

    A hit in the old generation moves the entry to the young one. When the young one holds half of the bound, it becomes the
    old one, and what was not asked for since the last change is dropped.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, names_max: int) -> None:
        self._half = names_max // 2
        self._young: dict[str, int] = {}
        self._old: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, name: str) -> int | None:
        packed = self._young.get(name)
        if packed is None:
            packed = self._old.pop(name, None)
            if packed is not None:
                if len(self._young) >= self._half:
                    self._old, self._young = self._young, {}
                self._young[name] = packed
        return packed

    def peek(self, name: str) -> int | None:
        """As get, but moves nothing: safe from another thread."""
        packed = self._young.get(name)
        return self._old.get(name) if packed is None else packed

    def update(self, entries: Mapping[str, int]) -> None:
        if self._half == 0:
            return
        if len(self._young) + len(entries) > self._half:
            self._old = self._young if len(entries) <= self._half else {}
            self._young = {}
        if len(entries) > self._half:  # more than fits: keep what does
            entries = dict(list(entries.items())[: self._half])
        self._young.update(entries)
        if self._old:
            old = self._old
            for name in entries if len(entries) < len(old) else list(old):
                if name in entries:
                    old.pop(name, None)
