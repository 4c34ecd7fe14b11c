"""The HTTP contract, checked on a running service: what counts, what is told, and how connections go on."""

import uuid
from datetime import datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service import CHUNKED, KINDS, NDJSON, Client, chunks, event, eventually

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
    client.send(CHUNKED)
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


def test_a_put_is_answered_without_waiting_for_a_body(client: Client, domain: str) -> None:
    client.send(f"PUT /events/{domain}/delivered HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\n".encode())
    assert client.answer().status == 200
    client.close()
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
    return bool(told["events"] == told["events_counted"] + told["events_duplicate"])


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
