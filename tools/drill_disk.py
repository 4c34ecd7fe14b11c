"""A small file system of a drill, a tmpfs, to be filled and freed again. Mounting needs root and a host that allows it."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 192 << 20
MIN_FREE = 16 << 20  # more than all segments together, so that counting and retiring them makes no room for writes
RESERVE = 1 << 20
FLAGS = ("--set", f"data.min_free_space={MIN_FREE}", "--set", f"data.reserve={RESERVE}")  # of a service that lives on it
STEP = 64 << 10


class NoMount(Exception):
    """A tmpfs cannot be mounted here; the message says why."""


class SmallDisk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, leave: int) -> None:
        """Take all space but `leave` bytes."""
        with self._ballast.open("ab") as file:
            while (free := self._free()) > leave:
                take = max(STEP, (free - leave) // 2)
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), take)
                except OSError as error:
                    if error.errno != errno.ENOSPC or take == STEP:
                        return
                file.seek(0, os.SEEK_END)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def _free(self) -> int:
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """Mount one at `folder`, which exists. Raises NoMount."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "catchall-drill", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoMount(str(error)) from error
    if done.returncode != 0:
        raise NoMount(done.stderr.strip())
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def why_no_small_disk() -> str | None:
    """None if one can be had here, or what mounting one says."""
    with tempfile.TemporaryDirectory(prefix="catchall-drill-") as folder:
        try:
            with small_disk(Path(folder)):
                return None
        except NoMount as error:
            return str(error)
