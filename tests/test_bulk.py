"""A request of many events: all of them as lines for the right queues, or every fault by its index and no line at all."""

import json
import random
from collections import Counter

import pytest

from catchall.engine.rules import COUNT_MAX, is_normal, partition_of
from catchall.http import bulk
from catchall.http.bulk import ERRORS_MAX, BadEvents, Parsed, TooManyEvents, Undecodable, examined, parse_ndjson, route

GOOD = b'{"domain":"example.com","type":"delivered"}\n'


def parsed(body: bytes, partitions: int = 16, events_max: int = 10_000) -> Parsed:
    return parse_ndjson(body, partitions, events_max)


def lines(events: Parsed) -> list[bytes]:
    return sorted(line for blob in events.blobs.values() for line in blob.splitlines(keepends=True))


def refused(body: bytes) -> BadEvents:
    with pytest.raises(BadEvents) as error:
        parsed(body)
    return error.value


def ndjson(*events: object) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def test_each_event_becomes_a_line_in_the_queue_of_its_name() -> None:
    events = parsed(
        ndjson(
            {"domain": "Example.com", "type": "delivered"},
            {"domain": "example.org.", "type": "bounced"},
            {"type": "delivered", "count": 12, "domain": "bücher.example"},
            {"domain": "example.com", "type": "bounced", "count": 1},
            {"domain": "example.com", "type": "bounced", "count": COUNT_MAX},
        )
    )
    assert lines(events) == [
        b"+example.com\n",
        b"+xn--bcher-kva.example 12\n",
        b"-example.com\n",
        b"-example.com 1000000\n",
        b"-example.org\n",
    ]
    assert (events.delivered, events.bounced) == (13, 2 + COUNT_MAX)


@pytest.mark.parametrize("partitions", [1, 2, 3, 16, 64, 256])
def test_a_line_lies_with_its_partition_whatever_their_number(partitions: int) -> None:
    events = [{"domain": f"mail-{n}.example", "type": ("delivered", "bounced")[n % 7 == 0]} for n in range(500)]
    found = parsed(ndjson(*events), partitions)
    assert all(0 <= partition < partitions for partition in found.blobs)
    for partition, blob in found.blobs.items():
        assert blob
        assert {partition_of(line[1:], partitions) for line in blob.splitlines()} == {partition}
    assert Counter(lines(found)) == Counter(b"%c%b\n" % (b"+-"[e["type"] == "bounced"], e["domain"].encode()) for e in events)


@pytest.mark.parametrize(
    "body",
    [
        GOOD * 2,
        GOOD + GOOD.rstrip(),
        b"\xef\xbb\xbf" + GOOD * 2,
        GOOD.replace(b"\n", b"\r\n") * 2,
        b"\n\n" + GOOD + b"\n \t\r\n" + GOOD + b"\n\n",
        b" \t" + GOOD + GOOD,
        GOOD.rstrip() * 2,
        GOOD.replace(b",", b",\n") * 2,
        GOOD.replace(b":", b" : ").replace(b"e", b"\\u0065") * 2,
        b'{"domain":"other.example","domain":"example.com","type":"bounced","type":"delivered"}\n' + GOOD,
    ],
    ids=["plain", "no last newline", "BOM", "CRLF", "blank lines", "indent", "one line", "two lines each", "escapes", "twice"],
)
def test_white_space_and_a_mark_at_the_start_do_not_matter(body: bytes) -> None:
    assert parsed(body) == parsed(GOOD * 2)
    odd = body + b'{"domain":"EXAMPLE.org.","type":"bounced"}'  # a name that takes the slower way
    assert lines(parsed(odd)) == [b"+example.com\n", b"+example.com\n", b"-example.org\n"]


@pytest.mark.parametrize("body", [b"", b"\n", b"\r\n \n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_body_without_events_holds_none(body: bytes) -> None:
    assert parsed(body) == Parsed({}, 0, 0)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "bad_json"),
        (b"nonsense", "bad_json"),
        (b'{"domain":"a.example","type":"delivered"', "bad_json"),
        (b'{"domain":"a.example","type":"delivered"},', "bad_json"),
        (b"{'domain':'a.example','type':'delivered'}", "bad_json"),
        (b'{"domain":"a\xff.example","type":"delivered"}', "bad_json"),
        (b'{"domain":"a\\ud800.example","type":"delivered"}', "bad_json"),
        (b'{"domain":"a\x00.example","type":"delivered"}', "bad_json"),
        (b'\xef\xbb\xbf{"domain":"a.example","type":"delivered"}', "bad_json"),
        (b"\x00", "bad_json"),
        (b"+example.com", "bad_json"),
        (b"[]", "bad_event"),
        (b'[{"domain":"a.example","type":"delivered"}]', "bad_event"),
        (b'"a.example"', "bad_event"),
        (b"null", "bad_event"),
        (b"1", "bad_event"),
        (b"{}", "bad_event"),
        (b'{"domain":"a.example"}', "bad_event"),
        (b'{"type":"delivered"}', "bad_event"),
        (b'{"domain":null,"type":"delivered"}', "bad_event"),
        (b'{"domain":["a.example"],"type":"delivered"}', "bad_event"),
        (b'{"domain":"a.example","type":1}', "bad_event"),
        (b'{"domain":"a.example","type":"delivered","count":"1"}', "bad_event"),
        (b'{"domain":"a.example","type":"delivered","count":1.0}', "bad_event"),
        (b'{"domain":"a.example","type":"delivered","count":true}', "bad_event"),
        (b'{"domain":"a.example","type":"delivered","count":null}', "bad_event"),
        (b'{"domain":"a.example","type":"delivered","count":1e400}', "bad_event"),
        (b'{"domain":"a.example","type":"delivered","count":' + b"9" * 5000 + b"}", "bad_event"),
        (b'{"domain":"a.example","type":"opened"}', "unknown_type"),
        (b'{"domain":"a.example","type":"Delivered"}', "unknown_type"),
        (b'{"domain":"a.example","type":""}', "unknown_type"),
        (b'{"domain":"a.example","type":"delivered","count":0}', "count_out_of_range"),
        (b'{"domain":"a.example","type":"delivered","count":-1}', "count_out_of_range"),
        (b'{"domain":"a.example","type":"delivered","count":1000001}', "count_out_of_range"),
        (b'{"domain":"a.example","type":"delivered","count":' + b"9" * 30 + b"}", "count_out_of_range"),
        (b'{"domain":"a.example","type":"delivered","id":1}', "bad_id"),
        (b'{"domain":"a.example","type":"delivered","id":""}', "bad_id"),
        (b'{"domain":"a.example","type":"delivered","id":null}', "bad_id"),
        (b'{"domain":"a.example","type":"delivered","id":"%b"}' % (b"x" * 256), "bad_id"),
        (b'{"domain":"a.example","type":"delivered","key":"1"}', "unknown_field"),
        (b'{"domain":"a.example","type":"delivered","meta":{"a":[1]}}', "unknown_field"),
        (b'{"domain":"a.example","type":"delivered","Count":2}', "unknown_field"),
        (b'{"domain":"","type":"delivered"}', "bad_domain"),
        (b'{"domain":"a b.example","type":"delivered"}', "bad_domain"),
        (b'{"domain":"user@a.example","type":"bounced"}', "bad_domain"),
        (b'{"domain":"a.example\\n+b.example","type":"delivered"}', "bad_domain"),
        (b'{"domain":"a.\\n.b","type":"delivered"}', "bad_domain"),
        (b'{"domain":"a.example 7","type":"delivered"}', "bad_domain"),
        (b'{"domain":"-a.example","type":"delivered"}', "bad_domain"),
        (b'{"domain":"a-.example","type":"delivered","count":2}', "bad_domain"),
        (b'{"domain":"' + b"a" * 64 + b'.example","type":"delivered"}', "domain_too_long"),
        (b'{"domain":"' + b"a.b" * 100 + b'","type":"delivered"}', "domain_too_long"),
        (b'{"domain":"[192.0.2.1]","type":"delivered"}', "domain_literal"),
        (b'{"domain":"192.0.2.1","type":"delivered"}', "domain_literal"),
        (b'{"domain":"7","type":"bounced"}', "domain_literal"),
        (b'{"domain":"192.0.2.1","type":"bounced","count":2}', "domain_literal"),
    ],
)
@pytest.mark.parametrize("index", [0, 1, 5])
def test_one_wrong_event_is_told_by_its_index_and_code_and_nothing_is_returned(line: bytes, code: str, index: int) -> None:
    error = refused(GOOD * index + b"\r\n" + line + b"\n\n" + GOOD * 3)
    assert [(wrong.index, wrong.code) for wrong in error.errors] == [(index, code)]
    assert (error.rejected, error.total) == (1, index + 4)
    assert len(error.errors[0].detail) < 300


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"domain":', b'{"domain":"a.example","type":"delivered","x":', b"[{"])
@pytest.mark.parametrize("closed", [False, True])
def test_no_depth_of_nesting_does_more_than_fail(opening: bytes, closed: bool) -> None:
    closing = b"".join({b"[": b"]", b"{": b"}"}.get(bytes([c]), b"") for c in reversed(opening)) if closed else b""
    error = refused(GOOD + opening * 200_000 + closing * 200_000 + b"\n" + GOOD)
    assert [wrong.index for wrong in error.errors] == [1]
    assert error.total == 3


def test_the_first_errors_are_told_and_all_are_counted() -> None:
    error = refused((GOOD + b'{"domain":"a..b","type":"delivered"}\n') * 50)
    assert [wrong.index for wrong in error.errors] == list(range(1, 2 * ERRORS_MAX, 2))
    assert (error.rejected, error.total) == (50, 100)


def test_errors_of_different_kinds_are_told_together_and_in_order() -> None:
    error = refused(b'{"domain":"a","type":"x"}\n' + GOOD + b'nonsense\n{"domain":"1.2","type":"bounced"}\n')
    assert [(e.index, e.code) for e in error.errors] == [(0, "unknown_type"), (2, "bad_json"), (3, "domain_literal")]


def test_an_error_quotes_no_more_than_a_little_of_the_input() -> None:
    secret = b"s" * 5000
    for line in (
        b'{"domain":"%b","type":"delivered"}',
        b'{"domain":"a.example","type":"%b"}',
        b'{"domain":"a.example","type":"delivered","%b":1}',
        b'{"domain":"a.example","type":"delivered","count":"%b"}',
        b"%b",
    ):
        assert len(refused(line % secret).errors[0].detail) < 250


@pytest.mark.parametrize(
    "event",
    [
        GOOD,
        b'{"domain":"example.com.","type":"delivered"}\n',
        b'{"domain":"example.com","type":"delivered","count":2}\n',
        b'{"domain":"a..b","type":"delivered"}\n',
        b"nonsense\n",
        GOOD.rstrip(),
    ],
)
def test_one_event_more_than_the_limit_is_too_many_whatever_the_events(event: bytes) -> None:
    with pytest.raises(TooManyEvents) as error:
        parsed(GOOD * 9 + event * 2, events_max=10)
    assert (error.value.total, error.value.events_max) == (11, 10)
    assert parsed(b"\n" * 100 + GOOD * 10, events_max=10).delivered == 10


def a_name(rnd: random.Random) -> str:
    return "".join(rnd.choices("abcz09-_.A", weights=[6, 6, 6, 6, 3, 3, 2, 1, 4, 1], k=rnd.randint(1, 14)))


def a_good_name(rnd: random.Random, odd: float) -> str:
    """A name that the rules accept; now and then one that the whole-request check cannot vouch for."""
    while True:
        name = a_name(rnd)
        if rnd.random() < odd:
            longer = "a" * 63 + "." + name
            name = rnd.choice(["bücher.example", name + ".", longer, name.upper(), "163.com", name + ".xn--90ae7"])
        if is_normal(name.lower().removesuffix(".").replace("ü", "u").encode()):
            return name


@pytest.mark.parametrize("odd", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("counts", [(1,), (1, 1, 1, 1, 12)])
@pytest.mark.parametrize("seed", range(5))
def test_the_fast_paths_give_the_lines_that_the_slow_path_gives(seed: int, counts: tuple[int, ...], odd: float) -> None:
    rnd = random.Random(f"{seed} {counts} {odd}")
    for _ in range(20):
        events = []
        for _ in range(rnd.randint(1, 60)):
            kind, count = rnd.choice(["delivered", "delivered", "bounced"]), rnd.choice(counts)
            event: dict[str, object] = {"domain": a_good_name(rnd, odd), "type": kind}
            if count != 1 or rnd.random() < 0.1:
                event["count"] = count
            events.append(event)
        partitions = rnd.choice([1, 2, 7, 16])
        fast, slow = parsed(ndjson(*events), partitions), examined(events, partitions, 100)
        assert lines(fast) == lines(slow)
        assert (fast.delivered, fast.bounced) == (slow.delivered, slow.bounced)
        assert fast.blobs.keys() == slow.blobs.keys()


@pytest.mark.parametrize("seed", range(10))
def test_no_name_slips_past_the_check_of_the_whole_request(seed: int) -> None:
    rnd = random.Random(seed)
    outcomes = Counter[bool]()
    for _ in range(3_000):
        names = [rnd.choice(["example.com", "a-b.org", "1.de"]) for _ in range(rnd.randint(0, 2))]
        letters = rnd.choices("aZ7-_.\n é", weights=[9, 1, 5, 3, 1, 5, 1, 1, 1], k=rnd.randint(0, 8))
        names.insert(rnd.randint(0, len(names)), "".join(letters))
        whole = bulk._normal_as_a_whole(names, short=True)
        good = all(is_normal(name.encode().lower()) for name in names)
        outcomes[good] += 1
        assert whole == ([name.lower().encode() for name in names] if good else None)
    assert min(outcomes[True], outcomes[False]) > 300


@pytest.mark.parametrize("name", ["a" * 64, "a" * 63 + ".b", "b." + "a" * 64, "a" * 300])
def test_a_long_name_is_left_to_the_rules(name: str) -> None:
    assert bulk._normal_as_a_whole(["example.com", name], short=False) is None


def test_a_name_that_ends_in_a_digit_or_begins_like_a_number_passes_as_a_whole() -> None:
    names = ["163.com", "host1", "1.2.3.4.example", "example.xn--90ae7", "7-eleven.com", "r3---sn.example"]
    assert bulk._normal_as_a_whole(names, short=True) == [name.encode() for name in names]


@pytest.mark.parametrize("seed", range(5))
def test_a_body_of_any_bytes_ends_in_lines_or_in_errors(seed: int) -> None:
    rnd = random.Random(seed)
    good = ndjson({"domain": "example.com", "type": "delivered"}, {"domain": "ü.example", "type": "bounced", "count": 3}) * 2
    for _ in range(1_000):
        body = bytearray(good)
        for _ in range(rnd.randint(1, 4)):
            at, length = rnd.randrange(len(body)), rnd.randint(0, 3)
            body[at : at + length] = rnd.choice([b"", b"\n", b'"', b"{", b"}", b"[", b"\\", b"\xff", b"\0", b"9", b","])
        found = outcome(bytes(body))
        if isinstance(found, Parsed):
            assert all(is_normal(line[1:].split()[0]) for line in lines(found))
        else:
            assert 1 <= found.rejected <= found.total
            assert len(found.errors) == min(found.rejected, ERRORS_MAX)


def outcome(body: bytes) -> Parsed | BadEvents:
    try:
        return parsed(body)
    except BadEvents as error:
        return error


def test_events_of_other_formats_take_the_same_way() -> None:
    assert route(["Example.com"], [], 1, counted=[("bounced", "example.org.", 5)]) == {0: b"-example.org 5\n+example.com\n"}
    assert route([], [], 4) == {}
    with pytest.raises(BadEvents) as error:
        examined([{"domain": "a.example", "type": "bounced"}, Undecodable("bad_json", "row 2 lacks a column")], 4, 10)
    assert [(e.index, e.code, e.detail) for e in error.value.errors] == [(1, "bad_json", "row 2 lacks a column")]
