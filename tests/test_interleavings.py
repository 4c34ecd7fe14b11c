"""A writer and an owner that meet at every step: nothing is missed, and nothing is counted twice.

One of the two goes through a scenario; before its n-th step (a disk call, a store or a load of a segment's words, a statement)
the other one acts. test_model.py does the same with everything at random; here it is every step, one by one.
"""

from collections import Counter

import pytest
from faults import Host, Mortal, Steps, append, flush, ledger_counts, loads_are_steps, settle

from catchall.engine.event_queue import EventQueue
from catchall.engine.partition import Partition
from catchall.storage.counts import pack

NAME = "n0.example"
LINES = f"+{NAME}\n".encode() * 60
WRITER_STEPS, OWNER_STEPS = 100, 80  # at least what the scenarios take


def look(partition: Partition) -> None:
    """All that an owner does between two reads: find dead writers, count, flush, retire."""
    partition.reader.discover()
    partition.reader.check_writers()
    while partition.drain(1 << 20):
        pass
    if partition.due:
        flush(partition)


def check(partition: Partition, acknowledged: int) -> None:
    settle(partition)
    assert ledger_counts(partition) == ({NAME: (acknowledged, 0)} if acknowledged else {})
    assert partition.reader.corrupt_files == 0


@pytest.mark.parametrize("at", range(WRITER_STEPS))
def test_an_owner_that_looks_before_any_step_of_a_writer_misses_nothing(tmp_path, monkeypatch, at):
    steps = Steps()
    Mortal(monkeypatch, steps)
    host = Host(tmp_path)
    partition = host.own()
    queue = host.queue(disk=steps.disk())
    steps.meanwhile(at, lambda: look(partition))
    for number in range(12):
        append(queue, LINES)
        if number % 5 == 4:
            queue.tidy()
            queue.sync()
    queue.close()
    assert steps.taken <= WRITER_STEPS
    check(partition, 12 * 60)
    assert not host.segments()
    partition.close()


def one_more(queue: EventQueue) -> None:
    append(queue, LINES)


def roll(queue: EventQueue) -> None:
    for _ in range(8):
        append(queue, LINES)
    queue.tidy()


def end(queue: EventQueue) -> None:
    append(queue, LINES)
    queue.close()


def last_words(queue: EventQueue) -> None:
    """It publishes and dies."""
    append(queue, LINES)
    for segment in (queue._current, queue._next):
        if segment is not None:
            segment.close()
    queue._forget_current()
    queue._next = None


@pytest.mark.parametrize("act", [one_more, roll, end, last_words])
@pytest.mark.parametrize("at", range(OWNER_STEPS))
def test_a_writer_that_acts_before_any_step_of_an_owner_is_counted_once(tmp_path, act, at):
    host, acknowledged = Host(tmp_path), Counter()
    queue = host.queue()

    def counted_append(lines: bytes) -> bool:
        done = EventQueue.append(queue, lines)
        acknowledged[NAME] += 60 * done
        return done

    queue.append = counted_append  # type: ignore[method-assign]
    for _ in range(7):
        append(queue, LINES)
    steps = Steps()
    partition = host.own(disk=steps.disk())
    steps.statements_of(partition.ledger)
    loads_are_steps(partition.reader, steps)
    steps.meanwhile(at, lambda: act(queue))
    for _ in range(3):
        look(partition)
    assert steps.taken <= OWNER_STEPS
    steps.in_peace()
    queue.close()
    check(partition, acknowledged[NAME])
    assert not host.segments()
    partition.close()


@pytest.mark.parametrize("at", range(20))
def test_a_read_at_any_step_of_a_flush_sees_everything_acknowledged(tmp_path, at):
    """Its base is the cache, the counts of the flush under way, or the row before or after it: just one of them."""
    for cached in (True, False):
        host, steps = Host(tmp_path / str(cached)), Steps()
        queue, partition = host.queue(), host.own(cache_names=100 if cached else 0)
        steps.statements_of(partition.ledger)
        seen = []

        def read(queue: EventQueue = queue, partition: Partition = partition, seen: list = seen) -> None:
            append(queue, LINES)
            assert partition.catch_up()
            packed = partition.known(NAME, NAME.encode())
            seen.append(partition.load({NAME: NAME.encode()})[NAME] if packed is None else packed)

        append(queue, LINES)
        settle(partition)
        append(queue, LINES)
        assert partition.catch_up()
        steps.meanwhile(at, read)
        flush(partition)
        steps.in_peace()
        assert seen in ([pack(180, 0)], [])
        assert seen or at > 8
        queue.close()
        check(partition, 180 if seen else 120)
        partition.close()
