"""What a shard does about a full disk: gives up the reserve, waits, and takes the reserve back when there is room to spare.

A flush on a full disk is rolled back; what it was to write stays in memory and in the queues. The reserve, given up, is room
for the flush that lets finished segments go. It is taken back only where free space is beyond `min_free_space` and the reserve
together: taken at the first commit that fits, it would fill the disk again at once.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from catchall.engine.data_folder import fill_reserve, free_bytes, give_up_reserve
from catchall.engine.logs import BadState
from catchall.engine.settings import Settings

log = logging.getLogger("catchall.shard")

RETRY_S = 1.0


class FullDisk:
    """retry_at  the monotonic time before which nothing is to be written to the ledgers"""

    def __init__(self, root: Path, settings: Settings) -> None:
        self._root, self._data = root, settings.data
        self._spent = self._keeps_one = settings.storage.kind != "memory"  # spent, for all that is known at the start
        self._state = BadState(log)
        self.retry_at = 0.0

    @property
    def lasts(self) -> bool:
        return self._state.lasts

    def meet(self, error: Exception, retry_s: float = RETRY_S) -> None:
        """A commit was rolled back for want of room."""
        now = time.monotonic()
        if self._keeps_one:
            give_up_reserve(self._root)
            self._spent = True
        self._state.enter(f"the disk is full, counts stay in memory and queues until there is room: {error}", now)
        self.retry_at = now + retry_s

    def leave(self) -> None:
        """A commit went through."""
        self._state.leave("there is room again, and flushes commit", time.monotonic())

    def refill(self) -> None:
        """Take the reserve back, if it was given up and there is room to spare."""
        if self._spent and not self.lasts and free_bytes(self._root) >= self._data.min_free_space + self._data.reserve:
            self._spent = not fill_reserve(self._root, self._data.reserve)
