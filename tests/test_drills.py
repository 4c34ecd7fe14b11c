"""Processes are killed, stopped and started under load; then every count is compared with what the requests were told."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mongod import Mongo
from service import Service, at_rest, eventually

from catchall.tools.drill_load import Load

pytestmark = pytest.mark.drill

Serve = Callable[..., Service]
BUSY = ("--workers", "2", "--http-workers", "2", "--flush-interval", "20ms")


def assert_exact(service: Service, *loads: Load) -> None:
    """Counts are what was promised, now and after a stop and a start, and at rest nothing is left in the queues."""
    service.wait_until_ready()
    for load in loads:
        assert_counted(service, load)
    service.stop()
    assert at_rest(service.data_dir) == ([], 0)
    service.start()
    for load in loads:
        assert_counted(service, load)
    service.stop()


def assert_counted(service: Service, load: Load) -> None:
    assert not load.record.mismatches(load.record.counted(service.client()))


def kill_and_wait(service: Service, load: Load, role: str, number: int | None = None) -> None:
    """SIGKILL under load, then load until the process has a successor, and a little longer."""
    running = len(service.pids(role, number))
    service.kill(role, number)
    eventually(f"{role} runs again", lambda: len(service.pids(role, number)) >= running)
    load.more()


def test_shards_killed_under_load_lose_and_double_nothing(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service) as load:
        for number in (0, 1, 0):
            kill_and_wait(service, load, "shard", number)
    assert load.record.requests["ambiguous"] == 0, "writes need no shard"
    assert_exact(service, load)


def test_http_workers_killed_under_load_lose_and_double_nothing(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service) as load:
        for _ in range(2):
            kill_and_wait(service, load, "http")
    assert_exact(service, load)


def test_a_worker_that_dies_again_and_again_is_served_by_a_new_front(serve: Serve) -> None:
    service = serve("--workers", "1", "--http-workers", "1", "--flush-interval", "20ms")
    front = service.pids("front")
    with Load(service) as load:
        kill_and_wait(service, load, "http")
        kill_and_wait(service, load, "http")
    eventually("the front is a new one or serves", lambda: service.pids("front") != front or service.pids("http"))
    assert_exact(service, load)


def test_the_http_front_killed_under_load_takes_its_workers_along_and_loses_nothing(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service) as load:
        for _ in range(2):
            workers = set(service.pids("http"))
            kill_and_wait(service, load, "front")
            eventually("the old workers are gone", lambda old=workers: not old & set(service.pids("http")))
    assert_exact(service, load)


def test_the_supervisor_killed_under_load_takes_all_along_and_a_new_one_goes_on(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service) as load:
        for _ in range(2):
            service.kill("supervisor")
            service.start()  # at once: it waits for what is left of the old one
            load.more()
    assert_exact(service, load)


def test_everything_killed_at_once_under_load_loses_and_doubles_nothing(serve: Serve) -> None:
    service = serve(*BUSY, "--fsync", "never")
    with Load(service) as load:
        for _ in range(3):
            service.kill_all()
            service.start()
            load.more()
    assert_exact(service, load)


def test_a_new_number_of_shards_after_a_kill_loses_and_doubles_nothing(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service) as load:
        for shards in ("4", "1"):
            service.kill_all()
            service.flags = ("--workers", shards, "--http-workers", "2", "--flush-interval", "20ms")
            service.start()
            load.more()
    assert_exact(service, load)


def test_memory_survives_the_death_of_everything_but_the_supervisor(serve: Serve, tmp_path: Path) -> None:
    service = serve(*BUSY, "--storage", "memory", "--set", f"storage.memory_dir={tmp_path}")
    with Load(service) as load:
        for role in ("shard", "http", "front"):
            kill_and_wait(service, load, role)
    service.wait_until_ready()
    assert_counted(service, load)
    service.stop()


def test_every_sync_policy_keeps_what_it_acknowledged_when_all_is_killed(serve: Serve) -> None:
    service = serve(*BUSY, "--fsync", "always")
    with Load(service) as load:
        for _ in range(2):
            service.kill_all()
            service.start()
            load.more(50)
    assert_exact(service, load)


def test_while_a_shard_stands_still_writes_go_on_and_reads_wait_or_get_503(serve: Serve) -> None:
    service = serve(*BUSY, "--set", "server.write_timeout=500ms")
    reader = service.client()
    with Load(service, reads=False) as load:
        service.signal(signal.SIGSTOP, "shard", 0)
        statuses = {reader.request("GET", f"/domains/{name}").status for name in load.record.names[:8]}
        assert statuses == {200, 503}  # some of the names are the other shard's
        ready = reader.request("GET", "/readyz")
        assert (ready.status, ready.json["status"]) == (503, "not ready")
        refused = reader.request("GET", "/domains/stats")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        load.more()
        service.signal(signal.SIGCONT, "shard", 0)
        eventually("the shard answers again", lambda: service.ready)
    assert set(load.record.requests) == {"acknowledged"}
    assert_exact(service, load)


def test_a_shard_that_stands_still_ends_with_its_supervisor_and_a_new_one_goes_on(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service, reads=False) as load:
        for _ in range(2):
            stopped = service.signal(signal.SIGSTOP, "shard", 0)
            load.more()
            service.kill("supervisor")
            service.start()
            assert stopped not in service.pids("shard")
    assert_exact(service, load)


def test_a_shard_that_stands_still_does_not_hold_up_a_stop_for_ever_and_loses_nothing(serve: Serve) -> None:
    service = serve(*BUSY, "--set", "server.shutdown_timeout=100ms")
    with Load(service, reads=False) as load:
        service.signal(signal.SIGSTOP, "shard", 1)
        load.more()
    service.stop(code=1)
    assert "is killed; nothing acknowledged is lost" in service.log
    service.start()
    assert_exact(service, load)


def test_a_stop_under_load_answers_what_is_in_flight_and_loses_nothing(serve: Serve) -> None:
    service = serve(*BUSY)
    with Load(service) as load:
        for how in (signal.SIGTERM, signal.SIGINT):
            service.stop(how)
            assert at_rest(service.data_dir) == ([], 0)
            service.start()
            load.more()
    assert_exact(service, load)


def test_writes_past_the_backlog_are_refused_and_accepted_again_when_it_is_gone(serve: Serve) -> None:
    service = serve("--set", "data.partitions=1", "--set", "data.backlog_max=512KiB", "--set", "data.hold=100ms",
                    "--set", "limits.pause_backlog=1GiB", "--flush-interval", "20ms")  # fmt: skip
    client = service.client()
    service.signal(signal.SIGSTOP, "shard", 0)
    events = [{"domain": f"{'long' * 12}.{number}.example", "type": "delivered"} for number in range(500)]
    recorded = 0
    while (answer := client.bulk(*events)).status == 200:
        recorded += 1
        assert recorded < 100, "half a MiB is full by now"
    assert (answer.status, answer.json["type"]) == (503, "urn:catchall:problem:backlog")
    assert "Nothing was recorded." in answer.json["detail"]
    assert int(answer.headers["retry-after"]) > 0
    service.signal(signal.SIGCONT, "shard", 0)
    eventually("writes are accepted again", lambda: client.bulk(*events).status == 200)
    assert client.counts(str(events[0]["domain"])) == (recorded + 1, 0)
    assert client.stats()["total"] == len(events)
    service.stop()


def test_without_mongodb_for_a_while_writes_go_on_and_its_copy_is_exact_afterwards(
    serve: Serve, own_mongo: Mongo, mongo_database: str
) -> None:
    service = serve(*BUSY, "--mongodb", own_mongo.uri, "--set", f"mongodb.database={mongo_database}",
                    "--set", "mongodb.push_interval=50ms", "--set", "mongodb.server_selection_timeout=300ms",
                    "--set", "mongodb.connect_timeout=300ms", "--set", "mongodb.backoff_max=500ms")  # fmt: skip
    with Load(service) as load:
        for stop in (own_mongo.stop, own_mongo.kill):
            stop()
            eventually("the service has noticed", lambda: b'\ncatchall_mongodb_up{shard="0"} 0' in metrics(service))
            load.more(1000)
            kill_and_wait(service, load, "shard", 0)
            own_mongo.start()
            load.more()
    assert set(load.record.requests) == {"acknowledged"}
    assert_counted(service, load)
    with own_mongo.client() as client:
        documents = client[mongo_database].domain_status

        def copied() -> bool:
            found = {document["_id"]: (document["delivered"], document["bounced"]) for document in documents.find()}
            wanted = {name: load.record.least(name) for name in load.record.names}
            return found == wanted

        eventually("the copy is exact", copied)
        assert_exact(service, load)
        assert copied()


def metrics(service: Service) -> bytes:
    return service.client().request("GET", "/metrics").body
