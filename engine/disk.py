"""The operating system's calls on files, as a value.

Everything that must survive something goes through a `Disk`, so that a test can hand in one that fails, dies or forgets
at the n-th call (tests/faults.py). Production uses `DISK` and pays one attribute look-up for it.

Every call raises OSError as the system's own call does. None retries: a failed `fdatasync` has already marked the pages
clean, so a second try that succeeds proves nothing (field reports: PostgreSQL, LMDB, Redis).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class Disk:
    open: Callable[[str, int, int], int] = os.open
    allocate: Callable[[int, int, int], None] = os.posix_fallocate  # a full disk is ENOSPC here and never a SIGBUS later
    pwrite: Callable[[int, bytes, int], int] = os.pwrite
    fsync: Callable[[int], None] = os.fsync
    fdatasync: Callable[[int], None] = os.fdatasync
    rename: Callable[[str, str], None] = os.rename
    unlink: Callable[[str], None] = os.unlink

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable. Raises OSError."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)


DISK = Disk()


def try_lock(fd: int) -> bool:
    """Take the `flock` of an open file without waiting. False: another process holds it, stopped ones included."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def boot_id() -> bytes:
    """The kernel's id of this boot, 16 bytes: what tells a dead process from a power cut."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))
