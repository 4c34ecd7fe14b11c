"""Whatever dies, and wherever: every acknowledged event is counted once, and none twice.

A *step* is a disk call, a store into a segment, or a statement of the ledger. The tests of this file die before each of them in
turn, in the writer and in the owner of a partition, and open the same folder again.
"""

import os
import random
from collections import Counter
from contextlib import suppress

import pytest
from faults import Died, Host, Mortal, Steps, append, flush, ledger_counts, settle

from catchall.engine.event_queue import EventQueue
from catchall.engine.partition import Partition

NAMES = [f"n{i}.example" for i in range(5)]
STEPS_MAX = 400  # more than any scenario here takes; the last ones die nowhere and prove the scenario itself


class Writer:
    """Appends events and keeps what was acknowledged and what was in flight when it died."""

    def __init__(self) -> None:
        self.acknowledged: Counter[str] = Counter()
        self.ambiguous: Counter[str] = Counter()

    def write(self, queue: EventQueue, names: list[str]) -> None:
        """One request after the other."""
        for name in names:
            self.ambiguous[name] += 1
            append(queue, f"+{name}\n".encode() * 40)
            self.ambiguous[name] -= 1
            self.acknowledged[name] += 1

    def check(self, counted: dict[str, tuple[int, int]]) -> None:
        for name in NAMES:
            events = counted.get(name, (0, 0))[0]
            assert events % 40 == 0, "a request is in the counts wholly or not at all"
            least = self.acknowledged[name]
            assert least <= events // 40 <= least + self.ambiguous[name], name


def leave_for_dead(partition: Partition) -> None:
    """What the kernel does for a process that was killed: descriptors close, the open transaction is gone."""
    with suppress(Exception):
        partition.reader.close()
    with suppress(Exception):
        partition.ledger.close()
    with suppress(OSError):
        os.close(partition._lock_fd)


@pytest.mark.parametrize("dies_at", range(1, STEPS_MAX, 3))
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
    mortal.bury()
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    settle(partition)
    assert not host.segments()
    assert not partition.ledger.positions(), "at rest there is no segment and no row of one"
    partition.close()


@pytest.mark.parametrize("dies_at", range(1, STEPS_MAX, 3))
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


@pytest.mark.parametrize("seed", range(120))
def test_any_mixture_of_deaths_flushes_and_full_disks_counts_everything_once(tmp_path, monkeypatch, seed):
    """Random interleavings, replayable by their seed."""
    draw = random.Random(seed)
    steps = Steps()
    mortal = Mortal(monkeypatch, steps)
    owner_steps = Steps()
    host, writer = Host(tmp_path), Writer()
    queue: EventQueue | None = None
    partition: Partition | None = None
    for _ in range(draw.randrange(20, 60)):
        action = draw.choice(("write", "write", "write", "drain", "flush", "sync", "kill writer", "kill owner", "die", "full"))
        try:
            if action == "write":
                queue = queue or host.queue(disk=steps.disk())
                with suppress(OSError):
                    writer.write(queue, draw.choices(NAMES, k=draw.randrange(1, 12)))
                for name in NAMES:
                    if steps.full:
                        writer.ambiguous[name] = 0  # refused before anything was touched
            elif action == "sync" and queue is not None:
                queue.sync()
                queue.tidy()
            elif action == "full":
                steps.full = not steps.full
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
    steps.full, steps.dies_at, owner_steps.dies_at = False, None, None
    mortal.bury()
    if partition is not None:
        leave_for_dead(partition)
    partition = host.own()
    settle(partition)
    writer.check(ledger_counts(partition))
    assert not host.segments()
    partition.close()
