"""Counting lines: whatever the chunks, the counts are those of the lines one by one."""

import random
from collections import Counter

import pytest

from catchall.engine import lines
from catchall.engine.pending import Pending
from catchall.storage.counts import unpack

NAMES = [b"a.example", b"b.example", b"xn--bcher-kva.example", b"c"]
GARBAGE = [
    b"", b"+", b"-", b"@", b"@12x", b"@-5", b"@" + b"9" * 20, b"+A.example", b"a.example", b"xa.example", b"+a..example",
    b"+a.example 0", b"+a.example 01x", b"+a.example 1000001", b"+a.example 12345678", b"+a.example  3", b"-a.example 3 ",
    b"+a.example #" + b"0" * 32, b"+a@b.example", b"+a.example@1", b"+a.example 3@", b"\xff\xfe", b"+\xff.example",
    b"+" + b"a" * 64, b"+" + b"a." * 130 + b"a", b" ", b"\r", b"+a.example\r",
]  # fmt: skip


def feed(pending: Pending, chunks: list[bytes]) -> int:
    clock = 0
    for chunk in chunks:
        clock = pending.count(chunk, clock)
    return clock


def cut_into_chunks(stream: list[bytes], rng: random.Random) -> list[bytes]:
    chunks, at = [], 0
    while at < len(stream):
        size = rng.randint(1, 40)
        chunks.append(b"".join(line + b"\n" for line in stream[at : at + size]))
        at += size
    return chunks


class Slowly:
    """The same counts, made a line at a time."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.times: dict[tuple[str, str], set[int]] = {}
        self.bad = 0
        self.clock = 0

    def line(self, line: bytes) -> None:
        if (second := lines.clock_of(line)) is not None:
            self.clock = second
        elif (parsed := lines.parse(line)) is None:
            self.bad += 1
        else:
            key = (parsed[0][:1].decode(), parsed[0][1:].decode())
            self.counts[key] += parsed[1]
            self.times.setdefault(key, set()).add(self.clock)


def random_stream(rng: random.Random) -> list[bytes]:
    stream = [b"@1000"]
    for _ in range(rng.randint(1, 300)):
        kind = rng.random()
        if kind < 0.1:
            stream.append(b"@%d" % rng.randint(990, 1010))
        elif kind < 0.2:
            stream.append(rng.choice(GARBAGE))
        else:
            count = rng.choice([b"", b"", b" 1", b" 7", b" 1000000"])
            stream.append(rng.choice([b"+", b"-"]) + rng.choice(NAMES) + count)
    return stream


@pytest.mark.parametrize("seed", range(200))
def test_counts_and_times_are_those_of_the_lines_one_by_one(seed):
    rng = random.Random(seed)
    stream = random_stream(rng)
    pending, slowly = Pending(), Slowly()
    for line in stream:
        slowly.line(line)
    assert feed(pending, cut_into_chunks(stream, rng)) == slowly.clock
    deltas, bad = pending.fold()
    assert bad + pending.bad_lines == slowly.bad
    assert {(sign, name) for name, d in deltas.items() for sign, n in (("+", d.delivered), ("-", d.bounced)) if n} == set(
        slowly.counts
    )
    for name, delta in deltas.items():
        plus, minus = ("+", name), ("-", name)
        assert (delta.delivered, delta.bounced) == (slowly.counts[plus], slowly.counts[minus])
        times = slowly.times.get(plus, set()) | slowly.times.get(minus, set())
        assert delta.first_at == min(times)
        assert delta.last_delivered_at == max(slowly.times.get(plus, {0}))
        assert delta.last_bounced_at == max(slowly.times.get(minus, {0}))
        assert unpack(pending.get(name.encode())) == (delta.delivered, delta.bounced)
    assert sorted(pending.known_names()) == sorted(name.encode() for name in deltas)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("before", [b"", b"+a.example\n", b"-a.example 2\n@7\n"])
def test_a_line_that_is_no_event_is_skipped_alone(garbage, before):
    pending = Pending()
    pending.count(before + garbage + b"\n+b.example\n", 5)
    deltas, bad = pending.fold()
    expected = {"b.example": (1, 0)}
    if before:
        expected["a.example"] = (1, 0) if before.startswith(b"+") else (0, 2)
    assert {name: (delta.delivered, delta.bounced) for name, delta in deltas.items()} == expected
    assert bad + pending.bad_lines == 1


def test_the_clock_goes_on_from_chunk_to_chunk():
    pending = Pending()
    assert pending.count(b"@100\n+a.example\n", 0) == 100
    assert pending.count(b"-a.example\n", 100) == 100
    assert pending.count(b"@103\n", 100) == 103
    assert pending.count(b"+a.example\n", 103) == 103
    delta = pending.fold()[0]["a.example"]
    assert (delta.first_at, delta.last_delivered_at, delta.last_bounced_at) == (100, 103, 100)


def test_an_event_before_any_clock_does_not_hide_when_the_first_was():
    pending = Pending()
    pending.count(b"+a.example\n@100\n+a.example\n", 0)
    assert pending.fold()[0]["a.example"].first_at == 100


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_that_is_merged_back_is_as_if_it_had_not_been(seed):
    rng = random.Random(seed)
    stream = random_stream(rng)
    whole, cut, later = Pending(), Pending(), Pending()
    chunks = cut_into_chunks(stream, rng)
    at = rng.randint(0, len(chunks))
    feed(whole, chunks)
    clock = feed(cut, chunks[:at])
    for chunk in chunks[at:]:
        clock = later.count(chunk, clock)
    cut.merge(later)

    def seen(pending: Pending) -> dict[str, tuple[int, ...]]:
        return {n: tuple(getattr(d, slot) for slot in d.__slots__) for n, d in pending.fold()[0].items()}

    assert seen(cut) == seen(whole)
    assert cut.fold()[1] == whole.fold()[1]


def test_nothing_is_pending_until_something_is_counted():
    pending = Pending()
    assert not pending
    pending.count(b"@100\n", 0)
    assert not pending
    pending.count(b"+a.example\n", 100)
    assert pending
    assert pending.names == 1
