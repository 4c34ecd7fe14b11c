"""What a power cut may take from one partition: sectors that were not synced, names whose folder was not, the ledger's end.

Every sector of a segment is, after the cut, either what it was at the file's last sync or what it is now, each by itself. A
name is there if the folder was synced with it; one that came or went since may be either. Of the ledger, everything is there
up to the last COMMIT that returned; what its log holds beyond, say the COMMIT in which its owner was killed, is there, torn
or gone.
"""

import os
import random
from pathlib import Path

from faults import Steps

from catchall.engine.disk import Disk
from catchall.storage.ledger import Ledger

SECTOR = 512


class Power:
    """Remembers what is durable in the folder of one partition, and cuts the power. Whoever was killed left before that."""

    def __init__(self, folder: Path) -> None:
        self._queues, self._log = folder / "q", folder / "ledger.db-wal"
        self._content: dict[int, bytes] = {}  # by inode: what a sync covered
        self._names: dict[str, int] = {}  # names that are durable, and their inodes
        self._log_durable = self._log_before = 0  # bytes

    def disk(self, steps: Steps) -> Disk:
        return steps.disk(open=self._open, fsync=self._sync, fdatasync=self._sync)

    def _open(self, path: str, flags: int, mode: int) -> int:
        fd = os.open(path, flags, mode)
        if flags & os.O_EXCL:
            self._content.pop(os.fstat(fd).st_ino, None)  # of a file that is gone for good
        return fd

    def _sync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == self._queues:
            self._names = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._content[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)

    # ---- the ledger: its log only grows while it is open, and a commit that returned has synced all of it

    def before_opening(self) -> None:
        self._log_before = self._log_size()

    def opened(self, ledger: Ledger) -> None:
        """What the opening committed is durable, and so is all before it; an opening that wrote nothing has synced nothing."""
        if self._log_size() != self._log_before:
            self._log_durable = self._log_size()
        run = ledger._run

        def noted(*args: object) -> None:
            run(*args)  # type: ignore[arg-type]
            if not ledger._db.in_transaction:
                self._log_durable = self._log_size()

        ledger._run = noted  # type: ignore[method-assign]

    def _log_size(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    # ---- the cut

    def cut(self, draw: random.Random) -> None:
        self.cut_ledger(draw)
        now = {path.name: path for path in self._queues.glob("*.seg")}
        for name in sorted({*now, *(name for name in self._names if name.endswith(".seg"))}):
            path = self._queues / name
            unsure = (name in now) != (name in self._names)
            present = draw.random() < 0.5 if unsure else name in now
            inode = self._names.get(name) or path.stat().st_ino
            current = path.read_bytes() if name in now else self._content.get(inode, b"")
            durable = self._content.get(inode, bytes(len(current)))
            path.unlink(missing_ok=True)
            if present:
                sectors = range(0, len(current), SECTOR)
                path.write_bytes(b"".join(draw.choice((current, durable))[at : at + SECTOR] for at in sectors))
        self._content = {path.stat().st_ino: path.read_bytes() for path in self._queues.glob("*.seg")}
        self._names = {path.name: path.stat().st_ino for path in self._queues.glob("*.seg")}

    def cut_ledger(self, draw: random.Random) -> None:
        if self._log_size() > self._log_durable:
            content = self._log.read_bytes()
            kept, tail = content[: self._log_durable], content[self._log_durable :]
            sectors = [tail[at : at + SECTOR] for at in range(0, len(tail), SECTOR)]
            torn = b"".join(draw.choice((sector, bytes(len(sector)))) for sector in sectors)
            self._log.write_bytes(kept + draw.choice((tail, b"", torn, tail[: len(tail) // 2])))
        self._log_durable = self._log_size()
