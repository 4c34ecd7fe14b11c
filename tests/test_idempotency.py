"""A resend counts once: Idempotency-Key on every write, `id` on every event of a bulk request."""

import json
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import urllib3
from resender import Resender
from service import NDJSON, Answer, Client, Service, eventually

Serve = Callable[..., Service]
PATH = "/events/{}/delivered"


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


def put(client: Client, domain: str, key: str, kind: str = "delivered", method: str = "PUT") -> Answer:
    return client.request(method, f"/events/{domain}/{kind}", headers={"Idempotency-Key": key})


def bulk(client: Client, *events: dict[str, Any], key: str | None = None) -> Answer:
    headers = NDJSON if key is None else {**NDJSON, "Idempotency-Key": key}
    return client.request("POST", "/events", b"".join(json.dumps(event).encode() + b"\n" for event in events), headers)


def told(answer: Answer) -> tuple[int, ...]:
    """(counted, duplicate, rejected) of a good answer."""
    assert answer.status == 200, answer
    return tuple(int(answer.headers[f"catchall-{what}"]) for what in ("counted", "duplicate", "rejected"))


# ---- the contract


def test_a_request_with_a_key_counts_once_however_often_it_is_sent(client: Client, domain: str, key: str) -> None:
    assert told(put(client, domain, key)) == (1, 0, 0)
    for method in ("PUT", "POST", "PUT"):
        assert told(put(client, domain, key, method=method)) == (0, 1, 0)
    assert client.counts(domain) == (1, 0)
    assert told(put(client, domain, key + "x")) == (1, 0, 0)
    assert client.counts(domain) == (2, 0)


def test_a_path_that_is_known_by_heart_still_sees_the_key(client: Client, domain: str, key: str) -> None:
    for _ in range(3):
        assert client.put(domain) == 200
    for _ in range(3):
        assert put(client, domain, key).status == 200
    assert client.put(domain) == 200
    assert client.counts(domain) == (5, 0)


def test_a_key_that_was_used_for_another_request_is_refused_and_counts_nothing(client: Client, domain: str, key: str) -> None:
    assert put(client, domain, key).status == 200
    event = {"domain": domain, "type": "delivered"}
    others = [put(client, domain, key, "bounced"), put(client, "other-" + domain, key), bulk(client, event, key=key)]
    for other in others:
        assert (other.status, other.json["type"]) == (422, "urn:catchall:problem:idempotency_key_reused")
        assert "Nothing was recorded." in other.json["detail"]
    assert client.counts(domain) == (1, 0)
    assert client.counts("other-" + domain) == (0, 0)
    assert told(put(client, domain, key)) == (0, 1, 0)


def test_the_same_name_written_in_another_way_is_the_same_request(client: Client, domain: str, key: str) -> None:
    assert told(put(client, domain, key)) == (1, 0, 0)
    assert told(put(client, domain.upper() + ".", key)) == (0, 1, 0)


@pytest.mark.parametrize(
    "headers",
    [b"idempotency-key:\r\n", b"idempotency-key: %b\r\n" % (b"k" * 256), b"idempotency-key: a\r\nidempotency-key: b\r\n"],
)
@pytest.mark.parametrize(
    "write",
    [
        b"PUT /events/%b/delivered HTTP/1.1\r\ncontent-length: 0\r\n",
        b"POST /events HTTP/1.1\r\ncontent-type: application/x-ndjson\r\ncontent-length: 0\r\n",
    ],
)
def test_a_key_that_cannot_be_one_is_refused(client: Client, domain: str, write: bytes, headers: bytes) -> None:
    client.send(write.replace(b"%b", domain.encode()) + b"host: test\r\n" + headers + b"\r\n")
    answer = client.answer()
    assert (answer.status, answer.json["type"]) == (400, "urn:catchall:problem:bad_idempotency_key")
    assert client.counts(domain) == (0, 0)


@pytest.mark.parametrize("key", ["k", "k" * 255, '"quoted"', "k\u00e9y", "a b\tc"])
def test_any_text_of_1_to_255_bytes_is_a_key(client: Client, domain: str, key: str) -> None:
    assert [told(put(client, domain, key)) for _ in range(2)] == [(1, 0, 0), (0, 1, 0)]


def test_an_event_with_an_id_counts_once_in_one_request_and_in_many(client: Client, domain: str) -> None:
    events = [
        {"domain": domain, "type": "delivered", "id": "m1"},
        {"domain": domain, "type": "delivered", "id": "m2", "count": 12},
        {"domain": domain, "type": "bounced", "id": "m1"},
        {"domain": domain.upper(), "type": "delivered", "id": "m2", "count": 12},
    ]
    assert told(bulk(client, *events)) == (14, 12, 0)
    assert told(bulk(client, *events)) == (0, 26, 0)
    assert told(bulk(client, {"domain": domain, "type": "delivered", "id": "m3"}, events[0])) == (1, 1, 0)
    assert client.counts(domain) == (14, 1)


def test_the_same_id_of_another_domain_or_kind_is_another_event(client: Client, domain: str) -> None:
    for name in (domain, "x" + domain):
        for kind in ("delivered", "bounced"):
            assert told(bulk(client, {"domain": name, "type": kind, "id": "one"})) == (1, 0, 0)


def test_a_bulk_with_a_key_counts_once_also_its_events_that_are_alike(client: Client, domain: str, key: str) -> None:
    events = [{"domain": f"{n % 20}.{domain}", "type": "delivered"} for n in range(100)]
    assert told(bulk(client, *events, key=key)) == (100, 0, 0)
    assert told(bulk(client, *events, key=key)) == (0, 100, 0)
    assert all(client.counts(f"{n}.{domain}") == (5, 0) for n in range(20))


def test_ids_of_events_hold_also_in_a_request_with_a_key(client: Client, domain: str, key: str) -> None:
    events = [{"domain": domain, "type": "delivered", "id": "own"}, {"domain": domain, "type": "delivered"}]
    assert told(bulk(client, events[0])) == (1, 0, 0)
    assert told(bulk(client, *events, key=key)) == (1, 1, 0)
    assert told(bulk(client, *events, key=key)) == (0, 2, 0)
    assert client.counts(domain) == (2, 0)


def test_a_bulk_with_one_wrong_event_uses_up_neither_key_nor_ids(client: Client, domain: str, key: str) -> None:
    good = {"domain": domain, "type": "delivered", "id": "m"}
    wrong = bulk(client, good, {"domain": "-bad-", "type": "delivered"}, key=key)
    assert (wrong.status, wrong.headers["catchall-rejected"]) == (422, "1")
    assert told(bulk(client, good, key=key)) == (1, 0, 0)


def test_the_same_key_at_once_from_many_clients_counts_once(service: Service, domain: str, key: str) -> None:
    clients, answers = [service.client() for _ in range(8)], []
    start = threading.Barrier(len(clients))

    def send(client: Client) -> None:
        start.wait()
        answers.append(told(put(client, domain, key)))

    threads = [threading.Thread(target=send, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(0, 1, 0)] * 7 + [(1, 0, 0)]
    assert clients[0].counts(domain) == (1, 0)


def test_two_requests_at_once_with_one_key_and_different_content_count_as_one_of_them(
    service: Service, domain: str, key: str
) -> None:
    clients, answers = [service.client() for _ in range(6)], []
    start = threading.Barrier(len(clients))

    def send(number: int) -> None:
        start.wait()
        answers.append((put(clients[number], domain, key, ("delivered", "bounced")[number % 2]).status, number % 2))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good, refused = {n for status, n in answers if status == 200}, {n for status, n in answers if status == 422}
    assert (len(answers), len(good), len(refused)) == (6, 1, 1)
    assert clients[0].counts(domain) == ((1, 0) if good == {0} else (0, 1))


def value(client: Client, name: str) -> float:
    """A metric, all its series added up."""
    found = [line for line in client.request("GET", "/metrics").body.decode().splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in found)


def test_metrics_tell_of_repeats_and_of_the_window(serve: Serve) -> None:
    service = serve("--flush-interval", "20ms")
    client = service.client()
    for _ in range(3):
        bulk(client, {"domain": "a.example", "type": "delivered", "id": "m", "count": 5})
    service.restart()  # its last flush is done
    client = service.client()
    bulk(client, {"domain": "a.example", "type": "delivered", "id": "m"})
    eventually("the repeat is told", lambda: value(client, "catchall_events_duplicate_total") == 1)
    eventually("the id is told", lambda: value(client, "catchall_ids_held") == 1)
    assert value(client, "catchall_ids_window_seconds") == 48 * 3600


def test_no_more_ids_are_held_than_the_setting_says(serve: Serve) -> None:
    few = ("--workers", "1", "--set", "ids.max=100", "--set", "metrics.interval=10ms")
    service = serve(*few, "--flush-interval", "20ms")
    client = service.client()
    events = [{"domain": f"{n % 30}.example", "type": "delivered", "id": str(n)} for n in range(1000)]
    for at in range(0, 1000, 50):
        assert told(bulk(client, *events[at : at + 50])) == (50, 0, 0)
    eventually("the oldest are forgotten", lambda: value(client, "catchall_ids_held") == 100)
    service.restart(*few, "--flush-interval", "1h")
    client = service.client()
    eventually("the ledger holds no more", lambda: value(client, "catchall_ids_held") == 100)
    assert told(bulk(client, *events)) == (900, 100, 0)
    service.stop()


# ---- when something dies in between


@pytest.mark.parametrize("fsync", ["interval", "always", "never"])
def test_a_resend_after_everything_was_killed_counts_once(serve: Serve, fsync: str) -> None:
    service = serve("--workers", "2", "--fsync", fsync, "--flush-interval", "20ms")
    events = [{"domain": f"{n}.example", "type": "delivered", "id": str(n)} for n in range(30)]
    for turn in range(3):
        client = service.client()
        assert put(client, "put.example", "key").status == 200
        assert bulk(client, *events).status == 200
        assert bulk(client, *({"domain": "k.example", "type": "bounced"} for _ in range(9)), key="bulk key").status == 200
        assert put(client, "put.example", "bulk key").status == 422
        assert client.counts("put.example") == (1, 0)
        assert client.counts("k.example") == (0, 9)
        assert all(client.counts(f"{n}.example") == (1, 0) for n in range(30))
        if turn < 2:
            service.kill_all()
            service.start()
    service.stop()


@pytest.mark.drill
def test_a_put_that_urllib3_resends_by_itself_counts_once_though_the_service_died_in_between(serve: Serve) -> None:
    service = serve("--workers", "1", "--http-workers", "1")

    def die() -> None:
        service.kill_all()
        service.start()

    with ThreadPoolExecutor(1) as starter:  # a service ends with the thread that started it
        for number, key in enumerate(["first", "second"]):
            proxy = Resender(service.port, lose=1, resends=False, meanwhile=lambda: starter.submit(die).result())
            with proxy, urllib3.PoolManager() as pool:
                url = f"http://127.0.0.1:{proxy.port}/events/a.example/delivered"
                answer = pool.request("PUT", url, headers={"Idempotency-Key": key})
            assert (answer.status, answer.headers["catchall-duplicate"]) == (200, "1")
            assert proxy.seen >= 2
            assert service.client().counts("a.example") == (number + 1, 0)
        service.stop()


@pytest.mark.drill
@pytest.mark.parametrize("role", ["http", "shard"])
def test_a_request_that_a_proxy_resends_counts_once_though_a_process_died_in_between(serve: Serve, role: str) -> None:
    service = serve("--workers", "1", "--http-workers", "1")
    events = b"".join(b'{"domain":"%d.example","type":"delivered"}\n' % (n % 5) for n in range(50))
    with Resender(service.port, lose=2, resends=True, meanwhile=lambda: service.kill(role)) as proxy:
        client = Client(proxy.port)
        answer = client.request("POST", "/events", events, {**NDJSON, "Idempotency-Key": "key", "Connection": "close"})
        client.close()
        assert answer.status == 200
        assert proxy.seen >= 3
        client = Client(proxy.port)
        put = client.request("PUT", "/events/a.example/bounced", headers={"Idempotency-Key": "other"})
        client.close()
        assert told(put) == (1, 0, 0)
    service.wait_until_ready()
    client = service.client()
    assert [client.counts(f"{n}.example") for n in range(5)] == [(10, 0)] * 5
    assert client.counts("a.example") == (0, 1)
    service.stop()


def test_while_a_shard_stands_still_keys_are_refused_and_ids_are_recorded_untold(serve: Serve) -> None:
    """A key's outcome must be known before its events are recorded; an id's need not."""
    service = serve("--workers", "1", "--set", "server.write_timeout=300ms")
    client = service.client()
    assert told(put(client, "a.example", "before")) == (1, 0, 0)
    service.signal(signal.SIGSTOP, "shard", 0)
    refused = put(client, "a.example", "key")
    assert (refused.status, refused.json["type"]) == (503, "urn:catchall:problem:shard")
    assert "Nothing was recorded." in refused.json["detail"]
    assert int(refused.headers["retry-after"]) > 0
    recorded = bulk(client, {"domain": "b.example", "type": "delivered", "id": "m"})
    assert recorded.status == 200
    assert "catchall-counted" not in recorded.headers
    service.signal(signal.SIGCONT, "shard", 0)
    service.wait_until_ready()
    assert told(put(client, "a.example", "key")) == (1, 0, 0)
    assert told(bulk(client, {"domain": "b.example", "type": "delivered", "id": "m"})) == (0, 1, 0)
    assert client.counts("a.example") == (2, 0)
    assert client.counts("b.example") == (1, 0)
    service.stop()
