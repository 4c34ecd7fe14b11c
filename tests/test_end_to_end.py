"""The whole service, from the command line to the files it leaves: every storage, restarts, two instances, two hosts."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mongod import Mongo
from service import SMALL, WITH_LENGTH, Client, NotSent, Service, at_rest, event, eventually
from test_cli import catchall

Serve = Callable[..., Service]

DOMAINS = {
    "cold.example": (1, 0, "unknown"),
    "edge.example": (1000, 0, "unknown"),
    "warm.example": (1001, 0, "catch-all"),
    "hot.example": (3_000_000, 0, "catch-all"),
    "one-bounce.example": (2000, 1, "not-catch-all"),
    "bounced.example": (0, 7, "not-catch-all"),
    "xn--bcher-kva.example": (2, 0, "unknown"),
}
STATS = {"catch_all": 2, "not_catch_all": 2, "unknown": 3, "total": 7}


@pytest.fixture(params=["sqlite", "memory", "mongodb"])
def storage(request: pytest.FixtureRequest) -> list[str]:
    """The flags that choose a storage; MongoDB with a database of this test's own."""
    if request.param == "mongodb":
        return mongodb_flags(request.getfixturevalue("mongo"), request.getfixturevalue("mongo_database"))
    return ["--storage", request.param]


def mongodb_flags(mongo: Mongo, database: str) -> list[str]:
    return ["--mongodb", mongo.uri, "--set", f"mongodb.database={database}", "--set", "mongodb.push_interval=50ms"]


def ingest(service: Service) -> None:
    """Send what makes up DOMAINS, single and bulk, over several connections."""
    clients = [service.client() for _ in range(4)]
    for number, (name, (delivered, bounced, _)) in enumerate(DOMAINS.items()):
        single = min(delivered, 25)
        for i in range(single):
            assert clients[i % 4].put(name) == 200
        for i in range(bounced):
            assert clients[i % 4].put(name.upper(), "bounced") == 200
        while single < delivered:
            part = min(delivered - single, 999_999)
            clients[number % 4].count(name, delivered=part)
            single += part


def assert_answers(service: Service) -> None:
    client = service.client()
    for name, (delivered, bounced, status) in DOMAINS.items():
        assert client.domain(name) == {"domain": name, "status": status, "delivered": delivered, "bounced": bounced}
    assert client.stats() == STATS


def assert_at_rest(service: Service, root: Path | None = None) -> None:
    assert at_rest(service.data_dir, root) == ([], 0)


def test_events_become_verdicts_and_statistics_under_every_storage(serve: Serve, storage: list[str]) -> None:
    service = serve(*storage, "--workers", "2", "--http-workers", "2", "--flush-interval", "50ms")
    ingest(service)
    assert_answers(service)
    service.stop()


@pytest.mark.parametrize("storage", ["sqlite", "mongodb"], indirect=True)
def test_a_stop_and_a_start_change_no_answer_and_leave_nothing_behind(serve: Serve, storage: list[str]) -> None:
    service = serve(*storage, "--workers", "2", "--flush-interval", "1h")  # so that only the stop flushes
    ingest(service)
    assert_answers(service)
    for _ in range(2):
        service.stop()
        assert_at_rest(service)
        service.start()
        assert_answers(service)


def test_memory_starts_from_nothing_and_leaves_nothing_behind(serve: Serve, tmp_path: Path) -> None:
    service = serve("--storage", "memory", "--set", f"storage.memory_dir={tmp_path}")
    service.client().count("a.example", delivered=5)
    assert len(list(tmp_path.glob("catchall-*"))) == 1
    service.restart()
    assert service.client().counts("a.example") == (0, 0)
    service.stop()
    assert not list(tmp_path.glob("catchall-*"))


def test_changing_the_number_of_shards_loses_and_doubles_nothing(serve: Serve) -> None:
    service = serve("--workers", "1")
    ingest(service)
    expected = dict.fromkeys((f"n{number}.example" for number in range(200)), 0)
    for shards in (4, 2, 3):
        client = service.client()
        for number, name in enumerate(expected):
            expected[name] += number % 3 + 1
            client.count(name, delivered=number % 3 + 1)
        service.restart("--workers", str(shards), "--http-workers", str(shards % 3 + 1))
        assert len(service.pids("shard")) == shards
        client = service.client()
        assert {name: client.counts(name)[0] for name in expected} == expected
        for name, (delivered, bounced, _) in DOMAINS.items():
            assert client.counts(name) == (delivered, bounced)
    service.stop()
    assert_at_rest(service)


@pytest.mark.parametrize("fsync", ["always", "never", "interval"])
def test_every_fsync_policy_counts_and_keeps_what_it_acknowledged(serve: Serve, fsync: str) -> None:
    service = serve("--fsync", fsync, "--workers", "2", "--http-workers", "2")
    ingest(service)
    assert_answers(service)
    service.restart()
    assert_answers(service)
    service.stop()
    assert_at_rest(service)


READERS = 4


@pytest.mark.parametrize(
    ("reads", "flags"),
    [(10_000, []), (2000, ["--cache", "false", "--set", "cache.paths=0"]), (2000, ["--storage", "memory"]),
     (400, ["--fsync", "always"])],
    ids=["sqlite", "no cache", "memory", "always"],
)  # fmt: skip
def test_a_read_sees_all_acknowledged_before_it_whichever_worker_took_it(serve: Serve, reads: int, flags: list[str]) -> None:
    service = serve("--workers", "2", "--http-workers", "2", "--flush-interval", "10ms", *flags)
    missed: list[tuple[str, int, int]] = []
    seen: list[int] = []

    def write_and_read(number: int) -> None:
        first, second = service.clients_of_each_worker().values()
        counted = {f"r{number}-{n}.example": 0 for n in range(23)}
        names = list(counted)
        for i in range(reads // READERS):
            writer, reader = (first, second) if i % 2 else (second, first)
            name = names[i % len(names)]
            assert writer.put(name) == 200
            counted[name] += 1
            found = reader.counts(name)[0]
            if found != counted[name]:
                missed.append((name, counted[name], found))
        seen.append(reads // READERS)

    threads = [threading.Thread(target=write_and_read, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missed == []
    assert sum(seen) == reads
    assert service.client().stats()["total"] == 23 * READERS
    service.stop()


def test_with_too_little_free_space_writes_get_503_and_reads_go_on(serve: Serve) -> None:
    service = serve("--set", "data.min_free_space=1000000GiB", "--set", "data.hold=0s", "--set", "metrics.enabled=false")
    client = service.client()
    bounced = {"domain": "a.example", "type": "bounced"}
    for answer in (client.request("PUT", "/events/a.example/delivered"), client.bulk(bounced)):
        assert (answer.status, answer.json["type"]) == (503, "urn:catchall:problem:no_space")
        assert "Nothing was recorded." in answer.json["detail"]
        assert int(answer.headers["retry-after"]) > 0
    assert client.counts("a.example") == (0, 0)
    assert client.request("GET", "/metrics").status == 404, "they are switched off"
    service.stop()


def half_a_request(service: Service) -> tuple[Client, bytes]:
    """A client whose request is in flight, and what it has yet to send."""
    body = event("in-flight.example")
    client = service.client()
    client.send(WITH_LENGTH % len(body) + body[:5])
    assert service.client().put("a.example") == 200
    return client, body[5:]


def takes_connections(service: Service) -> bool:
    try:
        service.client().put("a.example")
    except (NotSent, OSError):
        return False
    return True


def test_a_stop_finishes_a_request_in_flight_and_takes_no_new_ones(serve: Serve) -> None:
    service = serve()
    client, rest = half_a_request(service)
    service.signal(signal.SIGTERM, "supervisor")
    eventually("new connections are refused", lambda: not takes_connections(service))
    client.send(rest)
    assert client.answer().status == 200
    service.stop(how=None)
    service.start()
    assert service.client().counts("in-flight.example") == (1, 0)


def test_a_second_signal_does_not_wait_for_requests_in_flight(serve: Serve) -> None:
    service = serve("--set", "server.read_timeout=1h", "--set", "server.shutdown_timeout=1h")
    client, _ = half_a_request(service)
    service.signal(signal.SIGTERM, "supervisor")
    eventually("new connections are refused", lambda: not takes_connections(service))
    service.stop()
    assert client.ends()
    service.start()
    assert service.client().counts("in-flight.example") == (0, 0)


def test_a_stop_in_the_middle_of_a_start_ends_well_and_leaves_no_process(serve: Serve) -> None:
    service = serve("--workers", "2")
    for role in ("shard", "front"):
        service.stop()
        service.spawn()
        eventually(f"a {role} runs", lambda role=role: service.pids(role))
        service.stop()
        service.start()
    service.stop()


# --- wrong use ---


def test_a_second_service_on_the_same_folder_ends_with_1_and_names_the_first(serve: Serve) -> None:
    service = serve()
    done = catchall("serve", "--data-dir", str(service.data_dir), "--port", "1", *SMALL)
    assert done.returncode == 1
    assert f"is in use by the service with pid {service.pids('supervisor')[0]}" in done.stderr
    assert service.client().put("a.example") == 200
    service.stop()


def test_a_port_in_use_ends_with_1_and_is_named(serve: Serve, tmp_path: Path) -> None:
    service = serve()
    done = catchall("serve", "--data-dir", str(tmp_path / "another"), "--port", str(service.port), *SMALL)
    assert done.returncode == 1
    assert f"something else listens on 127.0.0.1:{service.port}" in done.stderr
    assert "Traceback" not in done.stderr
    service.stop()


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--wrokers", "2"], 2, "did you mean --workers?"),
        (["--workers", "many"], 2, "shards.workers"),
        (["--storage", "floppy"], 2, "storage.kind"),
        (["--data-dir", "/proc/nowhere"], 1, "/proc/nowhere cannot be used"),
    ],
)
def test_a_start_that_cannot_be_says_why_and_leaves_no_process(flags: list[str], code: int, told: str, tmp_path: Path) -> None:
    done = catchall("serve", "--data-dir", str(tmp_path), *flags)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_more_shards_than_the_folder_has_partitions_are_refused(serve: Serve) -> None:
    service = serve("--set", "data.partitions=2", "--workers", "2")
    service.stop()
    done = catchall("serve", "--data-dir", str(service.data_dir), "--port", str(service.port), "--workers", "3")
    assert done.returncode == 1
    assert "made with 2 partitions" in done.stderr


# --- MongoDB ---


def test_two_hosts_on_one_mongodb_show_the_sum_and_so_does_the_view(serve: Serve, mongo: Mongo, mongo_database: str) -> None:
    flags = [*mongodb_flags(mongo, mongo_database), "--cache-ttl", "0s", "--flush-interval", "50ms"]
    here, there = serve(*flags, name="here"), serve(*flags, "--workers", "2", name="there")
    one, other = here.client(), there.client()
    one.count("both.example", delivered=600)
    other.count("both.example", delivered=401)
    one.count("bounce-there.example", delivered=2000)
    other.count("bounce-there.example", bounced=1)
    one.count("only-here.example", delivered=1000)
    expected = {
        "both.example": ("catch-all", 1001, 0),
        "bounce-there.example": ("not-catch-all", 2000, 1),
        "only-here.example": ("unknown", 1000, 0),
    }

    def shown(client: object) -> dict[str, tuple[str, int, int]]:
        answers = (client.domain(name) for name in expected)  # type: ignore[attr-defined]
        return {found["domain"]: (found["status"], found["delivered"], found["bounced"]) for found in answers}

    with mongo.client() as database:
        view = database[mongo_database].domain_status

        def in_view() -> dict[str, tuple[str, int, int]]:
            return {found["domain"]: (found["status"], found["delivered"], found["bounced"]) for found in view.find()}

        eventually("the view shows the sums", lambda: in_view() == expected)
        assert shown(one) == shown(other) == expected
        here.restart()
        assert shown(here.client()) == shown(other) == expected
        here.stop()
        there.stop()
        assert in_view() == expected
    for service in (here, there):
        assert_at_rest(service)


def test_the_counts_of_a_bounced_domain_follow_those_of_other_hosts(serve: Serve, mongo: Mongo, mongo_database: str) -> None:
    flags = [*mongodb_flags(mongo, mongo_database), "--cache-ttl", "0s", "--flush-interval", "50ms"]
    here, there = serve(*flags, name="here").client(), serve(*flags, name="there").client()
    here.count("a.example", bounced=1)
    assert here.counts("a.example") == (0, 1)  # and now MongoDB was asked about it
    there.count("a.example", delivered=5)
    eventually("the other host's share is seen", lambda: here.counts("a.example") == (5, 1), 4)


def test_a_mongodb_that_is_not_there_delays_nothing_but_the_copy(serve: Serve) -> None:
    nobody = "mongodb://127.0.0.1:9"
    service = serve("--mongodb", nobody, "--set", "mongodb.server_selection_timeout=100ms")
    ingest(service)
    assert_answers(service)
    service.restart()
    assert_answers(service)
    service.stop()
    assert_at_rest(service)
