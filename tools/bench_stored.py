"""How the service behaves on top of many stored domains. Load goes to 127.0.0.1 only, for a bounded time.

    python -m catchall.tools.bench_stored [--names 10000000] [--seconds 10] [--rate 20000]

Fills the ledgers of a new folder with that many random domains, then measures: start to ready; GET /domains/stats when idle and
while events arrive in bulk for random stored domains; GET of random stored domains meanwhile; memory of all processes.
Needs about 60 bytes of disk a domain, and some minutes to fill ten million.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from catchall.engine import data_folder
from catchall.engine.rules import partition_of
from catchall.storage.counts import Row
from catchall.storage.ledger import Ledger
from catchall.storage.ledger_rows import Tallies
from catchall.tools.bench import free_port, get, wait_for

BATCH = 1_000_000
EVENTS = 1_000
SAMPLE_PAUSE_S = 0.02


def name_of(number: int) -> str:
    """The same number is always the same name, and neighbours are far apart in key order."""
    return f"{(number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF):016x}.example.com"


def fill(data_dir: Path, names: int) -> None:
    lock = data_folder.lock(data_dir)
    manifest = data_folder.open_folder(data_dir, 16)
    data_folder.make_partitions(data_dir, 16)
    ledgers = [
        Ledger(
            data_folder.partition_folder(data_dir, p) / "ledger.db", host=manifest.host_id, component=manifest.host_id,
            partition=p, partitions=16, threshold=1000, synchronous="OFF", cache_bytes=64 << 20,
        )
        for p in range(16)
    ]  # fmt: skip
    for start in range(0, names, BATCH):
        rows: dict[int, list[Row]] = defaultdict(list)
        for number in range(start, min(names, start + BATCH)):
            name = name_of(number)
            rows[partition_of(name.encode(), 16)].append((name, 10, 0, 1, 1, 0))
        for p, some in rows.items():
            some.sort()
            tallies = ledgers[p].meta.tallies
            ledgers[p].write(some, {}, [], Tallies(0, 0, tallies.unknown + len(some)))
    for ledger in ledgers:
        ledger.close()
    (data_dir / "lock").unlink()
    del lock


class Sampler(threading.Thread):
    """Asks one path again and again, and keeps the latencies in milliseconds."""

    def __init__(self, port: int, names: int | None) -> None:
        super().__init__()
        self._port, self._names = port, names
        self.stop = False
        self.latencies: list[float] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        draw = random.Random(3)
        while not self.stop:
            path = "/domains/stats" if self._names is None else f"/domains/{name_of(draw.randrange(self._names))}"
            started = time.perf_counter()
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise SystemExit(f"{path} answered {answer.status}")
            self.latencies.append((time.perf_counter() - started) * 1e3)
            time.sleep(SAMPLE_PAUSE_S)
        connection.close()

    def told(self) -> str:
        ordered = sorted(self.latencies)
        return (f"p50 {statistics.median(ordered):.1f} ms, p99 {ordered[int(len(ordered) * 0.99)]:.1f} ms, "
                f"max {ordered[-1]:.1f} ms of {len(ordered)}")  # fmt: skip


def sample(port: int, names: int, seconds: float) -> tuple[str, str]:
    samplers = [Sampler(port, None), Sampler(port, names)]
    for sampler in samplers:
        sampler.start()
    time.sleep(seconds)
    for sampler in samplers:
        sampler.stop = True
        sampler.join()
    return samplers[0].told(), samplers[1].told()


def ingest(port: int, names: int, rate: int, stop: threading.Event, sent: list[int]) -> None:
    """Bulk requests for random stored domains, `rate` events a second at most."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    draw = random.Random(4)
    bodies = [
        "\n".join(json.dumps({"domain": name_of(draw.randrange(names)), "type": "delivered"}) for _ in range(EVENTS))
        for _ in range(200)
    ]
    due = time.monotonic()
    while not stop.is_set():
        connection.request("POST", "/events", draw.choice(bodies), {"Content-Type": "application/x-ndjson"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"a bulk request was answered {answer.status}")
        sent[0] += EVENTS
        due += EVENTS / rate
        time.sleep(max(0.0, due - time.monotonic()))
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data_dir, port = Path(temporary) / "data", free_port()
        fill(data_dir, args.names)
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "catchall.tools.cli", "serve", "--data-dir", str(data_dir), "--port", str(port)],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(port, "/readyz")
            print(f"{args.names:,} stored domains: ready after {time.perf_counter() - started:.2f} s")
            stats, reads = sample(port, args.names, args.seconds)
            print(f"  idle              stats {stats}\n                    GET   {reads}")
            stop, sent = threading.Event(), [0]
            load = threading.Thread(target=ingest, args=(port, args.names, args.rate, stop, sent))
            load.start()
            stats, reads = sample(port, args.names, args.seconds)
            stop.set()
            load.join()
            print(f"  {sent[0] / args.seconds:,.0f} events/s   stats {stats}\n                    GET   {reads}")
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            print(f"  memory of all processes: {sum(p.memory_info().rss for p in tree) / 2**20:,.0f} MiB resident")
            summary = get(port, "/domains/stats")
            print(f"  stats at the end: {summary}")
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
