"""What the copy in MongoDB promises when the server is away, refuses, hangs, dies or is named wrongly (fixtures: mongod.py)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mongod import Connect, Mongo, eventually, free_port, replica_set
from test_mongodb import HERE, NOW, row, totals

from catchall.storage.mongodb import (
    BadMongoURI,
    MongoCopy,
    MongoError,
    MongoOptions,
    MongoRefused,
    MongoUnavailable,
    PushFailed,
    Row,
)

ERROR_CHARS_MAX = 1200


@pytest.fixture
def copy(mongo: Mongo, connect_copy: Connect) -> MongoCopy:
    return connect_copy(mongo.uri)


@pytest.fixture
def database(mongo: Mongo, mongo_database: str) -> Iterator[Any]:
    with mongo.client() as client:
        yield client[mongo_database]


EVERY_CALL: dict[str, Callable[[MongoCopy], object]] = {
    "claim": lambda copy: copy.claim(HERE, 0, "x"),
    "send": lambda copy: copy.send([row("a.com", 1, 0)], HERE),
    "insert": lambda copy: copy.send([row("a.com", 1, 0)], HERE, {"a.com"}),
    "advance": lambda copy: copy.advance(HERE, 0, "x", 1),
    "others": lambda copy: copy.others(["a.com"], lambda _: HERE),
    "fences": lambda copy: copy.fences(),
    "ensure_view": lambda copy: copy.ensure_view(10),
    "refresh_stats": lambda copy: copy.refresh_stats(10, NOW, "here", 60),
    "stored_stats": lambda copy: copy.stored_stats(10),
}
every_call = pytest.mark.parametrize("call", EVERY_CALL.values(), ids=EVERY_CALL.keys())


@every_call
def test_an_unreachable_server_is_reported_in_time(connect_copy: Connect, call: Callable[[MongoCopy], object]) -> None:
    copy = connect_copy(f"mongodb://user:hunter2@127.0.0.1:{free_port()}", server_selection_timeout=0.2)
    with pytest.raises(MongoUnavailable) as failure:
        call(copy)
    assert "hunter2" not in str(failure.value)
    assert len(str(failure.value)) < ERROR_CHARS_MAX


@every_call
def test_a_refusal_is_reported_with_its_code(mongo: Mongo, copy: MongoCopy, call: Callable[[MongoCopy], object]) -> None:
    commands = ["insert", "update", "findAndModify", "find", "aggregate", "distinct", "create"]
    with mongo.failing(*commands, errorCode=13), pytest.raises(MongoRefused, match="code 13 Unauthorized"):
        call(copy)


@every_call
def test_a_lost_connection_is_reported_as_such(mongo: Mongo, copy: MongoCopy, call: Callable[[MongoCopy], object]) -> None:
    commands = ["insert", "update", "findAndModify", "find", "aggregate", "distinct", "create"]
    with mongo.failing(*commands, closeConnection=True), pytest.raises(MongoUnavailable):
        call(copy)
    call(copy)  # and the next call works


def test_making_a_copy_connects_to_nothing(connect_copy: Connect) -> None:
    connect_copy("mongodb://127.0.0.1:1,10.255.255.1:1/?replicaSet=none", server_selection_timeout=3600.0)


@pytest.mark.parametrize("new_names", [frozenset(), frozenset({"a.com"})], ids=["upserted", "inserted"])
def test_rows_whose_durability_is_unproven_are_not_saved(mongo: Mongo, copy: MongoCopy, new_names: frozenset[str]) -> None:
    concern = {"code": 64, "errmsg": "waiting for replication timed out"}
    reported = r"0 refused, 1 accepted; durability unproven \(code 64: waiting for replication timed out\)"
    with mongo.failing("insert", "update", writeConcernError=concern), pytest.raises(PushFailed, match=reported):
        copy.send([row("a.com", 1, 0)], HERE, new_names)
    copy.send([row("a.com", 1, 0)], HERE, new_names)
    assert totals(copy, "a.com") == {"a.com": (1, 0)}


@pytest.mark.parametrize("call", [EVERY_CALL["claim"], EVERY_CALL["advance"]], ids=["claim", "advance"])
def test_a_fence_whose_durability_is_unproven_is_not_written(
    mongo: Mongo, copy: MongoCopy, call: Callable[[MongoCopy], object]
) -> None:
    copy.claim(HERE, 0, "x")
    concern = {"code": 100, "errmsg": "not enough data-bearing nodes"}
    with mongo.failing("findAndModify", "update", writeConcernError=concern), pytest.raises(MongoError, match="not enough"):
        call(copy)


@pytest.mark.parametrize("fresh", [False, True], ids=["upserted", "inserted"])
def test_the_error_of_10_000_refused_rows_is_short(mongo: Mongo, connect_copy: Connect, database: Any, fresh: bool) -> None:
    database.create_collection("domains", validator={"note": {"$exists": True}})
    copy = connect_copy(mongo.uri, batch_rows=10_000)
    rows = [row(f"{number:05d}.{'x' * 200}.com", 1, 0) for number in range(10_000)]
    with pytest.raises(PushFailed, match="10000 refused, 0 accepted; codes 121 x 10000; ") as failure:
        copy.send(rows, HERE, frozenset(r[0] for r in rows) if fresh else frozenset())
    assert len(str(failure.value)) < ERROR_CHARS_MAX
    assert failure.value.__suppress_context__ or failure.value.__context__ is None


def test_one_refused_row_fails_the_push_and_the_others_may_be_sent_again(copy: MongoCopy, database: Any) -> None:
    database.domains.insert_one({"_id": "b.com", "delivered": "a text"})
    rows = [row("a.com", 1, 0), row("b.com", 1, 0), row("c.com", 1, 0)]
    with pytest.raises(PushFailed, match="update of 2 rows: 1 refused, 1 accepted; codes 28 x 1"):
        copy.send(rows, HERE, {"c.com"})
    database.domains.delete_one({"_id": "b.com"})
    copy.send(rows, HERE, {"c.com"})
    assert totals(copy, "a.com", "b.com", "c.com") == dict.fromkeys(["a.com", "b.com", "c.com"], (1, 0))


@pytest.mark.parametrize("bad", [row("a.com", 2**63, 0), row("\ud800.com", 1, 0)], ids=["number", "text"])
def test_a_value_that_bson_cannot_hold_fails_the_push(copy: MongoCopy, bad: Row) -> None:
    with pytest.raises(PushFailed, match="a value that BSON cannot hold"):
        copy.send([bad], HERE)


def test_rows_pushed_before_a_connection_broke_may_be_sent_again(mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(mongo.uri, batch_rows=10)
    names = [f"{number:02d}.com" for number in range(40)]
    with mongo.failing("update", closeConnection=True, times=1), pytest.raises(MongoUnavailable):
        copy.send([row(name, 3, 1) for name in names], HERE, frozenset(names[:20]))
    assert len(totals(copy, *names)) == 20, "the inserts came first"
    copy.send([row(name, 3, 1) for name in names], HERE, frozenset(names[:20]))
    assert totals(copy, *names) == dict.fromkeys(names, (3, 1))


def test_what_was_acknowledged_outlives_a_killed_server(own_mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(own_mongo.uri, server_selection_timeout=0.5)
    names = [f"{number}.com" for number in range(500)]
    copy.claim(HERE, 0, "x")
    copy.send([row(name, 1, 1) for name in names], HERE)
    assert copy.advance(HERE, 0, "x", 5)
    own_mongo.kill()
    with pytest.raises(MongoUnavailable):
        copy.send([row("late.com", 1, 0)], HERE)
    own_mongo.start()
    found = eventually("a read after the restart", lambda: totals(copy, *names), errors=(MongoUnavailable,))
    assert found == dict.fromkeys(names, (1, 1))
    assert copy.claim(HERE, 0, "y").flush == 5


def test_closing_does_not_wait_for_a_server_that_is_away(own_mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(own_mongo.uri, server_selection_timeout=3600.0)
    copy.send([row("a.com", 1, 0)], HERE)
    own_mongo.kill()
    copy.close()


def test_a_server_that_hangs_is_given_up_after_the_socket_time_out(own_mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(own_mongo.uri, socket_timeout=0.3)
    copy.send([row("a.com", 1, 0)], HERE)
    own_mongo.pause()
    with pytest.raises(MongoUnavailable):
        copy.send([row("a.com", 2, 0)], HERE)
    own_mongo.resume()
    copy.send([row("a.com", 3, 0)], HERE)
    assert totals(copy, "a.com") == {"a.com": (3, 0)}


def test_a_push_goes_on_at_the_next_primary(tmp_path: Path, connect_copy: Connect) -> None:
    with replica_set(tmp_path / "three", nodes=3) as three:
        copy = connect_copy(three.uri, server_selection_timeout=30.0)
        copy.claim(HERE, 0, "x")
        copy.send([row("a.com", 1, 0)], HERE)
        assert copy.advance(HERE, 0, "x", 1)
        three.primary().kill()

        def sent() -> bool:
            copy.send([row("a.com", 2, 0)], HERE)
            return True

        eventually("a push after the fail-over", sent, errors=(MongoUnavailable,))
        assert totals(copy, "a.com") == {"a.com": (2, 0)}
        assert copy.claim(HERE, 0, "y").flush == 1


def test_rows_that_reach_no_majority_are_not_saved(tmp_path: Path, connect_copy: Connect) -> None:
    with replica_set(tmp_path / "three", nodes=3) as three:
        primary = three.primary()
        copy = connect_copy(f"mongodb://{primary.address}/?directConnection=true", socket_timeout=0.5)
        for node in three.nodes:
            if node is not primary:
                node.pause()
        with pytest.raises(MongoError):
            copy.send([row("a.com", 1, 0)], HERE)


# --- the URI ---


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("mongodb://user:hunter2@h:port/", "[Pp]ort"),
        ("mongodb://user:hun/ter2@h", "must be percent-encoded"),
        ("mongodb://user:hun%ter2@h", "must be percent-encoded"),
        ("mongodb://user:hun@ter2:h@h", "must be percent-encoded"),
        ("mongodb://user:hunter2@h/?nosuchoption=1", "Unknown option"),
        ("mongodb://user:hunter2@h,i/?directConnection=true", "multiple hosts"),
        ("mongodb://user:hunter2@h/?authMechanism=NONE", "authmechanism"),
        ("mongodb://user:hunter2@", "host"),
        ("mongodb+srv://user:hunter2@h.example.com:1/", "port"),
        ("postgres://user:hunter2@h/", "mongodb://"),
        ("hunter2", "mongodb://"),
        ("", "mongodb://"),
    ],
)
def test_a_bad_uri_is_explained_without_its_password(uri: str, reason: str) -> None:
    with pytest.raises(BadMongoURI, match=reason) as failure:
        MongoCopy(MongoOptions(uri=uri))
    shown = str(failure.value) + repr(failure.value.__context__) + repr(failure.value.__cause__)
    assert "hun" not in shown
    assert "ter2" not in shown


def test_options_show_no_password() -> None:
    assert "hunter2" not in repr(MongoOptions(uri="mongodb://user:hunter2@h"))


def test_what_the_uri_says_about_durability_is_overruled(mongo: Mongo, connect_copy: Connect) -> None:
    copy = connect_copy(f"{mongo.uri}&w=0&journal=false&retryWrites=true&readPreference=secondary&readConcernLevel=local")
    copy.send([row("a.com", 1, 0)], HERE)
    assert copy.claim(HERE, 0, "x").flush is None
    assert copy.advance(HERE, 0, "x", 1)
    assert totals(copy, "a.com") == {"a.com": (1, 0)}


@pytest.mark.parametrize("batch_rows", [0, 50_001])
def test_a_batch_that_fits_in_no_message_is_refused(batch_rows: int) -> None:
    with pytest.raises(ValueError, match="batch_rows"):
        MongoOptions(uri="mongodb://h", batch_rows=batch_rows)
