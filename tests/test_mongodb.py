"""What the copy in MongoDB promises while all is well, checked against a real server (fixtures: mongod.py)."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mongod import Connect, Mongo, free_port

from catchall.storage.backoff import backoff
from catchall.storage.mongodb import MongoCopy, MongoRefused, MongoUnavailable, Row
from catchall.storage.mongodb_stats import StoredStats

HERE, THERE = "0" * 32, "f" * 32
NOW = 1_700_000_000


@pytest.fixture
def copy(mongo: Mongo, connect_copy: Connect) -> MongoCopy:
    return connect_copy(mongo.uri)


@pytest.fixture
def database(mongo: Mongo, mongo_database: str) -> Iterator[Any]:
    with mongo.client() as client:
        yield client[mongo_database]


def row(name: str, delivered: int, bounced: int, at: int = NOW) -> Row:
    return (name, delivered, bounced, at, at if delivered else 0, at if bounced else 0)


def totals(copy: MongoCopy, *names: str) -> dict[str, tuple[int, int]]:
    """What all components hold together."""
    return copy.others(names, lambda _: "none")


# --- counts ---


@pytest.mark.parametrize("new_names", [frozenset(), frozenset({"a.com", "b.com"})], ids=["upserted", "inserted"])
def test_saving_the_same_rows_twice_counts_once(copy: MongoCopy, new_names: frozenset[str]) -> None:
    for _ in range(2):
        copy.send([row("b.com", 0, 1), row("a.com", 2, 0)], HERE, new_names)
    assert totals(copy, "a.com", "b.com", "c.com") == {"a.com": (2, 0), "b.com": (0, 1)}


def test_older_rows_that_come_late_change_nothing(copy: MongoCopy, database: Any) -> None:
    copy.send([("a.com", 5, 3, NOW, NOW + 50, NOW + 30)], HERE)
    document = database.domains.find_one()
    copy.send([("a.com", 4, 1, NOW, NOW + 40, NOW + 10)], HERE)
    copy.send([("a.com", 1, 0, NOW, NOW, 0)], HERE, {"a.com"})
    assert database.domains.find_one() == document


def test_the_components_of_two_hosts_add_up(copy: MongoCopy) -> None:
    copy.send([row("a.com", 5, 0)], HERE, {"a.com"})
    copy.send([row("a.com", 7, 2)], THERE, {"a.com"})
    copy.send([row("a.com", 1, 0)], f"{HERE}-2")
    assert totals(copy, "a.com") == {"a.com": (13, 2)}


def test_first_time_is_the_earliest_and_last_times_the_latest_of_all_hosts(copy: MongoCopy, database: Any) -> None:
    copy.send([("a.com", 1, 0, NOW, NOW + 9, 0)], HERE, {"a.com"})
    copy.send([("a.com", 1, 1, NOW - 5, NOW + 4, NOW + 7)], THERE)
    found = database.domains.find_one()
    times = [found[key].replace(tzinfo=None).isoformat() for key in ("first_at", "last_delivered_at", "last_bounced_at")]
    assert times == ["2023-11-14T22:13:15", "2023-11-14T22:13:29", "2023-11-14T22:13:27"]


@pytest.mark.parametrize("new_names", [frozenset(), frozenset({"a.com"})], ids=["upserted", "inserted"])
def test_what_is_zero_is_absent_from_the_document(copy: MongoCopy, database: Any, new_names: frozenset[str]) -> None:
    copy.send([row("a.com", 3, 0), ("never.com", 0, 0, NOW, 0, 0)], HERE, new_names)
    (found,) = database.domains.find()
    assert found.keys() == {"_id", "delivered", "first_at", "last_delivered_at"}
    assert found["delivered"] == {HERE: 3}


def test_a_name_thought_new_that_exists_still_lands_and_its_neighbours_too(copy: MongoCopy) -> None:
    names = [f"{number:05d}.com" for number in range(3000)]
    copy.send([row(name, 1, 0) for name in names[::3]], HERE)
    copy.send([row(name, 2, 1) for name in reversed(names)], HERE, frozenset(names[500:]))
    assert totals(copy, *names) == dict.fromkeys(names, (2, 1))


def test_rows_of_many_batches_all_land(mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(mongo.uri, batch_rows=7)
    names = [f"{number}.com" for number in range(50)]
    copy.send([row(name, 1, 2) for name in names], HERE, frozenset(names[:25]))
    assert totals(copy, *names) == dict.fromkeys(names, (1, 2))


def test_hosts_that_meet_at_the_same_new_names_lose_nothing(copy: MongoCopy) -> None:
    names = [f"{number}.com" for number in range(1000)]
    rows = [row(name, 1, 2) for name in names]
    components = [f"{number:032x}" for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda c: copy.send(rows, c, frozenset(names) if c < components[2] else frozenset()), components))
    assert totals(copy, *names) == dict.fromkeys(names, (4, 8))


def test_counts_beyond_32_bits_are_exact(copy: MongoCopy) -> None:
    copy.send([row("a.com", 2**31, 2**62)], HERE)
    copy.send([row("a.com", 2**31 - 1, 1)], THERE)
    assert totals(copy, "a.com") == {"a.com": (2**32 - 1, 2**62 + 1)}


def test_sending_nothing_asks_nothing(connect_copy: Connect) -> None:
    connect_copy(f"mongodb://127.0.0.1:{free_port()}").send([], HERE)


# --- what other hosts hold ---


def test_others_leaves_out_the_own_component_of_each_name(copy: MongoCopy) -> None:
    for component, delivered in ((HERE, 1), (f"{HERE}-2", 10), (THERE, 100)):
        copy.send([row("a.com", delivered, 0), row("b.com", delivered, delivered)], component)
    copy.send([row("own.com", 4, 4)], HERE)
    own = {"a.com": HERE, "b.com": f"{HERE}-2", "own.com": HERE, "absent.com": HERE}
    assert copy.others(list(own), own.__getitem__) == {"a.com": (110, 0), "b.com": (101, 101), "own.com": (0, 0)}


def test_more_names_than_one_find_takes_are_all_answered(copy: MongoCopy) -> None:
    names = [f"{number}.com" for number in range(10_001)]
    copy.send([row(name, 1, 0) for name in names], HERE, frozenset(names))
    assert len(totals(copy, *names)) == len(names)
    assert totals(copy) == {}


def test_a_host_can_tell_that_it_is_alone(copy: MongoCopy) -> None:
    assert copy.fences() == {}
    copy.claim(HERE, 0, "x")
    copy.claim(HERE, 1, "x")
    assert copy.fences() == {(HERE, 0): 0, (HERE, 1): 0}
    copy.claim(THERE, 0, "y")
    assert copy.advance(THERE, 0, "y", 7)
    assert copy.fences() == {(HERE, 0): 0, (HERE, 1): 0, (THERE, 0): 7}


# --- fences ---


def test_a_claim_takes_the_fence_from_the_claimer_before(copy: MongoCopy) -> None:
    copy.claim(HERE, 3, "first")
    copy.claim(HERE, 3, "second")
    assert not copy.advance(HERE, 3, "first", 9)
    assert copy.advance(HERE, 3, "second", 7)
    assert copy.claim(HERE, 3, "third") == (7, "second")


def test_the_flush_of_a_fence_outlives_claims_and_never_falls(copy: MongoCopy) -> None:
    assert copy.claim(HERE, 0, "x").flush is None
    assert copy.claim(HERE, 0, "x").flush is None, "claimed, but nothing was pushed"
    assert copy.advance(HERE, 0, "x", 12)
    assert copy.advance(HERE, 0, "x", 12), "the same again is no fault"
    assert copy.advance(HERE, 0, "x", 11)
    assert copy.claim(HERE, 0, "y").flush == 12


def test_partitions_and_components_have_fences_of_their_own(copy: MongoCopy, database: Any) -> None:
    for component, partition, flush in ((HERE, 0, 1), (HERE, 255, 2), (f"{HERE}-2", 0, 3)):
        copy.claim(component, partition, "x")
        assert copy.advance(component, partition, "x", flush)
    fences = {fence["_id"]: (fence["flush"], fence["component"], fence["claim"]) for fence in database.domains_fences.find()}
    assert fences == {f"{HERE}/00": (1, HERE, "x"), f"{HERE}/255": (2, HERE, "x"), f"{HERE}-2/00": (3, f"{HERE}-2", "x")}


def test_no_claim_no_advance(copy: MongoCopy) -> None:
    assert not copy.advance(HERE, 0, "x", 1)
    assert copy.fences() == {}


@pytest.mark.parametrize("component", ["", "a.b", "$a", "a\0"])
def test_a_component_that_is_no_field_name_is_refused(connect_copy: Connect, component: str) -> None:
    copy = connect_copy(f"mongodb://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match="field name"):
        copy.claim(component, 0, "x")
    with pytest.raises(ValueError, match="field name"):
        copy.send([row("a.com", 1, 0)], component)


# --- the view ---


@pytest.mark.parametrize("delivered", [9, 10, 11])
@pytest.mark.parametrize("bounced", [0, 1])
def test_the_view_sums_hosts_and_gives_the_status(copy: MongoCopy, database: Any, delivered: int, bounced: int) -> None:
    copy.ensure_view(10)
    copy.send([row("a.com", delivered - 4, 0)], HERE)
    copy.send([row("a.com", 4, bounced)], THERE)
    found = database.domain_status.find_one({"_id": "a.com"})
    expected = "not-catch-all" if bounced else "catch-all" if delivered > 10 else "unknown"
    assert list(found)[:5] == ["_id", "domain", "delivered", "bounced", "status"]
    assert [found[key] for key in list(found)[1:5]] == ["a.com", delivered, bounced, expected]
    assert found["first_at"] <= found["last_delivered_at"]


@pytest.mark.parametrize("key", ["_id", "domain"])
def test_a_search_of_the_view_by_name_uses_the_index(copy: MongoCopy, database: Any, key: str) -> None:
    copy.ensure_view(10)
    copy.send([row("a.com", 1, 0)], HERE)
    assert database.domain_status.count_documents({key: "a.com"}) == 1
    plan = str(database.command("explain", {"find": "domain_status", "filter": {key: "a.com"}}, verbosity="queryPlanner"))
    assert "COLLSCAN" not in plan
    assert "IDHACK" in plan or "IXSCAN" in plan


def test_a_domain_that_only_bounced_is_in_the_view(copy: MongoCopy, database: Any) -> None:
    copy.ensure_view(10)
    copy.send([row("a.com", 0, 1)], HERE)
    found = database.domain_status.find_one()
    assert (found["delivered"], found["bounced"], found["status"]) == (0, 1, "not-catch-all")


def test_the_view_follows_a_changed_threshold(copy: MongoCopy, database: Any) -> None:
    copy.send([row("a.com", 10, 0)], HERE)
    for threshold, expected in ((10, "unknown"), (10, "unknown"), (9, "catch-all"), (10, "unknown")):
        copy.ensure_view(threshold)
        assert [found["status"] for found in database.domain_status.find()] == [expected]


def test_a_collection_in_the_place_of_the_view_is_kept_and_reported(copy: MongoCopy, database: Any) -> None:
    database.domain_status.insert_one({"_id": "somebody's"})
    with pytest.raises(MongoRefused, match="making the view domain_status: code "):
        copy.ensure_view(10)
    assert database.domain_status.count_documents({}) == 1


def test_a_view_that_may_not_be_made_is_reported_and_pushes_go_on(mongo: Mongo, copy: MongoCopy) -> None:
    with mongo.failing("create", errorCode=13), pytest.raises(MongoRefused, match="code 13 Unauthorized"):
        copy.ensure_view(10)
    copy.send([row("a.com", 1, 0)], HERE)


# --- statistics ---


def five_domains(copy: MongoCopy) -> None:
    copy.send([row("all1.com", 6, 0), row("all2.com", 11, 0), row("no.com", 99, 1), row("edge.com", 10, 0)], HERE)
    copy.send([row("all1.com", 5, 0), row("few.com", 1, 0)], THERE)


def test_statistics_count_domains_by_the_sum_over_hosts(copy: MongoCopy) -> None:
    five_domains(copy)
    assert copy.stored_stats(10) is None
    assert copy.refresh_stats(10, NOW, "here", 60)
    stored = copy.stored_stats(10)
    assert stored is not None
    assert stored == StoredStats(2, 1, 2, 5, timestamp=stored.timestamp, threshold=10)
    assert abs(stored.timestamp - time.time()) < 60, "the time of the snapshot, by the server's clock"


def test_statistics_of_nothing_are_zeros(copy: MongoCopy) -> None:
    assert copy.refresh_stats(10, NOW, "here", 60)
    stored = copy.stored_stats(10)
    assert stored is not None
    assert (stored.catch_all, stored.not_catch_all, stored.unknown, stored.total) == (0, 0, 0, 0)


def test_statistics_of_another_threshold_are_not_taken_for_ours(copy: MongoCopy) -> None:
    five_domains(copy)
    assert copy.refresh_stats(10, NOW, "here", 60)
    assert copy.stored_stats(9) is None
    assert copy.refresh_stats(9, NOW, "there", 60), "each threshold has its own lease"
    nine, ten = copy.stored_stats(9), copy.stored_stats(10)
    assert nine is not None
    assert ten is not None
    assert (nine.catch_all, nine.threshold, ten.catch_all, ten.threshold) == (3, 9, 2, 10)


def test_one_holder_has_the_lease_until_it_ends(copy: MongoCopy) -> None:
    assert copy.refresh_stats(10, NOW, "here", 60)
    assert not copy.refresh_stats(10, NOW + 59, "there", 60)
    assert copy.refresh_stats(10, NOW + 59, "here", 60), "the holder may renew"
    assert not copy.refresh_stats(10, NOW + 118, "there", 60)
    assert copy.refresh_stats(10, NOW + 119, "there", 60)
    assert not copy.refresh_stats(10, NOW + 120, "here", 60)


def test_a_lease_from_a_clock_that_runs_ahead_keeps_nobody_away(copy: MongoCopy) -> None:
    assert copy.refresh_stats(10, NOW + 86_400, "ahead", 60)
    assert copy.refresh_stats(10, NOW, "here", 60)


def test_a_scan_may_outlast_the_socket_time_out(mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(mongo.uri, socket_timeout=0.2)
    with mongo.failing("aggregate", blockConnection=True, blockTimeMS=600):
        assert copy.refresh_stats(10, NOW, "here", 60)


def test_a_scan_never_outlasts_the_lease(mongo: Mongo, copy: MongoCopy) -> None:
    with mongo.failing("aggregate", blockConnection=True, blockTimeMS=1500), pytest.raises(MongoUnavailable):
        copy.refresh_stats(10, NOW, "here", 0.3)
    assert copy.stored_stats(10) is None


def test_a_server_without_snapshots_does_everything(own_standalone: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(own_standalone.uri)
    copy.ensure_view(10)
    assert copy.claim(HERE, 0, "x").flush is None
    five_domains(copy)
    assert copy.advance(HERE, 0, "x", 1)
    assert totals(copy, "all1.com") == {"all1.com": (11, 0)}
    assert copy.refresh_stats(10, NOW, "here", 60)
    assert copy.stored_stats(10) == StoredStats(2, 1, 2, 5, timestamp=NOW, threshold=10)


# --- waiting ---


@pytest.mark.parametrize(("attempt", "ceiling"), [(0, 0.2), (1, 0.4), (5, 6.4), (6, 10.0), (10_000, 10.0)])
def test_waits_double_up_to_the_maximum_and_never_fall_below_the_minimum(attempt: int, ceiling: float) -> None:
    assert backoff(attempt, 0.1, 10.0, 0.0) == 0.1
    assert backoff(attempt, 0.1, 10.0, 1.0) == pytest.approx(ceiling)
