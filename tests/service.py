"""The real service for tests: real processes on a free port, a small client, and load with a record of what was answered.

    with Service(tmp_path, "--workers", "2") as service:      # ready when this returns
        client = service.client()                             # one for each thread
        assert client.put("example.com", "bounced") == 200
        service.kill("shard", 0)                              # SIGKILL; service.signal(SIGSTOP, "http") sends another
        service.stop()                                        # SIGTERM, and exit code 0 is asserted

No process outlives the block, however it ends: the kernel kills the supervisor with the tests, and the children are found by
the folder of the running service in their environment, orphans and stopped ones included.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from mongod import DIE_WITH_PARENT, free_port

POLL_S = 0.02
WITHIN_S = 60.0  # what takes longer has failed
KINDS = ("delivered", "bounced")
SMALL = ("--set", "data.reserve=0", "--set", "data.min_free_space=0", "--set", "data.segment_size=64KiB")
BODY_MAX, EVENTS_MAX = 64 << 10, 500  # of the service that tests share
HTTP_LIMITS = ("--set", "limits.body=64KiB", "--set", f"limits.events={EVENTS_MAX}", "--set", "server.read_timeout=500ms")
MARKS = {"shard": "catchall.engine.shard", "front": "catchall.http.front", "http": "--multiprocessing-fork"}  # by role
NDJSON = {"content-type": "application/x-ndjson"}
CHUNKED = b"POST /events HTTP/1.1\r\nhost: t\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
WITH_LENGTH = CHUNKED.replace(b"transfer-encoding: chunked", b"content-length: %d")
OURS = ("CATCHALL_", "SERVER_", "MONGODB_", "DELIVERED_")  # environment variables that the service reads


def eventually(what: str, ask: Callable[[], Any], within_s: float = WITHIN_S) -> Any:
    """Call `ask` until it returns something true, and return that. Raises TimeoutError."""
    until = time.monotonic() + within_s
    while not (answer := ask()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(POLL_S)
    return answer


def event(domain: str, kind: str = "delivered", **more: object) -> bytes:
    """One line of a bulk request."""
    return json.dumps({"domain": domain, "type": kind, **more}).encode() + b"\n"


def chunks(*parts: bytes, end: bool = True) -> bytes:
    """The parts in the framing of a chunked body; the last chunk too, if it ends here."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, *([b""] if end else [])))


class NotSent(Exception):
    """No connection could be made, so nothing of the request went out."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One keep-alive connection, made when it is needed. Never sends anything twice. For one thread.

    Raises  NotSent; OSError when the connection broke before the answer was complete: the request is then ambiguous.
    """

    def __init__(self, port: int, timeout_s: float = 30.0) -> None:
        self.port, self._timeout_s = port, timeout_s
        self._socket: socket.socket | None = None
        self._inbox = b""

    def request(
        self, method: str, path: str | bytes, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        target = path if isinstance(path, bytes) else path.encode()
        head = b"%b %b HTTP/1.1\r\nhost: test\r\n" % (method.encode(), target)
        if body is not None:
            head += b"content-length: %d\r\n" % len(body)
        head += b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in (headers or {}).items())
        self.send(head + b"\r\n" + (body or b""))
        return self.answer(without_body=method == "HEAD")

    def send(self, data: bytes) -> None:
        """Put bytes on the connection as they are."""
        if self._socket is None:
            try:
                self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=self._timeout_s)
            except OSError as error:
                raise NotSent(str(error)) from error
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._closed_on_error():
            self._socket.sendall(data)

    def answer(self, without_body: bool = False) -> Answer:
        """Read the next answer."""
        with self._closed_on_error():
            while (end := self._inbox.find(b"\r\n\r\n")) < 0:
                self._receive()
            lines = self._inbox[:end].decode("latin-1").split("\r\n")
            fields = (line.partition(":") for line in lines[1:])
            headers = {name.lower(): value.strip() for name, _, value in fields}
            end += 4
            stop = end + (0 if without_body else int(headers.get("content-length", "0")))
            while len(self._inbox) < stop:
                self._receive()
            body, self._inbox = self._inbox[end:stop], self._inbox[stop:]
            found = Answer(int(lines[0].split(" ")[1]), headers, body)
        if headers.get("connection") == "close":
            self.close()
        return found

    def ends(self) -> bool:
        """Whether the server closes the connection, having sent nothing more."""
        if self._socket is None:
            return True
        try:
            return not self._inbox and self._socket.recv(1) == b""
        except ConnectionError:
            return True

    def _receive(self) -> None:
        assert self._socket is not None, "the connection was closed"
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection before its answer was complete")
        self._inbox += data

    @contextlib.contextmanager
    def _closed_on_error(self) -> Any:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._inbox = None, b""

    @property
    def local_port(self) -> int:
        self.request("GET", "/healthz")
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    # ---- what tests ask for most

    def put(self, domain: str, kind: str = "delivered") -> int:
        return self.request("PUT", f"/events/{domain}/{kind}").status

    def bulk(self, *events: Mapping[str, object]) -> Answer:
        body = b"".join(json.dumps(event).encode() + b"\n" for event in events)
        return self.request("POST", "/events", body, NDJSON)

    def count(self, domain: str, delivered: int = 0, bounced: int = 0) -> None:
        """Have so many events recorded."""
        counts = {"delivered": delivered, "bounced": bounced}
        found = self.bulk(*({"domain": domain, "type": kind, "count": n} for kind, n in counts.items() if n))
        assert (found.status, found.headers["catchall-counted"]) == (200, str(delivered + bounced))

    def domain(self, domain: str) -> dict[str, Any]:
        found = self.request("GET", f"/domains/{domain}")
        assert found.status == 200, found
        answer: dict[str, Any] = found.json
        return answer

    def counts(self, domain: str) -> tuple[int, int]:
        found = self.domain(domain)
        return found["delivered"], found["bounced"]

    def stats(self) -> dict[str, int]:
        found = self.request("GET", "/domains/stats")
        assert found.status == 200, found
        return {key: value for key, value in found.json.items() if key != "timestamp"}


class Service:
    """`catchall serve`, with small sizes, on a free port.

    folder   the data folder and the log go below it       flags   of `catchall serve`, after those for small sizes
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.data_dir, self.flags = folder / "data", flags
        self.port = free_port()
        self._log = folder / "log"
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
        """Start it, and wait until it is ready."""
        for _ in range(3):
            self.spawn()
            eventually("the service is ready", self._is_ready)
            if self._process is not None:
                return self
            self.port = free_port()
        raise RuntimeError(f"the service does not start:\n{self.log}")

    def spawn(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        serve = [sys.executable, "-m", "catchall.tools.cli", "serve", *SMALL, *self.flags]
        serve += ["--port", str(self.port), "--data-dir", str(self.data_dir)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", DIE_WITH_PARENT, str(os.getpid()), *serve],
                env=clean, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _is_ready(self) -> bool:
        """True also, with no process, when somebody was quicker to take the port."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            self._process = None
            if code == 1 and "something else listens" in self.log:
                return True
            raise RuntimeError(f"the service ended with exit code {code}:\n{self.log}")
        return self.ready

    @property
    def ready(self) -> bool:
        with contextlib.suppress(NotSent, OSError):
            client = Client(self.port, timeout_s=5.0)
            try:
                return client.request("GET", "/readyz").status == 200
            finally:
                client.close()
        return False

    def wait_until_ready(self) -> None:
        """All shards answer, and so many HTTP workers run as were asked for."""
        eventually("the service is ready again", lambda: self.ready and len(self.pids("http")) >= self._http_workers)

    @property
    def _http_workers(self) -> int:
        flags = list(self.flags)
        return int(flags[flags.index("--http-workers") + 1]) if "--http-workers" in flags else 1

    def stop(self, how: signal.Signals | None = signal.SIGTERM, code: int = 0) -> None:
        """Send a signal to the supervisor (None: it has one already); asserts its exit code and that no process is left."""
        assert self._process is not None
        if how is not None:
            self._process.send_signal(how)
        found = self._process.wait(WITHIN_S)
        self._process = None
        assert found == code, self.log
        assert not self._children()

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
        eventually("the children are gone", lambda: not [_kill(child) for child in self._children()])
        print(f"log of the service on port {self.port}:\n{self.log[-6000:]}")  # pytest shows it when the test failed
        assert "Traceback" not in self.log, self.log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    # ---- processes

    def pids(self, role: str, number: int | None = None) -> list[int]:
        """Processes by role: supervisor, shard (all, or that number), front (Granian's parent), http (its workers)."""
        if role == "supervisor":
            return [self._process.pid] if self._process is not None else []
        found = []
        for child in self._children():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = child.cmdline()
                if MARKS[role] in words and (number is None or words[-2] == str(number)):
                    found.append(child.pid)
        return found

    def signal(self, what: signal.Signals, role: str, number: int | None = None) -> int:
        """Send a signal to the first process of a role, or to that shard; returns its pid."""
        pid = eventually(f"a process {role} runs", lambda: self.pids(role, number))[0]
        os.kill(pid, what)
        return int(pid)

    def kill(self, role: str, number: int | None = None) -> int:
        """SIGKILL to the first process of a role, or to that shard, and wait until it is gone; returns its pid."""
        pid = self.signal(signal.SIGKILL, role, number)
        if role == "supervisor":
            assert self._process is not None
            self._process.wait(WITHIN_S)
            self._process = None
        eventually(f"{role} {pid} is gone", lambda: pid not in self.pids(role, number))
        return pid

    def kill_all(self) -> None:
        """SIGKILL to all of its processes, the supervisor first."""
        children = self._children()
        self.kill("supervisor")
        for child in children:
            _kill(child)
        eventually("all are gone", lambda: not self._children())

    def _children(self) -> list[psutil.Process]:
        run = str(self.data_dir / "run")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("CATCHALL_RUN") == run and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # ---- clients

    def client(self, timeout_s: float = 30.0) -> Client:
        """A new client, closed at the end. One for each thread."""
        self._clients.append(Client(self.port, timeout_s))
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


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def at_rest(data_dir: Path, root: Path | None = None) -> tuple[Iterable[Path], int]:
    """(segment files, rows of the ledgers' `segment` tables) of a service that has ended: both are to be empty."""
    import sqlite3

    folder = root or data_dir
    rows = 0
    for ledger in folder.glob("[0-9][0-9]/ledger.db"):
        with contextlib.closing(sqlite3.connect(ledger)) as database:
            rows += database.execute("select count(*) from segment").fetchone()[0]
    return [*folder.glob("[0-9][0-9]/q/*")], rows
