"""Whatever dies, and wherever: every acknowledged event is counted once, and none twice.

A *step* is a disk call, a store into a segment, or a statement of the ledger. The tests of this file die before each of them in
turn, in the writer and in the owner of a partition, and open the same folder again.
"""

import random
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import faults
import pytest
from faults import Died, Host, Mortal, Steps, append, flush, leave_for_dead, ledger_counts, settle

from catchall.engine import lines
from catchall.engine.data_folder import partition_folder
from catchall.engine.disk import DISK
from catchall.engine.event_queue import EventQueue
from catchall.engine.ids import event_id
from catchall.engine.partition import Partition, lock_partition
from catchall.engine.rules import partition_of, shard_of
from catchall.storage.counts import pack

NAMES = [f"n{i}.example" for i in range(5)]
WRITER_STEPS, OWNER_STEPS = 205, 95  # at least what the scenarios take, so that the last ones die nowhere


class Writer:
    """Appends events and keeps what was acknowledged and what was in flight when it died."""

    def __init__(self) -> None:
        self.acknowledged: Counter[str] = Counter()
        self.ambiguous: Counter[str] = Counter()

    def write(self, queue: EventQueue, names: list[str]) -> None:
        """One request after the other."""
        for name in names:
            self.ambiguous[name] += 1
            try:
                append(queue, f"+{name}\n".encode() * 40)
            except OSError:
                self.ambiguous[name] -= 1  # refused before anything was touched
                raise
            self.ambiguous[name] -= 1
            self.acknowledged[name] += 1

    def check(self, counted: dict[str, tuple[int, int]]) -> None:
        for name in NAMES:
            events = counted.get(name, (0, 0))[0]
            assert events % 40 == 0, "a request is in the counts wholly or not at all"
            least = self.acknowledged[name]
            assert least <= events // 40 <= least + self.ambiguous[name], name


class Resender(Writer):
    """All its events have ids. It sends any request again at any time, whoever took it, and all of them in the end."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw
        self.requests: list[tuple[str, bytes]] = []  # a name, and lines of it

    def write(self, queue: EventQueue, names: list[str]) -> None:
        for name in names:
            line, number = lines.encode(b"+", name.encode()), len(self.requests)
            ids = [event_id(f"{number} {at}", b"+", name.encode()) for at in range(40)]
            self.requests.append((name, b"".join(lines.with_id(line, digits) for digits in ids)))
            append(queue, self.requests[-1][1])
            if self.draw.random() < 0.5:
                append(queue, self.draw.choice(self.requests)[1])

    def resend_all(self, queue: EventQueue) -> None:
        for _, request in self.requests:
            append(queue, request)

    def check(self, counted: dict[str, tuple[int, int]]) -> None:
        wanted = Counter(name for name, _ in self.requests)
        assert counted == {name: (40 * n, 0) for name, n in wanted.items()}, "all of it once"


@pytest.mark.parametrize("dies_at", range(1, WRITER_STEPS + 1))
def test_a_writer_that_dies_at_any_step_loses_nothing_it_acknowledged(tmp_path, monkeypatch, dies_at):
    steps = Steps(dies_at)
    mortal = Mortal(monkeypatch, steps)
    host, writer = Host(tmp_path), Writer()
    with suppress(Died):
        queue = host.queue(disk=steps.disk())
        writer.write(queue, [NAMES[i % 5] for i in range(60)])
        queue.sync()
        queue.tidy()
        queue.close()
    assert steps.taken <= WRITER_STEPS
    mortal.bury()
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    settle(partition)
    assert not host.segments()
    assert not partition.ledger.positions(), "at rest there is no segment and no row of one"
    partition.close()


@pytest.mark.parametrize("dies_at", range(1, OWNER_STEPS + 1))
def test_an_owner_that_dies_at_any_step_counts_everything_once(tmp_path, dies_at):
    host, writer = Host(tmp_path), Writer()
    queue = host.queue()
    writer.write(queue, [NAMES[i % 5] for i in range(30)])
    steps = Steps(dies_at)
    partition = None
    with suppress(Died):
        partition = host.own(disk=steps.disk())
        steps.statements_of(partition.ledger)
        partition.drain(1 << 20)
        flush(partition)
        writer.write(queue, [NAMES[i % 5] for i in range(30)])
        settle(partition)
    assert steps.taken <= OWNER_STEPS
    if partition is not None:
        leave_for_dead(partition)
    writer.write(queue, NAMES)
    queue.close()
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    assert not host.segments()
    assert not partition.ledger.positions()
    partition.close()


def test_a_segment_whose_name_comes_back_after_it_was_retired_is_not_counted_again(tmp_path):
    """A power cut may take back an unlink whose folder was not synced yet: the ledger still knows the name."""
    host, writer = Host(tmp_path), Writer()
    queue = host.queue()
    writer.write(queue, NAMES)
    queue.close()
    copies = {path: path.read_bytes() for path in host.segments()}
    partition = host.own()
    partition.reader.check_writers()
    partition.drain(1 << 20)
    flush(partition)
    assert not host.segments()
    assert partition.ledger.positions(), "the row goes with the flush after the unlink, not before"
    partition.close()
    for path, content in copies.items():
        path.write_bytes(content)
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    assert not host.segments()
    partition.close()


def test_rows_of_segments_that_are_gone_are_dropped_at_the_next_start(tmp_path):
    host, writer = Host(tmp_path), Writer()
    queue = host.queue()
    writer.write(queue, NAMES)
    queue.close()
    partition = host.own()
    partition.reader.check_writers()
    partition.drain(1 << 20)
    flush(partition)
    partition.close()
    partition = host.own()
    settle(partition)
    assert not partition.ledger.positions()
    partition.close()


@pytest.mark.parametrize("dies_at", range(1, 50, 4))
def test_an_owner_whose_process_really_ends_at_a_step_is_followed_by_one_that_counts_everything_once(tmp_path, dies_at):
    host, writer = Host(tmp_path), Writer()
    queue = host.queue()
    writer.write(queue, [NAMES[i % 5] for i in range(30)])
    queue.close()
    ended = subprocess.run([sys.executable, faults.__file__, "own", str(tmp_path), str(dies_at)], check=False, timeout=60)
    assert ended.returncode in (0, 9)
    assert ended.returncode == 9 or dies_at > 20
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    assert not host.segments()
    partition.close()


def test_another_number_of_shards_is_just_another_start(tmp_path):
    host, writer = Host(tmp_path, partitions=8), Writer()
    queues = [host.queue(partition) for partition in range(8)]
    for shards in (2, 5, 8, 1, 3):
        owned = [[host.own(p) for p in range(8) if shard_of(p, shards) == shard] for shard in range(shards)]
        for name in NAMES:
            writer.write(queues[partition_of(name.encode(), 8)], [name] * 20)
        for partition in (partition for partitions in owned for partition in partitions):
            assert lock_partition(tmp_path, partition.number, DISK) is None, "it has one owner"
            partition.reader.discover()
            partition.drain(5000)
            flush(partition)
            leave_for_dead(partition)
    counted: dict[str, tuple[int, int]] = {}
    for number, queue in enumerate(queues):
        queue.close()
        partition = host.own(number)
        settle(partition)
        assert not counted.keys() & ledger_counts(partition).keys(), "a name is counted in one partition"
        counted |= ledger_counts(partition)
        partition.close()
    writer.check(counted)


def test_a_full_disk_keeps_what_was_cut_and_counts_it_later(tmp_path):
    host, writer = Host(tmp_path), Writer()
    queue = host.queue()
    partition = host.own()
    run = partition.ledger._db.execute
    run(f"pragma max_page_count = {run('pragma page_count').fetchone()[0]}")
    filler = b"".join(b"+%b\n" % (b"x" * 50 + b"%06d.example" % i) for i in range(2000))
    for _ in range(3):
        append(queue, filler)
        writer.write(queue, NAMES)
        assert partition.catch_up()
        flight = partition.begin_flush()
        writer.write(queue, NAMES)
        assert partition.catch_up()
        flight.run(partition.ledger, partition.cache, partition.reader)
        partition.end_flush(flight)
        assert flight.full is not None
        for name in NAMES:
            key = name.encode()
            seen = partition.known(name, key) or partition.load({name: key})[name]
            assert seen == pack(40 * writer.acknowledged[name], 0)
    assert flush(partition).full is not None, "and with nothing new since the last try"
    assert len(list(host.segments())) > 3, "nothing was retired"
    assert not partition.ledger.positions()
    run("pragma max_page_count = 1000000")
    settle(partition)
    writer.check(ledger_counts(partition))
    leave_for_dead(partition)
    queue.close()
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    assert ledger_counts(partition)["x" * 50 + "000000.example"] == (3, 0)
    assert not host.segments()
    partition.close()


def test_a_ledger_and_its_queues_hold_nothing_else_at_rest(tmp_path):
    host, writer = Host(tmp_path), Writer()
    queue, partition = host.queue(), host.own()
    writer.write(queue, NAMES * 30)
    queue.close()
    settle(partition)
    partition.close()
    files = {path.name for path in partition_folder(tmp_path, 0).rglob("*") if path.is_file()}
    assert files == {"lock", "ledger.db"}


@pytest.mark.parametrize("seed", range(200))
def test_any_mixture_of_deaths_flushes_and_full_disks_counts_everything_once(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    mixture(tmp_path, monkeypatch, draw, Writer())


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_them_and_of_resends_counts_everything_once(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    mixture(tmp_path, monkeypatch, draw, Resender(draw))


def mixture(root: Path, monkeypatch: pytest.MonkeyPatch, draw: random.Random, writer: Writer) -> None:
    """Random interleavings, replayable by their seed."""
    steps = Steps()
    mortal = Mortal(monkeypatch, steps)
    owner_steps = Steps()
    host = Host(root)
    queue: EventQueue | None = None
    partition: Partition | None = None
    for _ in range(draw.randrange(20, 60)):
        action = draw.choice(("write", "write", "write", "drain", "flush", "sync", "kill writer", "kill owner", "die", "full"))
        try:
            if action == "write":
                queue = queue or host.queue(disk=steps.disk())
                with suppress(OSError):
                    writer.write(queue, draw.choices(NAMES, k=draw.randrange(1, 12)))
            elif action == "sync" and queue is not None:
                queue.sync()
                queue.tidy()
            elif action == "full":
                steps.full = owner_steps.full = not steps.full
            elif action == "die":
                victim = draw.choice((steps, owner_steps))
                victim.dies_at = victim.taken + draw.randrange(1, 30)
            elif action == "kill writer" and queue is not None:
                mortal.bury()
                queue = None
            elif action == "kill owner" and partition is not None:
                leave_for_dead(partition)
                partition = None
            elif action in ("drain", "flush"):
                if partition is None:
                    partition = host.own(disk=owner_steps.disk())
                    owner_steps.statements_of(partition.ledger)
                partition.reader.discover()
                partition.drain(draw.choice((100, 5000, 1 << 20)))
                if action == "flush" and partition.due:
                    flush(partition)
        except Died:
            if steps.dies_at is not None and steps.taken >= steps.dies_at:
                steps.dies_at = None
                mortal.bury()
                queue = None
            else:
                owner_steps.dies_at = None
                if partition is not None:
                    leave_for_dead(partition)
                partition = None
    steps.full, steps.dies_at = False, None
    mortal.bury()
    if partition is not None:
        leave_for_dead(partition)
    if isinstance(writer, Resender):
        queue = host.queue()
        writer.resend_all(queue)
        queue.close()
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    assert not host.segments()
    held = {hash: (age, digest) for hash, digest, age in partition.ledger.ids()[0]}
    assert partition.ids._held == held
    partition.close()
    partition = host.own()
    assert partition.set_aside == 0, "all checks of the ledger hold"
    partition.close()


def test_a_ledger_set_aside_while_a_writer_lives_loses_nothing_that_is_acknowledged_afterwards(tmp_path):
    host, writer = Host(tmp_path), Writer()
    queue = host.queue()
    writer.write(queue, NAMES)
    partition = host.own()
    settle(partition)
    partition.condemn("a later state is known")
    partition.close()
    partition = host.own()
    after = Writer()
    after.write(queue, NAMES * 30)  # over several segments, the first of them older than the new ledger
    queue.close()
    settle(partition)
    after.check(ledger_counts(partition))
    partition.close()
