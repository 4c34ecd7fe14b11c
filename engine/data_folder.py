"""The data folder: its lock, its manifest and where everything is in it (protocol, section 1).

    DIR/lock            flock of the supervisor; holds its pid, for people
    DIR/manifest        format, host id, partitions, made at, crc: written once, synced before anything else exists
    DIR/reserve         ballast that is given up when a flush meets a full disk
    DIR/PP/lock         flock of the shard that owns partition PP
    DIR/PP/ledger.db    counts and positions
    DIR/PP/q/*.seg      segments of event queues
    DIR/run/            sockets, metrics page and settings of the running service; made anew at each start

Under storage `memory` the partitions lie in a folder on tmpfs instead, named after the data folder, and are wiped at each
start.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from catchall.engine.disk import DISK, Disk, try_lock
from catchall.storage.ledger_copy import identity_of
from catchall.storage.ledger_failures import LedgerDamaged

log = logging.getLogger("catchall.folder")

FORMAT = "2"
PARTITIONS = range(1, 257)
_FORMAT_1 = re.compile(r"format 1\nhost [0-9a-f]{32}\npartitions \d+\nmade_at \d+\n")  # its ledgers are not ours either


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
        text = f"format {FORMAT}\nhost {self.host_id}\npartitions {self.partitions}\nmade_at {self.made_at}\n"
        return f"{text}crc {zlib.crc32(text.encode()):08x}\n"


class _ManifestDamaged(Exception):
    pass


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
    try:
        return _read_manifest(data_dir)
    except _ManifestDamaged as damage:
        raise FolderError(str(damage)) from damage


def _read_manifest(data_dir: Path) -> Manifest | None:
    path = data_dir / "manifest"
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _ManifestDamaged(f"{path} is no text: {error}") from error
    except OSError as error:
        if error.errno in (errno.EIO, errno.EISDIR):
            raise _ManifestDamaged(f"{path} cannot be read: {error}") from error
        raise FolderError(f"{path} cannot be read: {error}") from error
    if _FORMAT_1.fullmatch(text):
        raise FolderError(f"{data_dir} is of format 1, made by an earlier version; this version reads format {FORMAT}. Nothing "
                          "was changed: use another folder, or the earlier version")  # fmt: skip
    body, _, check = text.rpartition("crc ")
    if check != f"{zlib.crc32(body.encode()):08x}\n":
        raise _ManifestDamaged(f"{path} does not match its crc")
    fields = dict(line.partition(" ")[::2] for line in text.splitlines())
    if fields.get("format") != FORMAT:
        raise FolderError(f"{path} says format {fields.get('format')!r}; this version reads format {FORMAT}")
    try:
        manifest = Manifest(fields["host"], int(fields["partitions"]), int(fields["made_at"]))
        if manifest.partitions in PARTITIONS and len(bytes.fromhex(manifest.host_id)) == 16:
            return manifest
    except (KeyError, ValueError):
        pass
    raise _ManifestDamaged(f"{path} is damaged; it should read like this:\n{Manifest('0' * 32, 16, 0).text()}")


def open_folder(data_dir: Path, partitions: int, disk: Disk = DISK) -> Manifest:
    """The manifest of a locked folder. A new folder gets one, durable before anything else exists; one that is damaged or
    missing is made again from what the ledgers say. Raises FolderError."""
    try:
        try:
            manifest = _read_manifest(data_dir)
        except _ManifestDamaged as damage:
            log.error("%s. It is kept as manifest.corrupt", damage)
            os.rename(data_dir / "manifest", data_dir / "manifest.corrupt")
            manifest = None
        if manifest is None:
            manifest = _from_ledgers(data_dir) or Manifest(secrets.token_hex(16), partitions, int(time.time()))
            _write_manifest(data_dir, manifest, disk)
    except OSError as error:
        raise FolderError(f"the data folder {data_dir} cannot be used: {error}") from error
    return manifest


def _from_ledgers(data_dir: Path) -> Manifest | None:
    """The manifest that all readable ledgers agree on; None if there is none. Raises FolderError if they do not agree."""
    said: dict[tuple[str, int], list[str]] = {}
    for path in sorted(data_dir.glob("[0-9]*/ledger.db")):
        with suppress(LedgerDamaged):
            said.setdefault(identity_of(path), []).append(path.parent.name)
    if len(said) > 1:
        what = "; ".join(f"host {host}, {count} partitions: {', '.join(where)}" for (host, count), where in said.items())
        raise FolderError(f"{data_dir} has no manifest, and its ledgers are of several folders: {what}. Move the wrong ones")
    if not said:
        return None
    host, count = next(iter(said))
    log.error("%s has no manifest; it is made again from its ledgers: host %s, %d partitions", data_dir, host, count)
    return Manifest(host, count, int(time.time()))


def _write_manifest(data_dir: Path, manifest: Manifest, disk: Disk) -> None:
    temporary = data_dir / "manifest.tmp"
    fd = disk.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        disk.pwrite(fd, manifest.text().encode(), 0)
        disk.fsync(fd)
    finally:
        os.close(fd)
    disk.rename(str(temporary), str(data_dir / "manifest"))
    disk.sync_folder(str(data_dir))


def make_partitions(root: Path, partitions: int, disk: Disk = DISK) -> None:
    """Make the folders of all partitions, durable. Raises OSError.

    One that is missing beside others with ledgers was lost: its `lock` is made to say so, as if by a trace that cannot be read.
    """
    in_use = any(root.glob("[0-9]*/ledger.db"))
    for partition in range(partitions):
        for folder in (partition_folder(root, partition), queue_folder(root, partition)):
            if folder.exists() and not folder.is_dir():
                log.error("%s is no folder. It is set aside as %s.corrupt", folder, folder.name)
                folder.rename(folder.with_name(f"{folder.name}.corrupt"))
        lost = in_use and not partition_folder(root, partition).exists()
        queue_folder(root, partition).mkdir(parents=True, exist_ok=True, mode=0o750)
        if lost:
            log.error("%s is gone: the counts of partition %d begin anew", partition_folder(root, partition), partition)
            (partition_folder(root, partition) / "lock").write_text("lost\n")
        disk.sync_folder(str(partition_folder(root, partition)))
    disk.sync_folder(str(root))


def wipe_memory(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)


def fill_reserve(root: Path, size: int, disk: Disk = DISK) -> bool:
    """Have the ballast file at its full size. False: there is no room for it."""
    if size == 0:
        return True
    try:
        fd = disk.open(str(root / "reserve"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError:
        return False
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
