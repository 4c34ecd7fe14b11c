"""Benchmarks of the service and of its event queue. Load goes to 127.0.0.1 only, for a bounded time.

    python -m catchall.tools.bench service [--rounds 5] [--seconds 4] [--storage sqlite] [--workers N] [--http-workers M]
        the whole service beside a bare Granian ASGI app with the same flags, in turn, loaded by wrk (Debian's package):
        single PUTs, GETs, and bulk NDJSON of 1,000 events over 100,000 domains, checked against the counts afterwards
    python -m catchall.tools.bench queue [--events 300000]
        appends to an event queue and reads from another process, beside multiprocessing.Queue

Only ratios taken in one run mean anything on a shared machine: figures are medians, with the spread beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from catchall.engine.disk import DISK, boot_id
from catchall.engine.event_queue import EventQueue
from catchall.engine.ids import Ids
from catchall.engine.pending import Pending
from catchall.engine.queue_reader import QueueReader

DOMAINS_SINGLE, DOMAINS_BULK, BODIES, EVENTS = 10_000, 100_000, 300, 1_000
CONNECTIONS = 64

SINGLE_LUA = """
local n = {start}
request = function()
  n = (n + 7919) % {domains}
  return wrk.format("{method}", "{before}d" .. n .. ".example.com{after}")
end
"""
BULK_LUA = """
local bodies = {{}}
for i = 0, {bodies} - 1 do
  local file = io.open("{folder}/" .. i .. ".ndjson", "rb")
  bodies[i] = file:read("*a")
  file:close()
end
local i = 0
local headers = {{["Content-Type"] = "application/x-ndjson"}}
request = function()
  i = (i + 1) % {bodies}
  return wrk.format("POST", "/events", headers, bodies[i])
end
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def get(port: int, path: str, accept: str = "*/*") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Accept": accept})
        return json.loads(connection.getresponse().read() or b"null")
    finally:
        connection.close()


def wait_for(port: int, path: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            get(port, path)
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing answers on port {port}")


@contextlib.contextmanager
def running(command: list[str], port: int, path: str) -> Iterator[None]:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, path)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wrk(port: int, script: Path, seconds: int) -> float:
    """Requests a second. Raises SystemExit if any answer was not 200."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script), f"http://127.0.0.1:{port}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in out:
        raise SystemExit(f"wrk saw failures:\n{out}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert rate is not None, out
    return float(rate[1])


def make_scripts(folder: Path) -> dict[str, Path]:
    draw = random.Random(1)
    names = ["".join(draw.choices(string.ascii_lowercase, k=14)) + draw.choice((".net", ".com", ".org", ".io", ".gov"))
             for _ in range(DOMAINS_BULK)]  # fmt: skip
    for i in range(BODIES):
        events = (
            json.dumps({"domain": draw.choice(names), "type": "bounced" if draw.random() < 0.1 else "delivered"})
            for _ in range(EVENTS)
        )
        (folder / f"{i}.ndjson").write_text("\n".join(events) + "\n")
    texts = {
        "put": SINGLE_LUA.format(start=0, domains=DOMAINS_SINGLE, method="PUT", before="/events/", after="/delivered"),
        "get": SINGLE_LUA.format(start=1, domains=DOMAINS_SINGLE, method="GET", before="/domains/", after=""),
        "bulk": BULK_LUA.format(bodies=BODIES, folder=folder),
    }
    for name, text in texts.items():
        (folder / f"{name}.lua").write_text(text)
    return {name: folder / f"{name}.lua" for name in texts}


def told(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def service(args: argparse.Namespace) -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scripts = make_scripts(folder)
        bare, ours = free_port(), free_port()
        flags = ["--workers", str(args.workers), "--http-workers", str(args.http_workers), "--storage", args.storage]
        bare_command = [sys.executable, "-m", "granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", str(bare),
                        "--workers", str(args.http_workers), "--loop", "uvloop", "--http", "1", "--no-ws", "--backlog", "4096",
                        "--backpressure", "4096", "--no-log", "catchall.tools.bare:app"]  # fmt: skip
        our_command = [sys.executable, "-m", "catchall.tools.cli", "serve", "--port", str(ours),
                       "--data-dir", str(folder / "data"), *flags]  # fmt: skip
        with running(bare_command, bare, "/"), running(our_command, ours, "/healthz"):
            figures: dict[str, list[float]] = {"bare": [], "put": [], "get": [], "put/bare": [], "get/bare": [], "bulk": []}
            for script in (scripts["put"], scripts["get"]):
                wrk(ours, script, 2)
            for _ in range(args.rounds):
                base_put = wrk(bare, scripts["put"], args.seconds)
                put = wrk(ours, scripts["put"], args.seconds)
                base_get = wrk(bare, scripts["get"], args.seconds)
                read = wrk(ours, scripts["get"], args.seconds)
                figures["bare"] += [base_put, base_get]
                figures["put"].append(put)
                figures["get"].append(read)
                figures["put/bare"].append(put / base_put)
                figures["get/bare"].append(read / base_get)
            drained(ours)
            for _ in range(args.rounds):
                before, started = get(ours, "/metrics", "application/json")["events"], time.monotonic()
                wrk(ours, scripts["bulk"], args.seconds)
                drained(ours)
                events = get(ours, "/metrics", "application/json")["events"] - before
                figures["bulk"].append(events / (time.monotonic() - started))
            lost = check_sums(ours)
        print(f"catchall {version('catchall')}, granian {version('granian')}, Python {sys.version.split()[0]}, "
              f"{os.cpu_count()} CPUs, storage {args.storage}, {args.workers} shards, {args.http_workers} HTTP workers, "
              f"{args.rounds} rounds of {args.seconds} s, {CONNECTIONS} connections")  # fmt: skip
        for name in ("bare", "put", "get"):
            print(f"{name:>10}  {told(figures[name])} requests/s")
        for name in ("put/bare", "get/bare"):
            ratios = figures[name]
            print(f"{name:>10}  {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
        print(f"{'bulk':>10}  {told(figures['bulk'])} events/s, until the last one is in the ledger")
        print(f"{'check':>10}  {lost}")


def drained(port: int) -> None:
    """Wait until every event is in the ledger."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        summary = get(port, "/metrics", "application/json")
        if summary["events_counted"] == summary["events"]:
            return
        time.sleep(0.02)
    raise SystemExit("the shards did not catch up within 120 s")


def check_sums(port: int) -> str:
    """Compare what was acknowledged with what was counted."""
    summary = get(port, "/metrics", "application/json")
    difference = summary["events"] - summary["events_counted"]
    return f"{summary['events']:,} events acknowledged, {difference} of them not counted"


# ---- the queue alone


def _produce_to_mp(queue: Any, events: int) -> None:
    for i in range(events):
        queue.put(b"+d%d.example.com\n" % (i % 1000))
    queue.put(None)


def _produce_to_ours(folder: str, events: int) -> None:
    queue = EventQueue(
        folder, partition=0, segment_size=4 << 20, boot_id=boot_id(), host_id=bytes(16), durable=True, disk=DISK,
        now_s=time.time, wants_next=lambda queue: None,
    )  # fmt: skip
    for i in range(events):
        line = b"+d%d.example.com\n" % (i % 1000)
        if not queue.append(line):
            queue.install(queue.make())
            queue.append(line)
    queue.close()


def queue_alone(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {"multiprocessing.Queue": [], "event queue": []}
    for _ in range(args.rounds):
        mp_queue: Any = context.Queue()
        producer = context.Process(target=_produce_to_mp, args=(mp_queue, args.events))
        producer.start()
        first = mp_queue.get()
        started = time.perf_counter()
        taken = 0
        while first is not None:
            first = mp_queue.get()
            taken += 1
        rates["multiprocessing.Queue"].append(taken / (time.perf_counter() - started))
        producer.join()
        rates["event queue"].append(_read_ours(context, args.events))
    ours, theirs = (statistics.median(rates[name]) for name in ("event queue", "multiprocessing.Queue"))
    for name, values in rates.items():
        print(f"{name:>22}  {told(values)} events/s from one process to another")
    print(f"{'ratio':>22}  {ours / theirs:.1f}")


def _read_ours(context: Any, events: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        producer = context.Process(target=_produce_to_ours, args=(folder, events))
        producer.start()
        ids = Ids([], 0, window_s=1.0)  # its events have none
        reader = QueueReader(folder, partition=0, boot_id=boot_id(), host_id=bytes(16), positions={}, disk=DISK, ids=ids)
        pending = Pending()
        started = None
        while sum(counted(pending)) < events:
            reader.discover()
            if reader.drain(pending, 1 << 20) and started is None:
                started = time.perf_counter()
        assert started is not None
        elapsed = time.perf_counter() - started
        producer.join()
        reader.close()
        return events / elapsed


def counted(pending: Pending) -> tuple[int, int]:
    deltas, _ = pending.fold()
    return sum(delta.delivered for delta in deltas.values()), sum(delta.bounced for delta in deltas.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m catchall.tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True)
    whole = commands.add_parser("service")
    whole.add_argument("--rounds", type=int, default=5)
    whole.add_argument("--seconds", type=int, default=4)
    whole.add_argument("--storage", default="sqlite", choices=("sqlite", "memory"))
    whole.add_argument("--workers", type=int, default=1)
    whole.add_argument("--http-workers", type=int, default=1)
    whole.set_defaults(run=service)
    alone = commands.add_parser("queue")
    alone.add_argument("--rounds", type=int, default=5)
    alone.add_argument("--events", type=int, default=300_000)
    alone.set_defaults(run=queue_alone)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
