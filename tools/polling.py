"""Waiting for what another process does: asked for again and again, and bounded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.02
WITHIN_S = 60.0  # what takes longer has failed


def eventually(what: str, ask: Callable[[], T], within_s: float = WITHIN_S, errors: tuple[type[Exception], ...] = ()) -> T:
    """Call `ask` until it returns something true, and return that; `errors` count as not yet. Raises TimeoutError."""
    until = time.monotonic() + within_s
    while True:
        with contextlib.suppress(*errors):
            if answer := ask():
                return answer
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(POLL_S)
