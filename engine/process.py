"""What every process of the service starts with: the running service's settings and folders, and an end with its parent.

    DIR/run/runtime.json   settings, manifest, boot id, root of the partitions: written by the supervisor, mode 0600
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import msgspec

from catchall.engine.data_folder import Manifest
from catchall.engine.metrics_page import MetricsPage
from catchall.engine.settings import Settings

RUN_VARIABLE = "CATCHALL_RUN"  # tells a child where the run folder is
_PR_SET_PDEATHSIG = 1


class RuntimeFile(msgspec.Struct, frozen=True, kw_only=True):
    settings: Settings
    manifest: Manifest
    boot_id: str  # hex
    root: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """A running service, as one of its processes sees it.

    root        where the partition folders are: the data folder, or a folder on tmpfs under storage `memory`
    run_folder  sockets, metrics page, locks of the HTTP workers' places
    """

    settings: Settings
    manifest: Manifest
    boot_id: bytes
    root: Path
    run_folder: Path
    page: MetricsPage


def http_places(settings: Settings) -> int:
    """Slots for HTTP workers: each twice, since a new one may start before the old one of its place has ended."""
    return 2 * settings.server.http_workers + 2


def write_runtime(run_folder: Path, content: RuntimeFile) -> None:
    fd = os.open(run_folder / "runtime.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.json.encode(content))


def read_runtime_file(run_folder: Path) -> RuntimeFile:
    """Raises OSError, msgspec.MsgspecError."""
    return msgspec.json.decode((run_folder / "runtime.json").read_bytes(), type=RuntimeFile)


def read_runtime(run_folder: Path) -> Runtime:
    """Raises OSError, msgspec.MsgspecError."""
    content = read_runtime_file(run_folder)
    config = content.settings
    page = MetricsPage(run_folder, shards=config.shards.workers, http_places=http_places(config))
    return Runtime(config, content.manifest, bytes.fromhex(content.boot_id), Path(content.root), run_folder, page)


def end_on_stop_signals() -> None:
    """Until there is something to drain, SIGTERM and SIGINT end this process at once, with exit code 0."""

    def leave(*_: object) -> None:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def die_with_parent(signal_number: signal.Signals, parent: int) -> None:
    """Have the kernel send us `signal_number` when the thread that started us ends; exit now if `parent` is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit(1)
