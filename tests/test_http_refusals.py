"""The HTTP contract, checked on a running service: what is refused is explained, and counts nothing."""

import json
import random
import socket
from contextlib import suppress

import pytest
from service import BODY_MAX, CHUNKED, EVENTS_MAX, KINDS, NDJSON, WITH_LENGTH, Answer, Client, Service, chunks, event


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
    [*((method, f"/events/a.com/{kind}", "PUT, POST") for kind in KINDS for method in ("GET", "DELETE", "put", "HEAD")),
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
    "empty": "",
    "dot": ".",
    "empty label": "a..b",
    "leading dot": ".a.com",
    "two dots at the end": "a.com..",
    "space": "a%20b.com",
    "slash": "a%2Fb.com",
    "encoded slash before a kind": "a%2Fdelivered",
    "NUL": "a%00b.com",
    "newline": "a.com%0A",
    "not UTF-8": "a%FF.com",
    "surrogate": "a%ED%A0%80.com",
    "overlong": "a%C0%AE.com",
    "bare percent": "a%.com",
    "half an escape": "a%2.com",
    "plus": "+a.com",
    "at": "user@a.com",
    "port": "a.com:25",
    "label of 64": "a" * 64 + ".com",
    "name of 254": ".".join(["a" * 49] * 5) + ".com1",
    "IPv4": "192.0.2.1",
    "literal": "[192.0.2.1]",
    "IPv6": "[IPv6:2001:db8::1]",
    "hyphen first": "-a.com",
    "hyphen last": "a-.com",
    "emoji joiner": "a%E2%80%8D.com",
    "20,000 characters": "a" * 20_000,
    "hash": "a%23b.com",
    "count": "a.com%203",
}


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
    [
        {},
        {"content-type": "application/json"},
        {"content-type": "text/plain; charset=utf-8"},
        NDJSON | {"content-encoding": "gzip"},
    ],
)
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
    client.send(CHUNKED + chunks(event(domain), b" " * BODY_MAX, end=False))
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
        slow.send(WITH_LENGTH % (len(body) + 1) + body)
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
            leaving.sendall(WITH_LENGTH % (len(body) + 1) + body[:sent])
    for _ in range(50):
        assert client.counts(domain) == (0, 0)


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n\r\n"], ids=["no size", "wrong size", "negative"])
def test_a_body_whose_chunks_are_malformed_is_told_so_and_records_nothing(client: Client, domain: str, rest: bytes) -> None:
    client.send(CHUNKED + chunks(event(domain), end=False) + rest)
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
    kind = chance.choice(KINDS)
    wrong_counts = [0, -1, 1_000_001, 1.5, "2", True, None]
    wrong_events = [event(domain, "opened"), event(domain, count=chance.choice(wrong_counts)), event(domain, extra=1),
                    event(f"{domain}..", kind), b"[]\n", b"{}\n", b"\xff\n", b'"x"\n', b"{" * chance.randint(1, 500),
                    json.dumps({"domain": domain}).encode(), json.dumps({"type": kind}).encode()]  # fmt: skip
    mixed = good * chance.randint(0, 5) + chance.choice(wrong_events) + good * chance.randint(0, 5)
    name = chance.choice([*BAD_NAMES.values(), *(domain + end for end in ("%20", "%00", "%2F", "..", "%FF"))])
    no_kind = chance.choice(["", "opened", "delivered/x", "Bounced", "%64elivered"])
    no_events = chance.choice(["event", "EVENTS", "events/x", ""])
    requests: list[tuple[str, str, bytes | None, dict[str, str]]] = [
        ("PUT", f"/events/{name}/{kind}", None, {}),
        (chance.choice(["GET", "DELETE", "PATCH", "put", "BREW", "TRACE"]), f"/events/{domain}/{kind}", None, {}),
        ("PUT", f"/events/{domain}/{no_kind}", good, {}),
        ("PUT", f"/{no_events}/{domain}/delivered", None, {}),
        ("POST", "/events", mixed, NDJSON),
        ("POST", "/events", good, {"content-type": chance.choice(["text/plain", "application/json", "x", ";"])}),
        ("POST", "/events", good * (EVENTS_MAX + 1), NDJSON),
        ("PUT", "/events", good, NDJSON),
        ("POST", f"/domains/{domain}", good, NDJSON),
    ]
    return chance.choice(requests)


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
