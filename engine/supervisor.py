"""The supervisor: parent of every process of the service.

Start       lock the data folder, refuse a port in use, read or make the manifest, make folders and the metrics page, start the
            shards and the HTTP front (Granian's parent, which starts the HTTP workers), say when all are ready
Watch       a child that ends is started again, after a back-off that grows to 5 s while it keeps ending young, or while the
            kernel has no room to start it
Stop        SIGTERM or SIGINT: the HTTP front finishes what is in flight and ends; the shards drain, flush and end; exit 0.
            A second one does not wait for requests in flight. What failed or had to be killed makes exit 1; nothing is lost.

Signals only set flags; the loop acts. Children live in process groups of their own, so that Ctrl-C reaches the supervisor
alone, and get a signal from the kernel should it die.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import msgspec

from catchall.engine import data_folder, metric_names
from catchall.engine.data_folder import FolderError, Manifest
from catchall.engine.disk import boot_id
from catchall.engine.metrics_page import READY, MetricsPage
from catchall.engine.process import RUN_VARIABLE, RuntimeFile, http_places, read_runtime_file, write_runtime
from catchall.engine.settings import Settings, backlog_least

log = logging.getLogger("catchall.supervisor")

RESTART_PAUSE_MAX_S = 5.0
LIVED_LONG_S = 10.0  # a child that lived this long is started again at once
READY_POLL_S = 0.02
ORPHANS_END_S = 5.0  # after the shutdown_timeout of a supervisor that was killed, its HTTP workers are gone


@dataclass(slots=True)
class Child:
    """A process that is to be running, and its last life."""

    name: str
    kind: str  # shard or http
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0  # before the next start
    start_at: float = 0.0
    pidfd: int = -1

    @property
    def alive(self) -> bool:
        return self.process is not None


@dataclass(slots=True)
class Supervisor:
    settings: Settings
    data_dir: Path
    manifest: Manifest
    page: MetricsPage
    children: list[Child]
    stops: int = 0  # how often a stop was asked for
    failed: bool = False  # a child had to be killed, or ended in an error, while stopping
    _wake: tuple[int, int] = (-1, -1)
    _poll: select.poll = field(default_factory=select.poll)

    def run(self) -> int:
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, lambda *_: None)  # nothing can be reloaded; a closed terminal is no reason to end
        self._poll.register(self._wake[0], select.POLLIN)
        for child in self.children:
            self._start(child)
        if self._wait_until_ready():
            self._say_ready()
        while not self.stops:
            self._wait(self._seconds_to_next_start())
            for child in self.children:
                if not child.alive and child.start_at <= time.monotonic():
                    self._start(child)
        return self._stop()

    def _on_stop(self, *_: object) -> None:
        self.stops += 1

    # ---- start and watch

    def _start(self, child: Child) -> None:
        environment = os.environ | {RUN_VARIABLE: str(data_folder.run_folder(self.data_dir))}
        try:
            process = subprocess.Popen(child.command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
        except OSError as error:  # no memory, no room for another process: a matter of time
            self._back_off(child, 0.0)
            log.error("%s could not be started: %s; the next try is in %.1f s", child.name, error, child.pause)
            return
        child.process, child.started = process, time.monotonic()
        child.pidfd = os.pidfd_open(process.pid)
        self._poll.register(child.pidfd, select.POLLIN)

    def _wait(self, timeout_s: float | None) -> None:
        """Sleep until a signal, a child's end or the time-out; note what ended."""
        self._poll.poll(None if timeout_s is None else max(0, timeout_s * 1000))
        try:
            while os.read(self._wake[0], 512):
                pass
        except BlockingIOError:
            pass
        for child in self.children:
            if child.process is not None and child.process.poll() is not None:
                self._note_end(child, child.process)

    def _note_end(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        self._poll.unregister(child.pidfd)
        os.close(child.pidfd)
        child.process = None
        if self.stops:
            if process.returncode > 0:
                log.error("%s ended %s while stopping; nothing acknowledged is lost", child.name, ending(process.returncode))
                self.failed = True
            return
        lived = time.monotonic() - child.started
        self._back_off(child, lived)
        self.page.slot("supervisor", 0).cells[metric_names.cell("catchall_restarts_total", child.kind)] += 1
        log.error("%s ended %s after %.1f s; it is started again in %.1f s", child.name, ending(process.returncode), lived,
                  child.pause)  # fmt: skip

    @staticmethod
    def _back_off(child: Child, lived_s: float) -> None:
        child.pause = 0.0 if lived_s >= LIVED_LONG_S else min(RESTART_PAUSE_MAX_S, max(0.1, child.pause * 2))
        child.start_at = time.monotonic() + child.pause

    def _seconds_to_next_start(self) -> float | None:
        waiting = [child.start_at for child in self.children if not child.alive]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def _wait_until_ready(self) -> bool:
        """Until every shard has recovered and every HTTP worker listens. False: a stop came first."""
        while not self.stops:
            shards = sum(slot.state == READY for slot in self.page.of("shard"))
            workers = sum(slot.state == READY for slot in self.page.of("http"))
            if shards == self.settings.shards.workers and workers >= self.settings.server.http_workers:
                return True
            self._wait(READY_POLL_S)
            for child in self.children:
                if not child.alive and child.start_at <= time.monotonic():
                    self._start(child)
        return False

    def _say_ready(self) -> None:
        config = self.settings
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        log.info("catchall %s listens on http://%s:%d", version("catchall"), host, config.server.port)
        log.info("storage %s, data folder %s, fsync %s", config.storage.kind, self.data_dir.resolve(), config.data.fsync)
        sizes = config.shards.workers, self.manifest.partitions, config.server.http_workers
        log.info("%d shards for %d partitions, %d HTTP workers, catch-all above %d delivered", *sizes, config.rules.threshold)

    # ---- stop

    def _stop(self) -> int:
        log.info("stopping: HTTP first, then the shards drain and flush")
        timeout = self.settings.server.shutdown_timeout
        for kind in ("http", "shard"):
            self._stop_children([child for child in self.children if child.kind == kind], timeout)
        log.info("stopped")
        return 1 if self.failed else 0

    def _stop_children(self, children: list[Child], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s + 5
        stops = self.stops
        for child in children:
            if child.process is not None:
                child.process.send_signal(signal.SIGTERM)
        while any(child.alive for child in children):
            hurried = self.stops > stops and children[0].kind == "http"
            if time.monotonic() >= deadline or hurried:
                for child in children:
                    if child.process is not None:
                        log.warning("%s did not end in time and is killed; nothing acknowledged is lost", child.name)
                        os.killpg(child.process.pid, signal.SIGKILL)
                        self.failed |= not hurried
                deadline = time.monotonic() + timeout_s
                stops = self.stops
            self._wait(max(0.0, deadline - time.monotonic()))


def ending(returncode: int) -> str:
    """How a process ended, in words."""
    return f"by {signal.Signals(-returncode).name}" if returncode < 0 else f"with exit code {returncode}"


def seconds_until_orphans_end(run_folder: Path) -> float:
    """How long the HTTP workers of a supervisor that was killed may hold the port; 0 if none was. Its own settings say so."""
    if not run_folder.exists():
        return 0.0
    try:
        return read_runtime_file(run_folder).settings.server.shutdown_timeout + ORPHANS_END_S
    except (OSError, msgspec.MsgspecError):  # it was killed before it had written them, and so before it had workers
        return ORPHANS_END_S


def refuse_port_in_use(host: str, port: int, wait_s: float) -> None:
    """Raises OSError if anything listens there: with SO_REUSEPORT two services would silently share a port.

    wait_s  how long the HTTP workers of a supervisor that was killed may take to be gone
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _listen_once(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            time.sleep(READY_POLL_S)
        else:
            return


def _listen_once(host: str, port: int) -> None:
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address[4])
        probe.listen(1)


def prepare(settings: Settings, data_dir: Path) -> tuple[Manifest, MetricsPage]:
    """Everything on disk that a start needs. The folder is locked. Raises FolderError, OSError."""
    manifest = data_folder.open_folder(data_dir, settings.data.partitions)
    if settings.shards.workers > manifest.partitions:
        raise FolderError(
            f"{settings.shards.workers} shards were asked for (shards.workers); {data_dir} was made with {manifest.partitions} "
            f"partitions, and each shard needs one"
        )
    if settings.data.backlog_max < (least := backlog_least(settings, manifest.partitions)):
        raise FolderError(
            f"data.backlog_max is {settings.data.backlog_max}, and the {manifest.partitions} partitions of {data_dir} need at "
            f"least {least}: with less, writes could be refused for ever with nothing left to count"
        )
    if manifest.partitions != settings.data.partitions:
        log.warning("the data folder was made with %d partitions, and keeps them; data.partitions = %d has no effect",
                    manifest.partitions, settings.data.partitions)  # fmt: skip
    root = data_dir
    if settings.storage.kind == "memory":
        root = data_folder.memory_root(Path(settings.storage.memory_dir), data_dir)
        data_folder.wipe_memory(root)
        root.mkdir(mode=0o700)
    data_folder.make_partitions(root, manifest.partitions)
    if settings.storage.kind != "memory" and not data_folder.fill_reserve(root, settings.data.reserve):
        log.warning("there is no room for the reserve of %d bytes; a full disk will be noticed later", settings.data.reserve)
    run = data_folder.run_folder(data_dir)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(mode=0o700)
    page = MetricsPage(run, shards=settings.shards.workers, http_places=http_places(settings), create=True)
    content = RuntimeFile(settings=settings, manifest=manifest, boot_id=boot_id().hex(), root=str(root.resolve()))
    write_runtime(run, content)
    return manifest, page


def run(settings: Settings) -> int:
    """`catchall serve`: returns the exit code."""
    data_dir = Path(settings.data.dir)
    try:
        lock = data_folder.lock(data_dir)
    except FolderError as error:
        log.error("%s", error)
        return 1
    try:
        patience = seconds_until_orphans_end(data_folder.run_folder(data_dir))
        refuse_port_in_use(settings.server.host, settings.server.port, patience)
        manifest, page = prepare(settings, data_dir)
    except FolderError as error:
        log.error("%s", error)
        return 1
    except OSError as error:
        where = f"{settings.server.host}:{settings.server.port}"
        hint = f": something else listens on {where}" if error.errno == errno.EADDRINUSE else ""
        log.error("the service cannot start%s: %s", hint, error)
        return 1
    run_folder = str(data_folder.run_folder(data_dir).resolve())
    python, pid = [sys.executable, "-P", "-m"], str(os.getpid())
    shards = [
        Child(f"shard-{number}", "shard", [*python, "catchall.engine.shard", run_folder, str(number), pid])
        for number in range(settings.shards.workers)
    ]
    front = Child("http front", "http", [*python, "catchall.http.front", run_folder, pid])
    page.slot("supervisor", 0).take()
    code = Supervisor(settings, data_dir, manifest, page, [*shards, front]).run()
    if settings.storage.kind == "memory":
        data_folder.wipe_memory(data_folder.memory_root(Path(settings.storage.memory_dir), data_dir))
    shutil.rmtree(data_folder.run_folder(data_dir), ignore_errors=True)
    os.close(lock)
    return code
