"""The HTTP contract, checked on a running service: what counts, what is refused, and that what is refused counts nothing."""

import json
import random
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service import KINDS, Answer, Client, Service, eventually

NDJSON = {"content-type": "application/x-ndjson"}
CHUNKED = NDJSON | {"transfer-encoding": "chunked"}
BODY_MAX, EVENTS_MAX = 64 << 10, 500
LIMITS = ("--set", "limits.body=64KiB", "--set", f"limits.events={EVENTS_MAX}", "--set", "server.read_timeout=500ms")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Shared by the tests of an xdist worker, each with domains of its own."""
    with Service(tmp_path_factory.mktemp("http"), "--workers", "2", "--http-workers", "2", *LIMITS) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Client:
    return service.client()


@pytest.fixture
def domain() -> str:
    """A domain that no other test uses."""
    return f"d{uuid.uuid4().hex}.example"


def refused(answer: Answer, status: int) -> str:
    """The detail of an error answer; that it is a proper one and says that nothing was recorded is checked here."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    told = answer.json
    assert told["status"] == status
    assert told["title"]
    assert told["type"].startswith(("urn:catchall:problem:", "about:blank"))
    assert "Nothing was recorded." in told["detail"]
    detail: str = told["detail"]
    return detail


def chunks(*parts: bytes, end: bool = True) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, *([b""] if end else [])))


def event(domain: str, kind: str = "delivered", **more: object) -> bytes:
    return json.dumps({"domain": domain, "type": kind, **more}).encode() + b"\n"


# --- what counts ---


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_event_is_answered_with_an_empty_200_and_counts_once(client: Client, domain: str, method: str, kind: str) -> None:
    answer = client.request(method, f"/events/{domain}/{kind}")
    assert (answer.status, answer.body) == (200, b"")
    assert client.counts(domain) == (int(kind == "delivered"), int(kind == "bounced"))


def test_all_spellings_of_a_name_count_for_one_domain(client: Client) -> None:
    label = f"bücher{uuid.uuid4().hex[:8]}"
    ascii_name = label.encode("idna").decode() + ".example"
    encoded = label.replace("ü", "%C3%BC")
    spellings = [f"{encoded}.example", f"{label}.example", f"{label.upper()}.EXAMPLE", f"{ascii_name}.", ascii_name.upper(),
                 f"{encoded}%2Eexample", f"{encoded}\u3002example", f"{encoded}.exam%70le"]  # fmt: skip
    assert [client.put(spelling) for spelling in spellings] == [200] * len(spellings)
    expected = {"domain": ascii_name, "status": "unknown", "delivered": len(spellings), "bounced": 0}
    for spelling in spellings:
        assert client.domain(spelling) == expected


def test_a_domain_never_seen_is_unknown_and_asking_does_not_make_it_seen(client: Client, domain: str) -> None:
    before = client.stats()
    assert client.domain(domain) == {"domain": domain, "status": "unknown", "delivered": 0, "bounced": 0}
    assert client.stats() == before


@pytest.mark.parametrize(
    ("delivered", "bounced", "status"),
    [(1, 0, "unknown"), (1000, 0, "unknown"), (1001, 0, "catch-all"), (5_000_000, 0, "catch-all"), (0, 1, "not-catch-all"),
     (1000, 1, "not-catch-all"), (1001, 1, "not-catch-all"), (5_000_000, 1, "not-catch-all")],
)  # fmt: skip
def test_the_status_follows_the_rule(client: Client, domain: str, delivered: int, bounced: int, status: str) -> None:
    parts = [min(1_000_000, delivered - at) for at in range(0, delivered, 1_000_000)]
    found = client.bulk(
        *({"domain": domain, "type": "delivered", "count": part} for part in parts),
        *({"domain": domain, "type": "bounced"} for _ in range(bounced)),
    )
    assert (found.status, found.headers["catchall-counted"]) == (200, str(delivered + bounced))
    assert client.domain(domain) == {"domain": domain, "status": status, "delivered": delivered, "bounced": bounced}


def test_the_1001st_single_delivery_makes_a_catch_all_and_one_bounce_ends_that(client: Client, domain: str) -> None:
    for _ in range(1000):
        assert client.put(domain) == 200
    assert client.domain(domain)["status"] == "unknown"
    assert client.put(domain) == 200
    assert client.domain(domain)["status"] == "catch-all"
    assert client.put(domain, "bounced") == 200
    assert client.domain(domain) == {"domain": domain, "status": "not-catch-all", "delivered": 1001, "bounced": 1}


def test_statistics_include_every_event_acknowledged_before(client: Client, domain: str) -> None:
    before = client.stats()
    moves = [("delivered", 1, "unknown"), ("delivered", 1000, "catch_all"), ("bounced", 1, "not_catch_all")]
    for kind, count, status in moves:
        client.count(domain, **{kind: count})
        after = client.stats()
        assert {key: after[key] - before[key] for key in after if after[key] != before[key]} == {status: 1, "total": 1}
        assert after["total"] == after["catch_all"] + after["not_catch_all"] + after["unknown"]
    told = client.request("GET", "/domains/stats").json["timestamp"]
    assert datetime.fromisoformat(told).tzinfo is not None


def test_a_bulk_request_counts_every_event_of_it(client: Client, domain: str) -> None:
    body = b"\r\n".join([event(domain), event(domain.upper(), "bounced", count=3), b"", event(f"{domain}.", count=20)])
    answer = client.request("POST", "/events", body, NDJSON)
    assert (answer.status, answer.body) == (200, b"")
    assert {name: value for name, value in answer.headers.items() if name.startswith("catchall-")} == {
        "catchall-counted": "24",
        "catchall-duplicate": "0",
        "catchall-rejected": "0",
    }
    assert client.counts(domain) == (21, 3)


def test_a_bulk_request_in_chunks_cut_anywhere_counts(client: Client, domain: str) -> None:
    body = event(domain) * 3
    cut = [body[at : at + 7] for at in range(0, len(body), 7)]
    client.send(b"POST /events HTTP/1.1\r\nhost: test\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")
    for part in cut:
        client.send(chunks(part, end=False))
    client.send(chunks())
    assert client.answer().status == 200
    assert client.counts(domain) == (3, 0)


def test_an_empty_bulk_request_is_good_and_counts_nothing(client: Client) -> None:
    before = client.stats()
    answer = client.request("POST", "/events", b"", NDJSON)
    assert (answer.status, answer.headers["catchall-counted"]) == (200, "0")
    assert client.stats() == before


# --- connections ---


@pytest.mark.parametrize("size", [1, 5000])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_put_with_a_body_counts_and_its_connection_goes_on(client: Client, domain: str, size: int, chunked: bool) -> None:
    head = f"PUT /events/{domain}/delivered HTTP/1.1\r\nhost: test\r\n"
    length = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
    body = chunks(b"x" * size) if chunked else b"x" * size
    for _ in range(3):
        client.send(f"{head}{length}\r\n\r\n".encode() + body)
        assert client.answer().status == 200
    assert client.counts(domain) == (3, 0)


def test_a_put_is_answered_without_waiting_for_a_body_and_says_that_it_closes(client: Client, domain: str) -> None:
    client.send(f"PUT /events/{domain}/delivered HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n".encode())
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert client.counts(domain) == (1, 0)


def test_pipelined_requests_are_answered_in_order(client: Client, domain: str) -> None:
    put = f"PUT /events/{domain}/delivered HTTP/1.1\r\nhost: test\r\n\r\n"
    get = f"GET /domains/{domain} HTTP/1.1\r\nhost: test\r\n\r\n"
    client.send((put + get).encode() * 20)
    for number in range(1, 21):
        assert client.answer().status == 200
        assert client.answer().json["delivered"] == number


def test_http_1_0_is_answered_and_closed(client: Client, domain: str) -> None:
    client.send(f"PUT /events/{domain}/delivered HTTP/1.0\r\n\r\n".encode())
    assert client.answer().status == 200
    assert client.ends()
    client.close()
    assert client.counts(domain) == (1, 0)


@pytest.mark.parametrize("query", ["?", "?x=1", "?/bounced", "?%ff"])
def test_a_query_string_changes_nothing(client: Client, domain: str, query: str) -> None:
    assert client.request("PUT", f"/events/{domain}/delivered{query}").status == 200
    assert client.request("GET", f"/domains/{domain}{query}").json["delivered"] == 1


@pytest.mark.parametrize("path", ["/domains/example.com", "/domains/stats", "/metrics", "/healthz", "/readyz"])
def test_head_is_get_without_the_body(client: Client, path: str) -> None:
    answer, body = client.request("HEAD", path), client.request("GET", path)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"] == body.headers["content-type"]
    assert client.request("GET", "/healthz").status == 200


# --- health and metrics ---


def test_health_and_readiness_are_told_as_json(client: Client) -> None:
    assert client.request("GET", "/healthz").json == {"status": "ok"}
    assert client.request("GET", "/readyz").json == {"status": "ready", "shards": ["ready", "ready"]}


def samples(client: Client) -> dict[tuple[str, ...], float]:
    answer = client.request("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.body.decode())
    found = [sample for family in families for sample in family.samples]
    assert len({(sample.name, *sorted(sample.labels.items())) for sample in found}) == len(found)
    return {(sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value for sample in found}


def all_counted(client: Client) -> bool:
    told = client.request("GET", "/metrics", headers={"accept": "application/json"}).json
    return bool(told["events"] == told["events_counted"])


def test_metrics_count_what_was_sent(client: Client, domain: str) -> None:
    eventually("shards have flushed what other tests sent", lambda: all_counted(client), 10)
    before = samples(client)
    for kind, times in (("delivered", 40), ("bounced", 3)):
        for _ in range(times):
            client.put(domain, kind)
    client.bulk({"domain": domain, "type": "delivered", "count": 70}, {"domain": domain, "type": "bounced"})
    bad = client.bulk({"domain": domain, "type": "delivered"}, {"domain": "a..b", "type": "delivered"})
    assert bad.status == 422
    client.put("a..b")
    client.domain(domain)
    client.request("GET", "/nothing")
    expected = {
        ("catchall_http_requests_total", "200", "delivered"): 40,
        ("catchall_http_requests_total", "400", "delivered"): 1,
        ("catchall_http_requests_total", "200", "bounced"): 3,
        ("catchall_http_requests_total", "200", "bulk"): 1,
        ("catchall_http_requests_total", "422", "bulk"): 1,
        ("catchall_http_requests_total", "200", "domain"): 1,
        ("catchall_http_requests_total", "404", "other"): 1,
        ("catchall_bulk_events_total", "delivered"): 70,
        ("catchall_bulk_events_total", "bounced"): 1,
        ("catchall_bulk_rejected_events_total",): 1,
        ("catchall_events_counted_total", "delivered"): 110,
        ("catchall_events_counted_total", "bounced"): 4,
    }

    def moved() -> dict[tuple[str, ...], float]:
        now = samples(client)
        return {key: now[key] - before[key] for key in expected}

    at_once = [key for key in expected if key[0] != "catchall_events_counted_total"]
    assert [(key, moved()[key]) for key in at_once] == [(key, expected[key]) for key in at_once]
    eventually("shards have flushed what was sent", lambda: moved() == expected, 10)
    after = samples(client)
    assert after["catchall_processes_ready", "shard"] == after["catchall_processes_ready", "http"] == 2


def test_metrics_come_as_json_for_those_who_ask(client: Client, domain: str) -> None:
    def told() -> dict[str, Any]:
        answer = client.request("GET", "/metrics", headers={"accept": "application/json"})
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        found: dict[str, Any] = answer.json
        return found

    before = told()
    client.count(domain, delivered=5, bounced=2)
    client.put(domain)
    after = told()
    assert after["events"] - before["events"] == 8
    assert after["events_delivered"] - before["events_delivered"] == 6
    assert after["requests"] - before["requests"] == 3
    eventually("shards have flushed", lambda: all_counted(client), 10)


# --- what is refused ---


@pytest.mark.parametrize(
    "path",
    ["/", "//", "/events/", "/events/a.com", "/events/a.com/", "/events/a.com/opened", "/events/a.com/delivered/",
     "/events//a.com/delivered", "/Events/a.com/delivered", "/events/a.com/Delivered", "/events/a/b/delivered", "/domains",
     "/domains/a.com/", "/domains/a/b", "/metrics/", "/healthz/x", "/events/a.com%2Fdelivered", "/%65vents/a.com/delivered",
     "/favicon.ico", "/../etc/passwd"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_path_that_is_none_of_ours_is_404(client: Client, method: str, path: str) -> None:
    refused(client.request(method, path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [*((method, f"/events/a.com/{kind}", "PUT, POST") for kind in KINDS for method in ("GET", "DELETE", "PATCH", "put", "HEAD")),
     *((method, "/events", "POST") for method in ("PUT", "GET", "post", "OPTIONS")),
     *((method, path, "GET, HEAD") for path in ("/domains/a.com", "/domains/stats", "/metrics", "/healthz", "/readyz")
       for method in ("PUT", "POST", "DELETE", "get"))],
)  # fmt: skip
def test_a_wrong_method_is_405_and_says_which_are_allowed(client: Client, method: str, path: str, allow: str) -> None:
    answer = client.request(method, path)
    assert answer.headers["allow"] == allow
    if method == "HEAD":
        assert (answer.status, answer.body) == (405, b"")
    else:
        refused(answer, 405)
    assert client.request("GET", "/healthz").status == 200


BAD_NAMES = {
    "empty": "", "dot": ".", "empty label": "a..b", "leading dot": ".a.com", "two dots at the end": "a.com..", "space": "a%20b.com",
    "slash": "a%2Fb.com", "encoded slash before a kind": "a%2Fdelivered", "NUL": "a%00b.com", "newline": "a.com%0A",
    "not UTF-8": "a%FF.com", "surrogate": "a%ED%A0%80.com", "overlong": "a%C0%AE.com", "bare percent": "a%.com",
    "half an escape": "a%2.com", "plus": "+a.com", "at": "user@a.com", "port": "a.com:25", "label of 64": "a" * 64 + ".com",
    "name of 254": ".".join(["a" * 49] * 5) + ".com1", "IPv4": "192.0.2.1", "literal": "[192.0.2.1]", "IPv6": "[IPv6:2001:db8::1]",
    "hyphen first": "-a.com", "hyphen last": "a-.com", "emoji joiner": "a%E2%80%8D.com", "20,000 characters": "a" * 20_000,
    "hash": "a%23b.com", "count": "a.com%203",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES)
def test_a_bad_name_is_400_wherever_it_stands(client: Client, name: str) -> None:
    for method, path in (("PUT", f"/events/{name}/delivered"), ("POST", f"/events/{name}/bounced")):
        assert refused(client.request(method, path), 400)
    answer = client.request("GET", f"/domains/{name}")
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json["detail"]


def test_one_wrong_event_refuses_the_whole_request_and_is_named(client: Client, domain: str) -> None:
    body = event(domain) * 3 + event("a..b") + event(domain, "opened") + event(domain, count=0) + b"{\n"
    answer = client.request("POST", "/events", body, NDJSON)
    refused(answer, 422)
    assert [(error["index"], error["code"]) for error in answer.json["errors"]] == [
        (3, "bad_domain"),
        (4, "unknown_type"),
        (5, "count_out_of_range"),
        (6, "bad_json"),
    ]
    assert (answer.headers["catchall-counted"], answer.headers["catchall-rejected"]) == ("0", "4")
    assert client.counts(domain) == (0, 0)


@pytest.mark.parametrize(
    "headers",
    [{}, {"content-type": "application/json"}, {"content-type": "text/plain; charset=utf-8"}, NDJSON | {"content-encoding": "gzip"}],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, BODY_MAX])
def test_a_body_of_another_type_is_415(client: Client, domain: str, headers: dict[str, str], size: int) -> None:
    body = event(domain) * size
    refused(client.request("POST", "/events", body[: max(len(event(domain)), size)], headers), 415)
    assert client.counts(domain) == (0, 0)


def test_a_body_at_the_limit_counts_and_one_byte_more_is_413(client: Client, domain: str) -> None:
    body = event(domain)
    assert client.request("POST", "/events", body + b" " * (BODY_MAX - len(body)), NDJSON).status == 200
    detail = refused(client.request("POST", "/events", body + b" " * (BODY_MAX + 1 - len(body)), NDJSON), 413)
    assert str(BODY_MAX) in detail
    assert client.counts(domain) == (1, 0)


def test_a_body_far_larger_than_the_limit_is_told_413_in_chunks_too(client: Client, domain: str) -> None:
    head = b"POST /events HTTP/1.1\r\nhost: test\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
    client.send(head + chunks(event(domain), b" " * BODY_MAX, end=False))
    refused(client.answer(), 413)
    assert client.counts(domain) == (0, 0)


def test_more_events_than_the_limit_are_413_and_the_limit_itself_counts(client: Client, domain: str) -> None:
    assert client.request("POST", "/events", event(domain) * EVENTS_MAX, NDJSON).status == 200
    refused(client.request("POST", "/events", event(domain) * (EVENTS_MAX + 1), NDJSON), 413)
    assert client.counts(domain) == (EVENTS_MAX, 0)


def test_a_stalled_body_is_408_and_closed_while_others_are_served(service: Service, client: Client, domain: str) -> None:
    stalled = [service.client() for _ in range(4)]
    for slow in stalled:
        body = event(domain)
        slow.send(b"POST /events HTTP/1.1\r\nhost: t\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n%b"
                  % (len(body) + 1, body))  # fmt: skip
    for _ in range(100):
        assert client.put(domain, "bounced") == 200
    for slow in stalled:
        answer = slow.answer()
        refused(answer, 408)
        assert answer.headers["connection"] == "close"
        assert slow.ends()
    assert client.counts(domain) == (0, 100)


def test_a_client_that_goes_away_in_the_middle_of_a_body_records_nothing(service: Service, client: Client, domain: str) -> None:
    body = event(domain)
    for sent in (0, 1, len(body) - 1, len(body)):
        with socket.create_connection(("127.0.0.1", service.port)) as leaving:
            leaving.sendall(b"POST /events HTTP/1.1\r\nhost: t\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n"
                            % (len(body) + 1) + body[:sent])  # fmt: skip
    for _ in range(50):
        assert client.counts(domain) == (0, 0)


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n\r\n"], ids=["no size", "wrong size", "negative"])
def test_a_body_whose_chunks_are_malformed_is_told_so_and_records_nothing(client: Client, domain: str, rest: bytes) -> None:
    head = b"POST /events HTTP/1.1\r\nhost: t\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
    client.send(head + chunks(event(domain), end=False) + rest)
    refused(client.answer(), 400)
    assert client.ends()
    client.close()
    assert client.counts(domain) == (0, 0)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"PUT /events/a\x00b/delivered HTTP/1.1\r\nhost: t\r\n\r\n",
     b"PUT /events/a b/delivered HTTP/1.1\r\nhost: t\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
     b"PUT /events/" + b"a" * 70_000 + b"/delivered HTTP/1.1\r\nhost: t\r\n\r\n",
     b"GET /healthz HTTP/1.1\r\nhost: t\r\nx: " + b"a" * 1_000_000 + b"\r\n\r\n"],
    ids=["TLS", "NUL", "space", "version", "70,000 bytes", "1 MB header"],
)  # fmt: skip
def test_what_is_no_http_is_refused_by_the_server_and_closed(service: Service, client: Client, sent: bytes) -> None:
    broken = service.client()
    with suppress(OSError):  # the server may close before it has read all
        broken.send(sent)
        assert 400 <= broken.answer().status < 500
        assert broken.ends()
    assert client.request("GET", "/healthz").status == 200


def wrong_request(chance: random.Random, domain: str) -> tuple[str, str, bytes | None, dict[str, str]]:
    """One of very many requests that are each wrong in one way; most of them name a domain that must stay uncounted."""
    good = event(domain)
    bad_event = chance.choice([
        event(domain, "opened"), event(domain, count=chance.choice([0, -1, 1_000_001, 1.5, "2", True, None])),
        event(domain, extra=1), event(f"{domain}..", "bounced"), b"[]\n", b"{}\n", b"\xff\n", b'"x"\n', b"{" * chance.randint(1, 500),
        json.dumps({"domain": domain}).encode(), json.dumps({"type": "bounced"}).encode(), b'{"domain": 5, "type": "bounced"}\n',
    ])  # fmt: skip
    name = chance.choice(list(BAD_NAMES.values())) if chance.random() < 0.5 else domain + chance.choice("%20 %00 %2F .. %FF".split())
    return chance.choice([
        ("PUT", f"/events/{name}/{chance.choice(KINDS)}", None, {}),
        (chance.choice(["GET", "DELETE", "PATCH", "put", "BREW", "TRACE"]), f"/events/{domain}/{chance.choice(KINDS)}", None, {}),
        ("PUT", f"/events/{domain}/{chance.choice(['', 'opened', 'delivered/x', 'Bounced', '%64elivered'])}", good, {}),
        ("PUT", f"/{chance.choice(['event', 'EVENTS', 'events/x', ''])}/{domain}/delivered", None, {}),
        ("POST", "/events", good * chance.randint(0, 5) + bad_event + good * chance.randint(0, 5), NDJSON),
        ("POST", "/events", good, {"content-type": chance.choice(["text/plain", "application/json", "x", ";"])}),
        ("POST", "/events", good * (EVENTS_MAX + 1), NDJSON),
        ("PUT", "/events", good, NDJSON),
        ("POST", f"/domains/{domain}", good, NDJSON),
    ])  # fmt: skip


def test_a_thousand_wrong_requests_are_each_explained_and_change_no_count(client: Client, domain: str) -> None:
    client.count(domain, delivered=7, bounced=2)
    before = client.stats()
    chance = random.Random(20)
    for _ in range(1000):
        request = wrong_request(chance, domain)
        answer = client.request(*request)
        assert 400 <= answer.status < 500, request
        refused(answer, answer.status)
    assert client.counts(domain) == (7, 2)
    assert client.stats() == before
