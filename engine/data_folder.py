"""The data folder: its lock, its manifest and where everything is in it (protocol, section 1).

    DIR/lock            flock of the supervisor; holds its pid, for people
    DIR/manifest        format, host id, partitions, made at: written once, synced before anything else exists
    DIR/reserve         ballast that is given up when a flush meets a full disk
    DIR/PP/lock         flock of the shard that owns partition PP
    DIR/PP/ledger.db    counts and positions
    DIR/PP/q/*.seg      segments of event queues
    DIR/run/            sockets, metrics page and settings of the running service; made anew at each start

Under storage `memory` the partitions lie in a folder on tmpfs instead, named after the data folder, and are wiped at each
start.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from catchall.engine.disk import DISK, Disk, try_lock

FORMAT = "1"


class FolderError(Exception):
    """The folder cannot be used; the message says why and what to do."""


class FolderInUse(FolderError):
    pass


@dataclass(frozen=True, slots=True)
class Manifest:
    host_id: str  # 32 hex digits
    partitions: int
    made_at: int  # unix seconds

    def text(self) -> str:
        return f"format {FORMAT}\nhost {self.host_id}\npartitions {self.partitions}\nmade_at {self.made_at}\n"


def partition_folder(root: Path, partition: int) -> Path:
    return root / f"{partition:02d}"


def queue_folder(root: Path, partition: int) -> Path:
    return partition_folder(root, partition) / "q"


def run_folder(data_dir: Path) -> Path:
    return data_dir / "run"


def memory_root(memory_dir: Path, data_dir: Path) -> Path:
    """Where storage `memory` keeps the partitions of this data folder."""
    digest = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    return memory_dir / f"catchall-{os.getuid()}-{digest}"


def lock(data_dir: Path) -> int:
    """Take the folder for this process, made if need be; returns the descriptor that holds it. Raises FolderError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise FolderError(f"the data folder {data_dir} cannot be used: {error}") from error
    if not try_lock(fd):
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise FolderInUse(f"the data folder {data_dir} is in use by the service with pid {holder}")
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def read_manifest(data_dir: Path) -> Manifest | None:
    """None if there is none. Raises FolderError if it is damaged or of another format."""
    path = data_dir / "manifest"
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from error
    fields = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    if fields.get("format") != FORMAT:
        raise FolderError(f"{path} says format {fields.get('format')!r}; this version reads format {FORMAT}")
    try:
        manifest = Manifest(fields["host"], int(fields["partitions"]), int(fields["made_at"]))
        if len(bytes.fromhex(manifest.host_id)) == 16 and 1 <= manifest.partitions <= 256:
            return manifest
    except (KeyError, ValueError):
        pass
    raise FolderError(f"{path} is damaged; it should read like this:\n{Manifest('0' * 32, 16, 0).text()}")


def open_folder(data_dir: Path, partitions: int, disk: Disk = DISK) -> Manifest:
    """The manifest of a locked folder; a new folder gets one, durable before anything else exists. Raises FolderError."""
    try:
        manifest = read_manifest(data_dir)
        if manifest is None:
            if list(data_dir.glob("[0-9][0-9]/ledger.db")):
                raise FolderError(
                    f"{data_dir} holds ledgers but no manifest. Put its manifest back (format, host, partitions, made_at; "
                    f"`select * from meta` in a ledger.db has the values) or use another folder."
                )
            manifest = Manifest(secrets.token_hex(16), partitions, int(time.time()))
            temporary = data_dir / "manifest.tmp"
            fd = disk.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            try:
                disk.pwrite(fd, manifest.text().encode(), 0)
                disk.fsync(fd)
            finally:
                os.close(fd)
            disk.rename(str(temporary), str(data_dir / "manifest"))
            disk.sync_folder(str(data_dir))
    except OSError as error:
        raise FolderError(f"the data folder {data_dir} cannot be used: {error}") from error
    return manifest


def make_partitions(root: Path, partitions: int, disk: Disk = DISK) -> None:
    """Make the folders of all partitions, durable. Raises OSError."""
    for partition in range(partitions):
        queue_folder(root, partition).mkdir(parents=True, exist_ok=True, mode=0o750)
        disk.sync_folder(str(partition_folder(root, partition)))
    disk.sync_folder(str(root))


def wipe_memory(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)


def fill_reserve(root: Path, size: int, disk: Disk = DISK) -> bool:
    """Have the ballast file at its full size. False: there is no room for it."""
    if size == 0:
        return True
    fd = disk.open(str(root / "reserve"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        if os.fstat(fd).st_size < size:
            disk.allocate(fd, 0, size)
    except OSError:
        os.ftruncate(fd, 0)
        return False
    finally:
        os.close(fd)
    return True


def free_bytes(root: Path) -> int:
    """What this process may still write to the file system of the folder. Raises OSError."""
    room = os.statvfs(root)
    return room.f_bavail * room.f_frsize


def give_up_reserve(root: Path) -> None:
    """Free the ballast, so that a flush can commit on a full disk and free the segments behind it."""
    try:
        os.truncate(root / "reserve", 0)
    except OSError:
        return
