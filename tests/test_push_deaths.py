"""A push that dies, is cut off or meets a restored MongoDB before any of its steps: afterwards the copy equals the ledger.

Its steps are the calls to MongoDB, before and after each and in the middle of a batch, and the ledger's statements. MongoDB is
the stand-in of mongo_stand_in.py, which test_copy_contract.py holds to the real one.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from faults import HOST, Died, Host, Steps, append, flush, leave_for_dead, ledger_counts, settle
from mongo_stand_in import MemoryCopy, MemoryServer, push
from power import Power

from catchall.engine.event_queue import EventQueue
from catchall.engine.partition import Partition
from catchall.engine.push import Superseded
from catchall.storage.mongodb import MongoError, MongoUnavailable

NAMES = [f"n{i}.example" for i in range(5)]
STEPS = 72  # one more than the scenario takes, so that the last death is none
kept_or_scanned = pytest.mark.parametrize("keep_rows", [True, False], ids=["rows kept", "ledger scanned"])


def flushes(queue: EventQueue, partition: Partition) -> Iterator[None]:
    """Three flushes, each to be pushed; names that are new, and names that MongoDB knows."""
    for names in (NAMES[:2], NAMES[1:4], NAMES[3:]):
        append(queue, "".join(f"+{name}\n-{name} 2\n" for name in names).encode())
        settle(partition)
        yield


def push_until_it_holds(partition: Partition, copy: MemoryCopy) -> None:
    if not push(partition, copy)[1]:
        assert push(partition, copy, from_zero=True)[1], "nobody else claims it"


def assert_copy_equals_ledger(server: MemoryServer, partition: Partition) -> None:
    meta = partition.ledger.meta
    for name, delivered, bounced, *times in (row for piece in partition.ledger.scan(0) for row in piece):
        document = server.documents.get(name, {})
        shares = (document.get("delivered", {}).get(meta.component), document.get("bounced", {}).get(meta.component))
        assert shares == (delivered or None, bounced or None), name
        assert [document.get(at, 0) for at in ("first_at", "last_delivered_at", "last_bounced_at")] == times, name
    assert server.fences[f"{meta.component}/00"].get("flush") == meta.flush == meta.pushed


@kept_or_scanned
@pytest.mark.parametrize("power", ["stays on", "is cut"])
@pytest.mark.parametrize("dies_at", range(1, STEPS + 1))
def test_an_owner_that_dies_at_any_step_of_a_push_is_followed_by_one_that_makes_the_copy_equal(
    tmp_path, dies_at, power, keep_rows
):
    host, server, steps, supply = Host(tmp_path), MemoryServer(), Steps(dies_at), Power(tmp_path / "00")
    queue = host.queue()
    supply.before_opening()
    partition = host.own(keep_rows=keep_rows)
    steps.statements_of(partition.ledger)
    supply.opened(partition.ledger)
    with suppress(Died):
        for _ in flushes(queue, partition):
            push(partition, MemoryCopy(server, lambda _: steps.step()))
    assert steps.taken <= STEPS
    leave_for_dead(partition)
    if power == "is cut":
        supply.cut_ledger(random.Random(dies_at))
    partition = host.own(keep_rows=keep_rows)
    settle(partition)
    push_until_it_holds(partition, MemoryCopy(server))
    assert_copy_equals_ledger(server, partition)
    queue.close()
    partition.close()


FLUSH_STEPS, PUSH_STEPS = 30, 10  # of one flush, and of one push; a few more than they take


@pytest.mark.parametrize("dies_at", range(1, FLUSH_STEPS + 1))
def test_nothing_is_pushed_that_a_power_cut_takes_back(tmp_path, dies_at):
    """The COMMIT in which an owner is killed may be visible and not durable: its successor makes it durable, then pushes.

    The successor dies too, at any step of its push, and power is cut.
    """
    for dies_again_at in range(1, PUSH_STEPS + 1):
        root = tmp_path / str(dies_again_at)
        host, server, supply = Host(root), MemoryServer(), Power(root / "00")
        queue = host.queue()
        for at, writes in ((None, True), (dies_at, True), (dies_again_at, False)):
            steps = Steps()
            supply.before_opening()
            partition = host.own()
            steps.statements_of(partition.ledger)
            supply.opened(partition.ledger)
            with suppress(Died):
                steps.dies_at = at
                if writes:
                    append(queue, b"+n0.example\n+n1.example\n")
                    settle(partition)
                push(partition, MemoryCopy(server, lambda _, steps=steps: steps.step()))
            leave_for_dead(partition)
        supply.cut_ledger(random.Random(dies_at * PUSH_STEPS + dies_again_at))
        partition = host.own()
        for name, (delivered, _) in ledger_counts(partition).items():
            copied = server.documents.get(name, {}).get("delivered", {}).get(HOST, 0)
            assert copied <= delivered, f"MongoDB has {copied}, and the ledger {delivered}"
        push(partition, MemoryCopy(server))
        queue.close()
        settle(partition)
        push_until_it_holds(partition, MemoryCopy(server))
        assert_copy_equals_ledger(server, partition)
        assert ledger_counts(partition)["n0.example"] == (2, 0)
        partition.close()


class Once:
    """Does something at the n-th point of all pushes."""

    def __init__(self, on: int, action: Callable[[], None]) -> None:
        self.points, self._on, self._action = 0, on, action

    def __call__(self, _: str) -> None:
        self.points += 1
        if self.points == self._on:
            self._action()


def no_answer() -> None:
    raise MongoUnavailable("the connection was lost")


POINTS = 21  # of three pushes


@kept_or_scanned
@pytest.mark.parametrize("lost_at", range(1, POINTS + 1))
def test_a_push_that_loses_its_connection_anywhere_is_made_good_by_the_next(tmp_path, lost_at, keep_rows):
    host, server = Host(tmp_path), MemoryServer()
    queue, partition = host.queue(), host.own(keep_rows=keep_rows)
    copy = MemoryCopy(server, Once(lost_at, no_answer))
    for _ in flushes(queue, partition):
        with suppress(MongoError):
            push(partition, copy)
    push_until_it_holds(partition, copy)
    assert_copy_equals_ledger(server, partition)
    queue.close()
    partition.close()


@kept_or_scanned
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "and the owner dies"])
@pytest.mark.parametrize("restored_at", range(1, POINTS + 1))
def test_a_copy_that_is_put_back_to_an_earlier_state_at_any_step_of_a_push_catches_up(
    tmp_path, restored_at, dies, keep_rows
):
    """To every state that there was before a push: the fence goes back, the claim is another's, and rows are gone."""
    for chosen in range(3):
        root = tmp_path / str(chosen)
        host, server = Host(root), MemoryServer()
        states = []

        def put_back(states: list = states, server: MemoryServer = server, chosen: int = chosen) -> None:
            server.restore(states[min(chosen, len(states) - 1)])
            if dies:
                raise Died

        queue, partition = host.queue(), host.own(keep_rows=keep_rows)
        copy = MemoryCopy(server, Once(restored_at, put_back))
        with suppress(Died):
            for _ in flushes(queue, partition):
                states.append(server.snapshot())
                push(partition, copy)
        leave_for_dead(partition)
        partition = host.own(keep_rows=keep_rows)
        append(queue, b"+late.example\n")  # what makes the next push due
        settle(partition)
        push_until_it_holds(partition, MemoryCopy(server))
        assert_copy_equals_ledger(server, partition)
        queue.close()
        partition.close()


@kept_or_scanned
@pytest.mark.parametrize("flushed_at", range(1, POINTS + 1))
def test_a_flush_that_commits_during_a_push_is_in_the_copy_after_the_next(tmp_path, flushed_at, keep_rows):
    host, server = Host(tmp_path), MemoryServer()
    queue, partition = host.queue(), host.own(keep_rows=keep_rows)

    def more() -> None:
        append(queue, b"".join(b"+%b\n" % name.encode() for name in (*NAMES, "late.example")))
        settle(partition)

    copy = MemoryCopy(server, Once(flushed_at, more))
    for _ in flushes(queue, partition):
        push(partition, copy)
    push_until_it_holds(partition, copy)
    assert_copy_equals_ledger(server, partition)
    queue.close()
    partition.close()


@kept_or_scanned
def test_a_flush_for_which_the_disk_was_full_is_in_no_copy_before_it_is_in_the_ledger(tmp_path, keep_rows):
    host, server, steps = Host(tmp_path), MemoryServer(), Steps()
    queue, partition = host.queue(), host.own(keep_rows=keep_rows)
    steps.statements_of(partition.ledger)
    append(queue, b"+n0.example\n")
    settle(partition)
    for steps.full in (True, True, False):
        append(queue, b"+n0.example\n+n1.example\n")
        partition.catch_up()
        assert (flush(partition).full is not None) == steps.full
        push_until_it_holds(partition, MemoryCopy(server))
        assert_copy_equals_ledger(server, partition)
        assert server.documents["n0.example"]["delivered"] == {HOST: 1 if steps.full else 4}
    queue.close()
    partition.close()


def test_a_second_writer_of_the_same_component_is_told_apart_by_its_claim(tmp_path):
    """A copy of the data folder in use elsewhere: the push in which it claims the fence does not advance it."""
    host, server = Host(tmp_path), MemoryServer()
    queue, partition = host.queue(), host.own()
    append(queue, b"+n0.example\n")
    settle(partition)
    other = MemoryCopy(server)
    copy = MemoryCopy(server, Once(5, lambda: other.claim(HOST, 0, "theirs") and None))
    assert push(partition, copy) == (1, False)
    assert partition.ledger.meta.pushed == 0
    assert push(partition, copy, from_zero=True) == (1, True)
    queue.close()
    partition.close()


def test_a_ledger_that_is_older_than_the_copy_is_superseded_and_sends_nothing(tmp_path):
    host, server = Host(tmp_path), MemoryServer()
    queue, partition = host.queue(), host.own()
    append(queue, b"+n0.example\n")
    flush_count = partition.ledger.meta.flush
    settle(partition)
    copy = MemoryCopy(server)
    copy.claim(HOST, 0, "later")
    copy.advance(HOST, 0, "later", partition.ledger.meta.flush + 1)
    with pytest.raises(Superseded):
        push(partition, copy)
    assert partition.ledger.meta.flush == flush_count + 1
    assert not server.documents
    queue.close()
    partition.close()
