"""Which of a shard's queue folders got a new name since they were last listed: inotify, for all of them in one system call.

The protocol lists a folder before every batch of reads. What it needs is the names as of that moment, and they are those of the
last listing if the kernel saw no rename into the folder since: it queues the event within the writer's rename(2), which returns
before the writer appends, and so before anything in the new segment is acknowledged. Listing costs about 5 us a folder, the
question less than 1 us for all.

Where inotify cannot be had, or lost events, every folder counts as changed.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import time

log = logging.getLogger("catchall.queues")

_IN_MOVED_TO = 0x80
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_READ_BYTES = 64 << 10


class FolderWatch:
    """Watches folders for names that are moved into them.

    polled_ns  unix time just before the last poll: what had a name then is known, once the changed folders are listed
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            self._without(ctypes.get_errno())
        self._folders: dict[int, str] = {}
        self._changed: set[str] = set()
        self.polled_ns = 0

    def _without(self, error: int) -> None:
        log.warning("inotify cannot be had (%s), so folders are listed each time: see fs.inotify in sysctl",
                    errno.errorcode[error])  # fmt: skip
        self._fd = -1

    def add(self, folder: str) -> None:
        """Watch a folder from now on. It counts as changed."""
        self._changed.add(folder)
        if self._fd >= 0:
            watch = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _IN_MOVED_TO)
            if watch < 0:
                os.close(self._fd)
                self._without(ctypes.get_errno())
            else:
                self._folders[watch] = folder

    def poll(self) -> None:
        """Ask the kernel what changed; before every batch of reads and every drain."""
        self.polled_ns = time.time_ns()
        if self._fd < 0:
            return
        try:
            while True:
                self._note(os.read(self._fd, _READ_BYTES))
        except BlockingIOError:
            return

    def _note(self, events: bytes) -> None:
        at = 0
        while at < len(events):
            watch, mask, _, length = _EVENT.unpack_from(events, at)
            at += _EVENT.size + length
            if mask & _IN_Q_OVERFLOW:
                self._changed.update(self._folders.values())
            elif watch in self._folders:
                self._changed.add(self._folders[watch])

    def changed(self, folder: str) -> bool:
        """Whether it must be listed."""
        return folder in self._changed or self._fd < 0

    def listed(self, folder: str) -> None:
        """It was listed to the end after the last poll."""
        self._changed.discard(folder)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
