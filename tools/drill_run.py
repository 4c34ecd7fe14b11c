"""One run of a plan: load, faults, comparisons (crash_drill.py has what is promised)."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from catchall.engine.rules import status
from catchall.tools.drill_disk import FLAGS as DISK_FLAGS
from catchall.tools.drill_disk import small_disk
from catchall.tools.drill_load import Load
from catchall.tools.drill_mongod import AWAY, Mongo, mongod_binary, replica_set
from catchall.tools.drill_plan import Planned
from catchall.tools.drill_process import own_address
from catchall.tools.drill_proxy import Proxy
from catchall.tools.drill_report import MISMATCH, Report
from catchall.tools.drill_service import LOG_SHOWN, Service, ServiceFailed, at_rest
from catchall.tools.drill_stage import FAILURES, Stage
from catchall.tools.polling import WITHIN_S, eventually

MONGODB_FLAGS = ("--set", "mongodb.push_interval=50ms", "--set", "mongodb.server_selection_timeout=300ms",
                 "--set", "mongodb.connect_timeout=300ms", "--set", "mongodb.socket_timeout=2s",
                 "--set", "mongodb.backoff_max=500ms")  # fmt: skip
THRESHOLD = 40  # low, so that domains have every status


class CannotRun(Exception):
    """The drill could not begin; the message says why."""


class CountsDiffer(Exception):
    """A comparison failed; the report has the mismatches."""


def run(args: argparse.Namespace, plan: Sequence[Planned], command: str, folder: Path) -> Report:
    """Do all of a plan, or as much of it as goes well. Raises CannotRun, NoMongod, NoMount."""
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    with ExitStack() as stack:
        disk = mongo = proxy = None
        if any("small disk" in planned.kind.needs for planned in plan):
            (folder / "data").mkdir()
            disk = stack.enter_context(small_disk(folder / "data"))
        flags = service_flags(args, folder) + (DISK_FLAGS if disk else ())
        if args.storage == "mongodb":
            binary = args.mongodb_binary or mongod_binary()
            if not os.access(binary, os.X_OK):
                raise CannotRun(f"{binary} is no program")
            mongo = stack.enter_context(replica_set(folder / "mongodb", args.replicas, binary))
            uri = mongo.uri
            if args.replicas == 1:
                proxy = stack.enter_context(Proxy(mongo.nodes[0].port))
                uri = f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true"
            flags += ("--mongodb", uri, *MONGODB_FLAGS)
        service = Service(folder, *flags, host=own_address())  # others must not take its port while it is down
        stack.callback(service.end)
        load = Load(service, names=names(args.seed, args.names), threads=args.threads, seed=args.seed, ids=args.ids)
        report = Report(args.seed, command, shown, load.record)
        stage = Stage(folder, service, load, args.within, mongo, proxy, disk)
        try:
            service.start()
        except FAILURES as error:
            raise CannotRun(str(error)) from error
        try:
            hurt(stage, plan, report, args.every)
            finish(stage, report, durable=args.storage != "memory")
        except CountsDiffer as error:
            report.code, report.failure = MISMATCH, str(error)
        except FAILURES as error:
            report.code, report.failure = MISMATCH, str(error)
            if service.ready:
                with suppress(TimeoutError):
                    report.mismatches = load.record.mismatches(load.record.counted(service.client()))
        report.tracebacks = service.tracebacks
        report.log_end = service.log[-LOG_SHOWN:]
        if report.tracebacks and report.failure is None:
            report.code, report.failure = MISMATCH, f"the service has logged a traceback: {report.tracebacks[0]}"
        return report


def service_flags(args: argparse.Namespace, folder: Path) -> tuple[str, ...]:
    flags = ["--workers", str(args.workers), "--http-workers", str(args.http_workers), "--fsync", args.fsync,
             "--flush-interval", "50ms", "--threshold", str(THRESHOLD), "--storage", args.storage]  # fmt: skip
    if args.storage == "memory":
        flags += ["--set", f"storage.memory_dir={folder}"]
    return tuple(flags)


def names(seed: int, count: int) -> list[str]:
    return [f"d{number}.seed-{seed % (1 << 32)}.example" for number in range(count)]


def hurt(stage: Stage, plan: Sequence[Planned], report: Report, every: int) -> None:
    """Load and faults, a comparison after every few of them and after the last. Raises FAILURES, CountsDiffer."""
    with stage.load:
        for planned in plan:
            stage.under_load()
            time.sleep(planned.wait_ms / 1000)
            report.begin_fault(planned)
            planned.kind.apply(stage, planned.params)
            stage.recovered()
            report.end_fault(len(plan))
            if planned.number % every == 0 or planned is plan[-1]:
                with stage.load.paused():
                    compare(stage, report)


def finish(stage: Stage, report: Report, durable: bool) -> None:
    """What was counted is counted after a stop and a start, and at rest nothing is left in the queues."""
    if durable:
        stage.service.stop()
        if (left := at_rest(stage.service.data_dir)) != ([], 0):
            raise ServiceFailed(f"at rest, {len(left[0])} segments and {left[1]} rows about segments are left")
        stage.service.start()
        compare(stage, report, restarted=True)
    stage.service.stop()


def compare(stage: Stage, report: Report, restarted: bool = False) -> None:
    """Every domain's counts, and what is made of them. Nobody writes. Raises CountsDiffer, FAILURES."""
    stage.service.wait_until_ready()
    client = stage.service.client()
    counts = stage.load.record.counted(client)
    report.mismatches = stage.load.record.mismatches(counts)
    report.note_checkpoint(counts, restarted)
    if report.mismatches:
        raise CountsDiffer(f"{len(report.mismatches)} counts are not what was promised")
    if stage.mongo is not None:
        compare_copy(stage.mongo, counts)
        return
    stats, expected = client.read("/domains/stats"), totals(counts)
    if {field: stats[field] for field in expected} != expected:
        raise CountsDiffer(f"the totals are {stats}, and the domains make {expected}")


def compare_copy(mongo: Mongo, counts: dict[str, tuple[int, int]]) -> None:
    """The view in MongoDB shows the same, soon. Raises CountsDiffer."""
    wanted = {name: pair for name, pair in counts.items() if any(pair)}
    found: dict[str, tuple[int, int]] = {}
    with mongo.client() as client:

        def same() -> bool:
            documents = client.catchall.domain_status.find()
            found.clear()
            found.update({document["_id"]: (document["delivered"], document["bounced"]) for document in documents})
            return found == wanted

        try:
            eventually("the copy is the same", same, errors=AWAY)
        except TimeoutError:
            names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            first = f"{names[0]} is {found.get(names[0])} there and {wanted.get(names[0])} here" if names else "it is away"
            raise CountsDiffer(f"the copy in MongoDB differs in {len(names)} domains after {WITHIN_S:.0f} s: {first}") from None


def totals(counts: dict[str, tuple[int, int]]) -> dict[str, int]:
    """What GET /domains/stats has to say of these domains."""
    found = Counter(status(*pair, THRESHOLD).replace("-", "_") for pair in counts.values() if any(pair))
    return {field: found[field] for field in ("catch_all", "not_catch_all", "unknown")} | {"total": found.total()}
