"""Damage a data folder at random, open it again, and ask: is every count right, or was it said that it is not?

    python tests/damage.py 10000 [FIRST_SEED]       any failure is replayed by its seed; exit 1 if there is one

A Template is a folder as `kill -9` of everything leaves it, and what was acknowledged in it: ledgers of many pages with a -wal,
several writers, segments that were read wholly, in part and not at all. A trial copies one, damages one or two files and opens
every partition as a shard does: on LedgerDamaged it condemns the ledger and opens again, as a shard that is started again.

What nothing can notice is told apart from failures, by where the damage lies: see `_unnoticeable`.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from faults import HOST, Host, append, flush, settle

from catchall.engine import read_segment, segment
from catchall.engine.data_folder import Manifest, open_folder, partition_folder
from catchall.engine.event_queue import EventQueue
from catchall.engine.lines import with_id
from catchall.engine.partition import Partition
from catchall.engine.segment import HEADER_SIZE
from catchall.storage.counts import unpack
from catchall.storage.ledger_failures import LedgerDamaged

PARTITIONS, WRITERS, TEMPLATES, TRIALS_PER_TEMPLATE = 3, 2, 40, 25
OPENINGS_MAX = 3
Counts = dict[str, tuple[int, int]]


# ---- a folder that was left behind


@dataclass
class Template:
    """folder  as the page cache had it at the end; counts: what was acknowledged, by partition; read: bytes by segment"""

    folder: Path
    counts: list[Counts]
    read: dict[str, int] = field(default_factory=dict)


def make_template(folder: Path, seed: int) -> Template:
    draw = random.Random(seed)
    living = folder.with_name(folder.name + "-living")
    host = Host(living, PARTITIONS)
    (living / "manifest").write_text(Manifest(HOST, PARTITIONS, 1_790_000_000).text())
    (living / "lock").write_text("123\n")
    template = Template(folder, [{} for _ in range(PARTITIONS)])
    partitions = [host.own(number) for number in range(PARTITIONS)]
    queues: list[EventQueue] = []
    for number in range(PARTITIONS):
        mine = [host.queue(number) for _ in range(WRITERS)]
        for life in range(draw.choice((1, 2, 3))):
            if life:  # what its -wal held goes into the ledger's own pages
                partitions[number].close()
                partitions[number] = host.own(number)
            _live(draw, number, partitions[number], mine, template)
        queues += mine
    shutil.copytree(living, folder)
    for queue in queues:
        queue.close()
    for partition in partitions:
        partition.close()
    shutil.rmtree(living)
    return template


def _live(draw: random.Random, number: int, partition: Partition, queues: list[EventQueue], template: Template) -> None:
    """Write, sync, drain and flush at random; a queue that dies is followed by another."""
    names = [f"n{i}.p{number}.example" for i in range(draw.choice((3, 40, 1500)))]
    counts: Counter[str] = Counter()
    if len(names) > 100:  # a tree of several levels
        append(queues[0], b"".join(f"+{name}\n".encode() for name in names))
        counts.update(f"+{name}" for name in names)
    for _ in range(draw.randrange(10, 40)):
        queue = draw.choice(queues)
        match draw.choice(("write", "write", "write", "sync", "drain", "flush", "die")):
            case "write":
                for name in draw.choices(names, k=draw.randrange(1, 120)):
                    sign = draw.choice("+++-")
                    line = f"{sign}{name}\n".encode()
                    append(queue, with_id(line, b"%032x" % draw.getrandbits(128)) if draw.random() < 0.3 else line)
                    counts[sign + name] += 1
            case "sync":
                queue.tidy()
                queue.sync()
            case "drain":
                partition.reader.discover()
                partition.drain(draw.choice((100, 3000, 1 << 20)))
            case "flush" if partition.due:
                flush(partition)
            case "die" if draw.random() < 0.2:
                queue.close()
                queues[queues.index(queue)] = EventQueue(
                    queue.folder, partition=number, segment_size=queue._segment_size, boot_id=queue._boot_id,
                    host_id=queue._host_id, durable=True, disk=queue._disk, now_s=queue._now_s, wants_next=queue._wants_next,
                )  # fmt: skip
    before = template.counts[number]
    for name in names:
        delivered, bounced = before.get(name, (0, 0))
        if counts["+" + name] or counts["-" + name]:
            before[name] = delivered + counts["+" + name], bounced + counts["-" + name]
    template.read |= {name: position.consumed for name, position in partition.ledger.positions().items()}


# ---- damage


@dataclass
class Damage:
    kind: str
    path: Path
    start: int = 0  # the bytes that changed
    stop: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.path.parent.parent.name}/{self.path.parent.name}/{self.path.name} {self.start}-{self.stop}"


def _place(draw: random.Random, path: Path, size: int, width: int) -> int:
    """Where to damage: half of the time near the beginning, and in segments seldom in the empty end."""
    end = size
    if path.suffix == ".seg" and draw.random() < 0.9:
        end = HEADER_SIZE + int.from_bytes(path.read_bytes()[64:72], "little") + 64
    if path.suffix == ".seg" and draw.random() < 0.2:
        end = 208
    return draw.randrange(max(1, min(end, size) // width)) * width


def damage_one(draw: random.Random, folder: Path) -> list[Damage]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [6 if path.name.startswith("ledger.db") else 1 for path in files]
    path = draw.choices(files, weights)[0]
    size = path.stat().st_size
    kind = draw.choice(("truncate", "bit", "bit", "byte", "zero-length", "block", "page", "delete", "swap", "junk"))
    content = bytearray(path.read_bytes())
    start, stop = 0, size
    if kind in ("bit", "byte") and size:
        start = _place(draw, path, size, 1)
        stop = start + 1
        content[start] ^= 1 << draw.randrange(8) if kind == "bit" else draw.randrange(1, 256)
    elif kind == "truncate" and size:
        start = draw.randrange(size)
        del content[start:]
    elif kind == "zero-length":
        content.clear()
    elif kind in ("block", "page") and size:
        width = 512 if kind == "block" else 4096
        start = _place(draw, path, size, width)
        stop = min(size, start + width)
        content[start:stop] = bytes(stop - start) if kind == "block" else draw.randbytes(stop - start)
    elif kind == "delete":
        path.unlink()
        return [Damage(kind, path, start, stop)]
    elif kind == "swap":
        other = draw.choice(files)
        spare = path.with_name("spare")
        path.rename(spare)
        if other != path:
            other.rename(path)
        spare.rename(other)
        return [Damage(kind, path, 0, size), Damage(kind, other, 0, size)]
    else:
        start = size
        content += draw.randbytes(draw.randrange(1, 9000))
    path.write_bytes(content)
    return [Damage(kind, path, start, stop)]


def _unnoticeable(damage: Damage, template: Template) -> bool:
    """Only in segments: bytes that no sync had marked yet; a whole file of which nothing was counted; two names exchanged."""
    if damage.path.suffix != ".seg":
        return False
    if damage.kind == "swap":
        return True
    whole = next(template.folder.rglob(damage.path.name)).read_bytes()
    if damage.kind == "delete":
        return damage.path.stem not in template.read
    mark = segment.newest_mark(whole)
    covered = max(mark.offset if mark else 0, template.read.get(damage.path.stem, 0))
    return damage.start >= HEADER_SIZE + covered


# ---- a trial


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    said, logger = Said(), logging.getLogger("catchall")
    propagate = logger.propagate
    logger.addHandler(said)
    logger.propagate = False
    try:
        yield said.lines
    finally:
        logger.removeHandler(said)
        logger.propagate = propagate


@dataclass
class Outcome:
    seed: int
    damages: list[Damage]
    wrong: list[int] = field(default_factory=list)  # partitions whose counts are not what was acknowledged
    said: list[str] = field(default_factory=list)
    unnoticed: bool = False  # wrong and not said, but by a damage that nothing can notice
    failure: str = ""

    def __str__(self) -> str:
        return f"seed {self.seed}: {'; '.join(map(str, self.damages))}: {self.failure or self.wrong} {self.said}"


def open_and_settle(host: Host, number: int, host_id: str) -> tuple[Partition, int]:
    """As shards that exit on damage and are started again. Returns the partition at rest, and how often it was opened."""
    for opening in range(1, OPENINGS_MAX + 1):
        partition = host.own(number, host_id=host_id)
        try:
            settle(partition)
            while partition.scrub.step():
                pass
            for _ in partition.ledger.scan(0):
                pass
        except LedgerDamaged as damage:
            partition.condemn(str(damage))
            with suppress(Exception):
                partition.close()
        else:
            return partition, opening
    raise AssertionError(f"partition {number} is damaged after {OPENINGS_MAX} openings")


def counts_of(partition: Partition, names: list[str]) -> Counts:
    return {name: unpack(packed) for name, packed in partition.ledger.load(names).items() if packed}


def trial(template: Template, folder: Path, seed: int) -> Outcome:
    draw = random.Random(seed)
    shutil.copytree(template.folder, folder)
    damages = [damage for _ in range(draw.choice((1, 1, 1, 2))) for damage in damage_one(draw, folder)]
    outcome = Outcome(seed, damages)
    try:
        with listening() as lines:
            manifest = open_folder(folder, PARTITIONS)
        host = Host(folder, PARTITIONS)
        for number in range(PARTITIONS):
            _look(template, host, number, manifest.host_id, lines, outcome)
    except Exception as error:  # noqa: BLE001  # whatever it is, it would be a crash of a shard, again and again
        outcome.failure = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    return outcome


def _look(template: Template, host: Host, number: int, host_id: str, before: list[str], outcome: Outcome) -> None:
    with listening() as said:
        partition, _ = open_and_settle(host, number, host_id)
    try:
        truth = template.counts[number]
        with listening() as late:
            right = counts_of(partition, list(truth)) == truth
        outcome.said += said + late
        with suppress(LedgerDamaged):
            right &= partition.ledger.meta.tallies == partition.ledger.count_tallies()
        present = partition.corrupt_files()
        if not right:
            outcome.wrong.append(number)
            if not (said or late or before):
                here = [damage for damage in outcome.damages if damage.path.is_relative_to(partition_folder(host.root, number))]
                outcome.unnoticed = any(_unnoticeable(damage, template) for damage in here)
                if not outcome.unnoticed:
                    outcome.failure = f"partition {number} is wrong, and nothing was said"
        assert not (partition.set_aside and not present), "what was set aside is there to be seen"
    finally:
        partition.close()


def trials(folder: Path, seeds: range) -> Iterator[Outcome]:
    templates: dict[int, Template] = {}
    wait, read_segment.UNWRITTEN_WAIT_S = read_segment.UNWRITTEN_WAIT_S, 0.0  # no store is on its way: nobody lives
    try:
        for seed in seeds:
            kind = seed // TRIALS_PER_TEMPLATE % TEMPLATES
            if kind not in templates:
                templates[kind] = make_template(folder / f"template-{kind}", kind)
            yield trial(templates[kind], folder / "trial", seed)
    finally:
        read_segment.UNWRITTEN_WAIT_S = wait


def main() -> int:
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    logging.disable(logging.NOTSET)
    shm = Path("/dev/shm")
    began = time.monotonic()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        for outcome in trials(Path(folder), range(first, first + count)):
            totals["trials"] += 1
            totals["all counts right" if not outcome.wrong else "counts missing"] += 1
            totals["said"] += bool(outcome.said)
            totals["wrong, by what nothing can notice"] += outcome.unnoticed
            if outcome.failure:
                totals["FAILED"] += 1
                print(outcome, flush=True)
    print(", ".join(f"{name}: {n}" for name, n in totals.items()), f"in {time.monotonic() - began:.0f} s")
    return 1 if totals["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
