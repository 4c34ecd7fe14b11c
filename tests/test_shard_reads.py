"""Questions that a shard cannot answer at once: it neither spins, nor piles them up, nor forgets its other work."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from faults import Host, append, flush, settle

from catchall.engine import partition as partition_module
from catchall.engine import queue_reader
from catchall.engine.event_queue import EventQueue
from catchall.engine.partition import Partition
from catchall.engine.shard_protocol import ANSWER, COUNT_PAIR, COUNTS, KEY, KEY_QUESTION
from catchall.engine.shard_reads import Reads
from catchall.engine.shard_sockets import Request

NAMES = 60


class Asker:
    """Stands for the connection of an HTTP worker."""

    def __init__(self) -> None:
        self.out = bytearray()

    def asks(self, number: int, kind: int, payload: bytes) -> Request:
        return Request(self, number, kind, payload)  # type: ignore[arg-type]


def reads(partition: Partition, patience_s: float = 60.0) -> Reads:
    return Reads({0: partition}, 1, None, lambda: None, patience_s)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[tuple[EventQueue, Partition]]:
    """A partition in which a flush has to make room, and a queue with one more event."""
    host = Host(tmp_path)
    queue, partition = host.queue(), host.own(pending_names_max=NAMES)
    append(queue, b"".join(b"+n%d.example\n" % number for number in range(NAMES)))
    assert partition.catch_up()
    assert partition.full
    append(queue, b"+n0.example\n")
    yield queue, partition
    queue.close()
    partition.close()


def test_a_question_behind_a_flush_waits_for_it_without_spinning_and_is_answered_after_it(full):
    _, partition = full
    asker, waiting = Asker(), reads(partition)
    waiting.add([asker.asks(7, COUNTS, b"n0.example")])
    waiting.answer()
    assert (waiting.waiting, waiting.again) == (True, False)
    flush(partition)
    waiting.answer()
    assert not waiting.waiting
    assert asker.out == ANSWER.pack(4 + COUNT_PAIR.size, 7) + COUNT_PAIR.pack(2, 0)


def test_questions_that_nobody_waits_for_any_more_are_dropped(full):
    _, partition = full
    asker, waiting = Asker(), reads(partition, patience_s=-1.0)
    waiting.add([asker.asks(number, COUNTS, b"n0.example") for number in range(100)])
    waiting.answer()
    assert not waiting.waiting
    assert not asker.out


def test_a_question_about_a_partition_of_another_shard_does_not_keep_the_loop_spinning(full):
    _, partition = full
    waiting = reads(partition)
    waiting.add([Asker().asks(1, KEY, KEY_QUESTION.pack(5, bytes(16)))])
    waiting.answer()
    assert not waiting.again


@pytest.mark.parametrize(("module", "bound"), [(partition_module, "CATCH_UP_BYTES"), (queue_reader, "CATCH_UP_S")])
def test_however_many_questions_wait_for_a_backlog_one_turn_drains_one_share_of_it(tmp_path, monkeypatch, module, bound):
    monkeypatch.setattr(module, bound, 1 if bound == "CATCH_UP_BYTES" else 0.0)  # a slice, that is
    host, lines = Host(tmp_path), b"+n0.example\n" * 100
    queue, partition = host.queue(), host.own()
    for _ in range(300):
        append(queue, lines)
    asker, waiting = Asker(), reads(partition)
    waiting.add([asker.asks(number, KEY, KEY_QUESTION.pack(0, bytes(16))) for number in range(50)])
    turns = 0
    while waiting.waiting:
        waiting.answer()
        turns += 1
    assert turns > 2
    assert partition.pending.get(b"n0.example") == 30_000
    assert asker.out.count(ANSWER.pack(4, 49)) == 1
    queue.close()
    partition.close()


class Elsewhere:
    """Stands for Others: what it knows is forgotten once it was told, and what it is asked is answered later."""

    def __init__(self, **known: int) -> None:
        self._known = {f"{name}.example": packed for name, packed in known.items()}
        self.asked: list[tuple[Mapping[str, str], dict[str, int]]] = []

    def get(self, name: str, own: str) -> int | None:
        return self._known.pop(name, None)

    def ask(self, names: Mapping[str, str]) -> dict[str, int]:
        self.asked.append((names, {}))
        return self.asked[-1][1]

    def answers(self, packed: int) -> None:
        for names, result in self.asked:
            result.update(dict.fromkeys(names, packed))


def test_a_name_whose_count_elsewhere_expires_while_others_are_asked_for_holds_up_no_answer(tmp_path: Path) -> None:
    partition, asker, elsewhere = Host(tmp_path).own(), Asker(), Elsewhere(known=3)
    waiting = Reads({0: partition}, 1, elsewhere, lambda: None, 60.0)  # type: ignore[arg-type]
    waiting.add([asker.asks(1, COUNTS, b"known.example\nnew.example")])
    waiting.answer()
    assert [list(names) for names, _ in elsewhere.asked] == [["new.example"]]
    elsewhere.answers(5)
    waiting.answer()
    assert not waiting.waiting
    assert asker.out.endswith(COUNT_PAIR.pack(3, 0) + COUNT_PAIR.pack(5, 0))
    partition.close()


def test_while_a_push_stores_how_far_it_came_the_loop_waits_for_no_sync(tmp_path: Path) -> None:
    """It is a commit like that of a flush: what needs the ledger is put off, and what does not goes on."""
    host = Host(tmp_path)
    queue, partition = host.queue(), host.own(cache_names=0)
    append(queue, b"+n0.example\n")
    settle(partition)
    asker, waiting, seen = Asker(), reads(partition), []
    run = partition.ledger._run

    def slow(*args: Any) -> None:
        assert partition.ledger.in_commit, "else the next step would wait for this one"
        waiting.add([asker.asks(1, COUNTS, b"n0.example")])
        waiting.answer()
        seen.append((waiting.waiting, waiting.again, partition.scrub.step(), partition.scrub._name))
        run(*args)

    partition.ledger._run = slow  # type: ignore[method-assign]
    partition.ledger.set_pushed(1)
    assert seen == [(True, False, True, "")]
    waiting.answer()
    assert asker.out.endswith(COUNT_PAIR.pack(1, 0))
    queue.close()
    partition.close()
