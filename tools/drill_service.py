"""The real service for drills and tests: real processes on a free port, with small sizes.

    with Service(folder, "--workers", "2") as service:        # ready when this returns
        client = service.client()                             # one for each thread
        assert client.put("example.com", "bounced") == 200
        service.kill("shard", 0)                              # SIGKILL; service.signal(SIGSTOP, "http") sends another
        service.stop()                                        # SIGTERM, and it must end with exit code 0

No process outlives the block, however it ends: the kernel kills the supervisor with its parent, and the children are found by
the folder of the running service in their environment, orphans and stopped ones included.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

from catchall.tools.drill_client import LOOPBACK, Client, NotSent
from catchall.tools.drill_process import free_port, start_tied
from catchall.tools.polling import WITHIN_S, eventually

SMALL = ("--set", "data.reserve=0", "--set", "data.min_free_space=0", "--set", "data.segment_size=64KiB")
LOG_SHOWN = 4000  # of its end, in an error
MARKS = {"shard": b"catchall.engine.shard", "front": b"catchall.http.front", "http": b"--multiprocessing-fork"}  # by role
TRACEBACK = re.compile(r"^Traceback .*\n(?:[ ].*\n)+(.*)|.* \| Traceback .*", re.MULTILINE)
OURS = ("CATCHALL_", "SERVER_", "MONGODB_", "DELIVERED_")  # environment variables that the service reads


class ServiceFailed(Exception):
    """The service did something that it must not do; the message has the end of its log."""


class Child(NamedTuple):
    """A process of a running service other than its supervisor."""

    pid: int
    parent: int
    role: str  # shard, front (the HTTP server's parent), http (its workers), or "" for what is none of them
    number: int | None  # of a shard


class Service:
    """`catchall serve`, with small sizes, on a free port.

    folder   the log goes there, and the data folder `data`      flags   of `catchall serve`, after those for small sizes
    host     an address of its own (own_address) keeps others away from its port while it is down
    """

    def __init__(self, folder: Path, *flags: str, host: str = LOOPBACK) -> None:
        self.data_dir, self.flags, self.host = folder / "data", flags, host
        self.port = free_port()
        self._log = folder / "log"
        self._log_from = 0  # where the log of this start begins
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    def __enter__(self) -> Service:
        try:
            return self.start()
        except BaseException:
            self.end()
            raise

    def __exit__(self, *_: object) -> None:
        self.end()

    # ---- life

    def start(self) -> Service:
        """Start it, and wait until it is ready. Raises ServiceFailed, TimeoutError."""
        for _ in range(3):
            self.spawn()
            eventually("the service is ready", self._is_ready)
            if self._process is not None:
                return self
            self.port = free_port()
        raise ServiceFailed(f"the service does not start:\n{self.log[-LOG_SHOWN:]}")

    def spawn(self) -> None:
        self._log_from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = start_tied(self.command(), log, clean_environment())

    def command(self) -> list[str]:
        """What starts it."""
        return serve_command(self.port, self.data_dir, *self.flags, host=self.host)

    def _is_ready(self) -> bool:
        """True also, with no process, when somebody was quicker to take the port."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            self._process = None
            if code == 1 and "something else listens" in self._log.read_bytes()[self._log_from :].decode(errors="replace"):
                return True
            raise ServiceFailed(f"the service ended with exit code {code}:\n{self.log[-LOG_SHOWN:]}")
        return self.ready

    @property
    def ready(self) -> bool:
        with contextlib.suppress(NotSent, OSError):
            client = Client(self.port, 5.0, self.host)
            try:
                return client.request("GET", "/readyz").status == 200
            finally:
                client.close()
        return False

    @property
    def running(self) -> bool:
        """Whether the supervisor runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def complete(self) -> bool:
        """Whether the supervisor, every shard, the front and all HTTP workers run; a new one need not be ready yet."""
        children = self.serving()
        shards = {child.number for child in children if child.role == "shard"}
        fronts, workers = (sum(child.role == role for child in children) for role in ("front", "http"))
        full = len(shards) >= self._asked("--workers") and workers >= self._asked("--http-workers")
        return self.running and fronts > 0 and full

    def wait_until_ready(self) -> None:
        """All shards answer, and so many HTTP workers run as were asked for."""
        eventually("the service is ready again", lambda: self.ready and len(self.pids("http")) >= self._asked("--http-workers"))

    def _asked(self, flag: str) -> int:
        flags = list(self.flags)
        return int(flags[flags.index(flag) + 1]) if flag in flags else 1

    def stop(self, how: signal.Signals | None = signal.SIGTERM, code: int = 0) -> None:
        """Send a signal to the supervisor (None: it has one already). Raises ServiceFailed if the exit code is another one or
        a process is left."""
        process = self._supervisor()
        if how is not None:
            process.send_signal(how)
        found = process.wait(WITHIN_S)
        self._process = None
        if found != code:
            raise ServiceFailed(f"the service ended with exit code {found} instead of {code}:\n{self.log[-LOG_SHOWN:]}")
        if left := self.children():
            raise ServiceFailed(f"the service has ended, and left {left}:\n{self.log[-LOG_SHOWN:]}")

    def restart(self, *flags: str) -> None:
        """Stop, and start with other flags (the same if none are given)."""
        self.stop()
        self.flags = flags or self.flags
        self.start()

    def end(self) -> None:
        """Kill whatever is left of it."""
        for client in self._clients:
            client.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(WITHIN_S)
            self._process = None
        eventually("the children are gone", self._killed)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def tracebacks(self) -> list[str]:
        """How each traceback in the log ends; one that was logged is a line. Without those of a process whose parent was
        killed while it handed over what to run: the standard library has no other way to say so."""
        found = [found for found in TRACEBACK.finditer(self.log) if " in spawn_main\n" not in found.group()]
        return [traceback.group(traceback.lastindex or 0) for traceback in found]

    # ---- processes

    def _supervisor(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServiceFailed("the service does not run")
        return self._process

    def pids(self, role: str, number: int | None = None) -> list[int]:
        """Processes by role: supervisor, shard (all, or that number), front (Granian's parent), http (its workers)."""
        if role == "supervisor":
            return [self._process.pid] if self._process is not None else []
        return [child.pid for child in self.children() if child.role == role and number in (None, child.number)]

    def signal(self, what: signal.Signals, role: str, number: int | None = None, which: int = 0) -> int:
        """Send a signal to a process of a role (the oldest, or `which`), or to that shard; returns its pid. Waits for one that
        is no orphan."""

        def serving() -> list[int]:
            if role == "supervisor":
                return self.pids(role)
            return sorted(child.pid for child in self.serving() if child.role == role and number in (None, child.number))

        pids = eventually(f"a process {role} runs", serving)
        pid = pids[which % len(pids)]
        os.kill(pid, what)
        return pid

    def kill(self, role: str, number: int | None = None, which: int = 0) -> int:
        """SIGKILL to a process, and wait until it is gone; returns its pid."""
        pid = self.signal(signal.SIGKILL, role, number, which)
        if role == "supervisor":
            self._supervisor().wait(WITHIN_S)
            self._process = None
        eventually(f"{role} {pid} is gone", lambda: pid not in self.pids(role, number))
        return pid

    def kill_all(self) -> None:
        """SIGKILL to all of its processes, the supervisor first."""
        children = self.children()
        self.kill("supervisor")
        for child in children:
            _kill(child.pid)
        eventually("all are gone", lambda: not self.children())

    def _killed(self) -> bool:
        """Kill every child; True once there is none."""
        children = self.children()
        for child in children:
            _kill(child.pid)
        return not children

    def serving(self) -> list[Child]:
        """Those that the supervisor that runs now, or a child of it, has started."""
        children = self.children()
        first = {child.pid for child in children if child.parent in self.pids("supervisor")}
        return [child for child in children if child.pid in first or child.parent in first]

    def children(self) -> list[Child]:
        """All living processes but the supervisor, orphans included."""
        mark = f"CATCHALL_RUN={self.data_dir / 'run'}".encode()
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):  # it has ended, or is not ours; a zombie's environment is empty
                    if mark in _words(f"/proc/{entry}/environ"):
                        found.append(_child(int(entry)))
        return found

    # ---- clients

    def client(self, timeout_s: float = 30.0) -> Client:
        """A new client, closed at the end. One for each thread."""
        self._clients.append(Client(self.port, timeout_s, self.host))
        return self._clients[-1]

    def clients_of_each_worker(self) -> dict[int, Client]:
        """{pid of an HTTP worker: a client whose connection it holds}, for all workers."""
        found: dict[int, Client] = {}
        workers = self.pids("http")

        def connected() -> bool:
            client = self.client()
            port = client.local_port
            for pid in workers:
                if any(held.raddr and held.raddr.port == port for held in psutil.Process(pid).net_connections("tcp")):
                    found.setdefault(pid, client)
            return len(found) == len(workers)

        eventually("every HTTP worker holds a connection", connected)
        return found


def serve_command(port: int, data_dir: Path, *flags: str, host: str = LOOPBACK) -> list[str]:
    """`catchall serve` with small sizes."""
    serve = [sys.executable, "-m", "catchall.tools.cli", "serve", *SMALL, *flags]
    return [*serve, "--host", host, "--port", str(port), "--data-dir", str(data_dir)]


def clean_environment() -> dict[str, str]:
    """Ours without settings of the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


def _words(path: str) -> list[bytes]:
    """Of a file of /proc that holds them with NULs between. Raises OSError."""
    with open(path, "rb") as file:
        return file.read().split(b"\0")


def _child(pid: int) -> Child:
    """Raises OSError."""
    command = _words(f"/proc/{pid}/cmdline")
    role = next((role for role, mark in MARKS.items() if mark in command), "")
    with open(f"/proc/{pid}/stat", "rb") as file:
        parent = int(file.read().rpartition(b") ")[2].split()[1])  # behind the name, which may hold anything, and the state
    return Child(pid, parent, role, int(command[-3]) if role == "shard" else None)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def at_rest(data_dir: Path, root: Path | None = None) -> tuple[list[Path], int]:
    """(segment files, rows of the ledgers' `segment` tables) of a service that has ended: both are to be empty."""
    rows = 0
    folder = root or data_dir
    for ledger in folder.glob("[0-9][0-9]/ledger.db"):
        with contextlib.closing(sqlite3.connect(ledger)) as database:
            rows += database.execute("select count(*) from segment").fetchone()[0]
    return [*folder.glob("[0-9][0-9]/q/*")], rows
