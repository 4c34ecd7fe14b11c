"""Ids and keys of one partition: an exact set with a window, durable together with what was counted."""

import itertools
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faults import Died, Host, Mortal, Steps, append, counts_of, flush, ledger_counts, settle
from test_recovery import leave_for_dead

from catchall.engine import ids, lines, queue_reader
from catchall.engine.event_queue import EventQueue
from catchall.engine.ids import Ids, Repeats, event_id, forget_oldest, ids_of_request, key_id, request_digest, window_held
from catchall.engine.pending import Pending
from catchall.engine.shard_protocol import PLACE
from catchall.storage.ledger_failures import LedgerFull
from catchall.storage.ledger_rows import HeldId, IdChanges

KEY, DIGEST, OTHER = key_id(b"key"), request_digest(b"one body"), request_digest(b"another body")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def new_ids(held: Any = (), service_seconds: int = 0, *, window_s: float = 60.0, **over: Any) -> Ids:
    return Ids(held, service_seconds, window_s=window_s, **over)


def line(number: int, name: str = "a.example", count: int = 1) -> bytes:
    return lines.with_id(lines.encode(b"+", name.encode(), count), event_id(str(number), b"+", name.encode()))


def hash_of(number: int) -> bytes:
    return bytes.fromhex(event_id(str(number), b"+", b"a.example").decode())


def row(number: int, age: int) -> HeldId:
    return hash_of(number), None, age


def gone(held: Ids) -> list[int]:
    """The numbers of the lines whose ids a cut says are forgotten."""
    numbers = {hash_of(number): number for number in range(20)}
    return [numbers[hash] for hash, _, _ in held.cut().changes.gone]


def counted(held: Ids, *some: bytes) -> tuple[bytes, Repeats]:
    repeats = Repeats(0)
    return held.count(b"".join(some), 0, repeats), repeats


# ---- what is an id


def test_an_id_stands_for_one_kind_of_event_of_one_domain() -> None:
    given = [event_id(i, sign, name) for i in ("1", "2", "é") for sign in (b"+", b"-") for name in (b"a.example", b"b.example")]
    assert len(set(given)) == len(given)
    assert event_id("1", b"+", b"a.example") == given[0]
    assert all(lines.id_of(digits) for digits in given)


def test_the_ids_of_a_request_differ_by_its_key_its_content_and_the_index() -> None:
    requests = [ids_of_request(key_id(key), request_digest(body)) for key in (b"k", b"l") for body in (b"x", b"y")]
    given = [id_of(index) for id_of in requests for index in (0, 1, 2**32 - 1)]
    assert len(set(given)) == len(given)
    assert all(lines.id_of(digits) for digits in given)


@pytest.mark.parametrize("digits", [b"", b"0" * 31, b"0" * 33, b"0" * 31 + b"G", b"0" * 31 + b"A", b"0" * 31 + b" ", b"+" * 32])
def test_only_32_lower_hex_digits_are_an_id(digits: bytes) -> None:
    assert lines.id_of(digits) is None


# ---- what counts


def test_a_line_whose_id_is_held_is_left_out_and_all_else_stays_in_its_order() -> None:
    held = new_ids()
    plain = b"@1790000000\n-b.example 3\n"
    chunk, repeats = counted(held, line(1), plain, line(2, count=7), line(1), line(2, count=7), b"+c.example\n")
    assert chunk == b"+a.example\n" + plain + b"+a.example 7\n+c.example\n"
    assert repeats.between(0, 1 << 20) == 8
    assert counted(held, line(1))[0] == b""
    assert held.cut().repeats == 9


def test_repeats_are_told_by_the_place_of_their_lines() -> None:
    held = new_ids()
    written = [line(1), line(1), b"+b.example\n", line(2), line(1, count=5)]
    _, repeats = counted(held, *written)
    ends = list(itertools.accumulate(map(len, written), initial=0))
    assert [repeats.between(a, b) for a, b in itertools.pairwise(ends)] == [0, 1, 0, 0, 5]
    assert repeats.between(ends[1], ends[-1]) == 6


def test_repeats_of_long_ago_are_forgotten_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "REPEATS_MAX", 8)
    repeats = Repeats(100)
    assert repeats.between(99, 200) is None
    for offset in range(100, 140):
        repeats.add(offset, 1)
    assert repeats.between(139, 140) == 1
    assert repeats.between(100, 140) is None
    assert repeats.between(repeats.start, 140) == 140 - repeats.start
    assert len(repeats._offsets) <= 8


@pytest.mark.parametrize("bad", [b"+a.example #123\n", b"+a.example # %032d\n" % 0, b"=123 456\n", b"=%032d\n" % 0])
def test_a_line_that_only_looks_like_one_with_an_id_is_a_bad_line(bad: bytes) -> None:
    chunk, _ = counted(new_ids(), bad, b"+b.example\n")
    pending = Pending()
    pending.count(chunk, 0)
    deltas, unparsable = pending.fold()
    assert (set(deltas), pending.bad_lines + unparsable) == ({"b.example"}, 1)


def test_the_first_digest_of_a_key_is_the_one_that_holds() -> None:
    held = new_ids()
    key = bytes.fromhex(KEY.decode())
    assert held.digest_of(key) is None
    chunk, _ = counted(held, lines.key_line(KEY, DIGEST), lines.key_line(KEY, OTHER), b"+a.example\n")
    assert chunk == b"+a.example\n"
    assert held.digest_of(key) == bytes.fromhex(DIGEST.decode())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_each_id_counts_once(seed: int) -> None:
    chance, held, wanted, seen = random.Random(seed), new_ids(), Counter[str](), set()
    pending = Pending()
    for _ in range(50):
        chunk = []
        for _ in range(chance.randint(1, 30)):
            number, name, count = chance.randint(0, 200), f"n{chance.randint(0, 3)}.example", chance.choice([1, 1, 9])
            chunk.append(line(number, name, count))
            if (number, name) not in seen:
                wanted[name] += count
            seen.add((number, name))
        pending.count(counted(held, *chunk)[0], 0)
        if chance.random() < 0.3:
            cut = held.cut()
            if chance.random() < 0.5:
                held.uncut(cut)
    assert counts_of(pending) == {name: (n, 0) for name, n in wanted.items()}


# ---- the window


def test_beyond_the_number_the_oldest_of_all_partitions_are_forgotten() -> None:
    clock = Clock()
    partitions = [new_ids(clock=clock) for _ in range(3)]
    for number in range(12):
        counted(partitions[number % 2], line(number))  # the third has none
        clock.now += 1
    forget_oldest(partitions, 12)
    assert [gone(ids) for ids in partitions] == [[], [], []]
    forget_oldest(partitions, 7)
    assert [gone(ids) for ids in partitions] == [[0, 2, 4], [1, 3], []]
    assert [counted(partitions[n % 2], line(n))[0] for n in (5, 4)] == [b"", b"+a.example\n"]


def test_of_many_ids_of_one_second_no_more_are_forgotten_than_need_be() -> None:
    held = new_ids(clock=Clock())
    counted(held, *map(line, range(10)))
    forget_oldest([held], 7)
    assert held.cut().changes == IdChanges([row(n, 0) for n in range(3, 10)], [], 0)


def test_an_id_is_forgotten_after_so_much_time_in_service() -> None:
    clock = Clock()
    held = new_ids(window_s=60.0, clock=clock)
    counted(held, line(1))
    clock.now += 40
    counted(held, line(2))
    cut = held.cut()
    assert (len(cut.changes.new), cut.changes.gone, cut.changes.service_seconds) == (2, [], 40)
    clock.now += 30
    assert gone(held) == [1]
    assert counted(held, line(1), line(2))[0] == b"+a.example\n"


def test_time_out_of_service_does_not_age_ids() -> None:
    clock = Clock()
    held = new_ids(window_s=60.0, clock=clock)
    counted(held, line(1))
    clock.now += 50
    saved = held.cut().changes
    clock.now += 1_000_000
    later = new_ids(saved.new, saved.service_seconds, window_s=60.0, clock=clock)
    assert gone(later) == []
    clock.now += 11
    assert gone(later) == [1]


def test_the_window_that_is_told_is_what_is_really_held() -> None:
    clock = Clock()
    partitions = [new_ids(clock=clock), new_ids(clock=clock)]
    assert window_held(partitions, 2, 60.0) == 60.0
    for number in range(4):
        counted(partitions[number % 2], line(number))
        forget_oldest(partitions, 2)
        clock.now += 5
    assert window_held(partitions, 2, 60.0) == 10  # the older of the two that are held came 10 seconds ago


def test_an_id_that_came_back_after_it_was_forgotten_stays_in_the_ledger() -> None:
    """The flush that was to delete it had no room, and meanwhile it came again."""
    clock = Clock()
    held = new_ids(clock=clock)
    counted(held, line(1))
    held.cut()
    held.forget_first(1)
    failed = held.cut()
    assert failed.changes.gone == [row(1, 0)]
    held.uncut(failed)
    clock.now += 5
    counted(held, line(1))
    assert held.cut().changes == IdChanges([row(1, 5)], [row(1, 0)], 5)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_and_goes_the_ledger_holds_what_memory_holds(seed: int) -> None:
    """Also what comes, goes and comes again within one second, and across flushes that had no room."""
    chance, clock, ledger = random.Random(seed), Clock(), dict[bytes, HeldId]()
    held = new_ids(window_s=3.0, clock=clock)
    for _ in range(400):
        what = chance.random()
        if what < 0.5:
            counted(held, line(chance.randint(0, 6)))
        elif what < 0.8:
            forget_oldest([held], chance.randint(0, 4))
        elif what < 0.85:
            clock.now += 1
        else:
            cut = held.cut()
            if chance.random() < 0.3:
                held.uncut(cut)
                continue
            for row in cut.changes.gone:
                assert ledger.pop(row[0]) == row
            for row in cut.changes.new:
                assert ledger.setdefault(row[0], row) is row
            assert ledger == {hash: (hash, digest, age) for hash, (age, digest) in held._held.items()}


def test_what_is_too_many_by_far_is_forgotten_in_one_pass() -> None:
    """As when a shard takes over the partitions of others: each id came in a second of its own."""
    clock, looks = Clock(), itertools.count()

    class Watched(Ids):
        @property
        def oldest_s(self) -> int:
            next(looks)
            return super().oldest_s

    partitions = [Watched([(b"%d %d" % (p, n), None, n) for n in range(500)], 500, window_s=1e9, clock=clock) for p in range(4)]
    forget_oldest(partitions, 20)
    assert [[n for _, _, n in ids.cut().changes.gone] for ids in partitions] == [list(range(495))] * 4
    assert next(looks) <= 4


@pytest.mark.parametrize("saved", [False, True], ids=["new", "saved before"])
@pytest.mark.parametrize("moves", range(1, 6))
def test_an_id_that_comes_and_goes_within_one_second_is_saved_if_it_is_held_at_the_cut(moves: int, saved: bool) -> None:
    held = new_ids([row(1, 0)] if saved else [], clock=Clock())
    for _ in range(moves):
        if len(held):
            held.forget_first(1)
        else:
            counted(held, line(1))
    changes = held.cut().changes
    assert saved + len(changes.new) - len(changes.gone) == len(held)
    assert {*changes.new, *changes.gone} <= {row(1, 0)}


# ---- durable together with the counts


def resend(queue: EventQueue, numbers: range) -> None:
    for number in numbers:
        append(queue, line(number, f"n{number % 5}.example"))


def wanted(numbers: range) -> dict[str, tuple[int, int]]:
    return {name: (n, 0) for name, n in Counter(f"n{number % 5}.example" for number in numbers).items()}


def test_ids_and_keys_are_known_after_a_restart(tmp_path: Path) -> None:
    host = Host(tmp_path)
    queue = host.queue()
    resend(queue, range(10))
    append(queue, lines.key_line(KEY, DIGEST))
    partition = host.own()
    settle(partition)
    partition.close()
    resend(queue, range(12))
    append(queue, lines.key_line(KEY, OTHER))
    queue.close()
    partition = host.own()
    settle(partition)
    assert ledger_counts(partition) == wanted(range(12))
    assert partition.ids.digest_of(bytes.fromhex(KEY.decode())) == bytes.fromhex(DIGEST.decode())
    partition.close()


def test_of_repeats_in_retired_segments_so_many_are_remembered_however_many_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_reader, "PAST_REPEATS_MAX", 25)
    host = Host(tmp_path)
    partition = host.own()
    for _ in range(6):
        queue = host.queue()
        append(queue, line(1) * 11)
        place = queue.place(11 * len(line(1)))
        queue.close()
        settle(partition)
    assert sum(map(len, partition.reader._past.values())) == 22
    _, name, start, end = PLACE.unpack(place)
    assert partition.reader.repeats(name.hex(), start, end) == 11
    partition.close()


@pytest.mark.parametrize("dies_at", range(1, 120))
def test_an_owner_that_dies_at_any_step_counts_every_id_once(tmp_path: Path, dies_at: int) -> None:
    host, steps, partition = Host(tmp_path), Steps(dies_at), None
    queue = host.queue()
    resend(queue, range(20))
    with suppress(Died):
        partition = host.own(disk=steps.disk())
        steps.statements_of(partition.ledger)
        partition.reader.discover()
        partition.drain(1 << 20)
        flush(partition)
        resend(queue, range(10, 30))
        settle(partition)
        resend(queue, range(40))
        settle(partition)
    assert steps.taken < 120, "the last of them dies nowhere"
    if partition is not None:
        leave_for_dead(partition)
    resend(queue, range(40))
    queue.close()
    partition = host.own()
    settle(partition)
    assert ledger_counts(partition) == wanted(range(40))
    partition.close()


@pytest.mark.parametrize("dies_at", range(1, 60))
def test_a_resend_after_a_death_at_any_step_counts_what_is_missing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """A request over two partitions whose writer dies: one has its lines, the other not, or one of them half."""
    host, steps = Host(tmp_path, partitions=2), Steps(dies_at)
    mortal = Mortal(monkeypatch, steps)

    def send() -> None:
        for number in range(2):
            append(host.queue(number, disk=steps.disk()), b"".join(line(n, f"n{number}.example") for n in range(3)))

    with suppress(Died):
        send()
    assert steps.taken < 60, "the last of them dies nowhere"
    mortal.bury()
    steps.dies_at = None
    send()
    mortal.bury()
    for number in range(2):
        partition = host.own(number)
        settle(partition)
        assert ledger_counts(partition) == {f"n{number}.example": (3, 0)}
        partition.close()


def test_a_full_disk_forgets_no_id(tmp_path: Path) -> None:
    host = Host(tmp_path)
    queue = host.queue()
    resend(queue, range(10))
    partition = host.own()
    partition.reader.discover()
    partition.drain(1 << 20)
    run, attempts = partition.ledger._run, itertools.count()

    def full_at_first(statement: str, values: Any = ()) -> None:
        if statement.startswith("insert into id") and next(attempts) == 0:
            raise LedgerFull("no room")
        run(statement, values)

    partition.ledger._run = full_at_first  # type: ignore[method-assign]
    assert flush(partition).full is not None
    resend(queue, range(10))
    queue.close()
    settle(partition)
    partition.close()
    partition = host.own()
    assert ledger_counts(partition) == wanted(range(10))
    assert len(partition.ids) == 10
    partition.close()


def test_many_new_ids_of_one_name_bring_a_flush_before_they_fill_the_memory(tmp_path: Path) -> None:
    host = Host(tmp_path)
    queue = host.queue()
    partition = host.own(pending_names_max=50)
    for number in range(500):
        append(queue, line(number))
    partition.reader.discover()
    partition.drain(1 << 20)
    assert partition.full
    assert partition.due
    queue.close()
    partition.close()


def test_damaged_ids_are_said_and_nothing_else_suffers(tmp_path: Path) -> None:
    host = Host(tmp_path)
    queue = host.queue()
    resend(queue, range(10))
    partition = host.own()
    settle(partition)
    partition.close()
    path = tmp_path / "00" / "ledger.db"
    hash = bytes.fromhex(event_id("3", b"+", b"n3.example").decode())
    content = path.read_bytes()
    assert content.count(hash) == 1
    path.write_bytes(content.replace(hash, hash[:15] + bytes([hash[15] ^ 1])))
    partition = host.own()
    assert partition.set_aside == 1
    assert len(list((tmp_path / "00").glob("ids-*.corrupt"))) == 1
    resend(queue, range(10))
    queue.close()
    settle(partition)
    counts = ledger_counts(partition)
    assert counts.pop("n3.example") == (3, 0), "its id was lost"
    assert set(counts.values()) == {(2, 0)}
    partition.close()
    partition = host.own()
    assert len(list((tmp_path / "00").glob("ids-*.corrupt"))) == 1, "it is said once"
    partition.close()
