"""The stand-in of the push tests means what the real MongoDB does: every test here runs on both, and one compares them."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from mongo_stand_in import MemoryCopy, MemoryServer
from mongod import Connect, Mongo

from catchall.storage.counts import Row
from catchall.storage.mongodb import MongoCopy, PushFailed

HERE, THERE = "0" * 32, "f" * 32
NOW = 1_700_000_000


class RealServer:
    """A database of a real server, with what MemoryServer offers for tests."""

    def __init__(self, database: Any) -> None:
        self._database, self._before = database, {}

    @property
    def documents(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return int(value.replace(tzinfo=UTC).timestamp()) if isinstance(value, datetime) else value

        found = self._database.domains.find()
        return {d["_id"]: {field: plain(value) for field, value in d.items() if field != "_id"} for d in found}

    @property
    def fences(self) -> dict[str, Any]:
        found = self._database.domains_fences.find({}, {"seen_at": False})
        return {d["_id"]: {field: value for field, value in d.items() if field != "_id"} for d in found}

    def spoil(self, name: str) -> None:
        self._before[name] = self._database.domains.find_one({"_id": name})
        self._database.domains.replace_one({"_id": name}, {"delivered": "a text", "bounced": "a text"}, upsert=True)

    def mend(self, name: str) -> None:
        self._database.domains.delete_one({"_id": name})
        if self._before[name] is not None:
            self._database.domains.insert_one(self._before[name])

    def snapshot(self) -> Any:
        return {kind: list(self._database[kind].find()) for kind in ("domains", "domains_fences")}

    def restore(self, snapshot: Any) -> None:
        for kind, documents in snapshot.items():
            self._database[kind].delete_many({})
            if documents:
                self._database[kind].insert_many(documents)


Server = MemoryServer | RealServer
Copy = MemoryCopy | MongoCopy


@pytest.fixture
def real(mongo: Mongo, mongo_database: str, connect_copy: Connect) -> Iterator[tuple[RealServer, MongoCopy]]:
    with mongo.client() as client:
        yield RealServer(client[mongo_database]), connect_copy(mongo.uri, batch_rows=7)


@pytest.fixture(params=["memory", "mongod"])
def both(request: pytest.FixtureRequest) -> tuple[Server, Copy]:
    if request.param == "mongod":
        found: tuple[Server, Copy] = request.getfixturevalue("real")
        return found
    server = MemoryServer()
    return server, MemoryCopy(server)


def row(name: str, delivered: int, bounced: int = 0, at: int = NOW) -> Row:
    return (name, delivered, bounced, at, at if delivered else 0, at if bounced else 0)


def totals(copy: Copy, *names: str) -> dict[str, tuple[int, int]]:
    return copy.others(names, lambda _: "none")


def test_a_first_claim_finds_no_flush_and_a_later_one_finds_what_was_advanced_to(both):
    _, copy = both
    assert copy.claim(HERE, 3, "x") == (None, None)
    assert copy.claim(HERE, 3, "y") == (None, "x")
    assert copy.advance(HERE, 3, "y", 7)
    assert copy.claim(HERE, 3, "z") == (7, "y")
    assert copy.claim(HERE, 4, "z") == (None, None), "each partition has a fence of its own"
    assert copy.claim(THERE, 3, "z") == (None, None)


def test_only_the_latest_claim_moves_a_fence_and_never_back(both):
    _, copy = both
    assert not copy.advance(HERE, 0, "x", 1), "nobody claimed it"
    copy.claim(HERE, 0, "x")
    copy.claim(HERE, 0, "y")
    assert not copy.advance(HERE, 0, "x", 5)
    assert copy.advance(HERE, 0, "y", 4)
    assert copy.advance(HERE, 0, "y", 2)
    assert copy.claim(HERE, 0, "z") == (4, "y")


@pytest.mark.parametrize("new_names", [frozenset(), frozenset({"a.com"})], ids=["known", "thought new"])
def test_repeated_late_and_foreign_rows_merge_by_component(both, new_names):
    server, copy = both
    copy.send([("a.com", 5, 3, NOW, NOW + 50, NOW + 30)], HERE, new_names)
    copy.send([("a.com", 4, 1, NOW - 1, NOW + 40, NOW + 10)], HERE, new_names)
    copy.send([("a.com", 9, 0, NOW + 60, NOW + 60, 0)], THERE, new_names)
    assert server.documents == {
        "a.com": {
            "delivered": {HERE: 5, THERE: 9},
            "bounced": {HERE: 3},
            "first_at": NOW - 1,
            "last_delivered_at": NOW + 60,
            "last_bounced_at": NOW + 30,
        }
    }
    assert copy.others(["a.com", "b.com"], lambda _: HERE) == {"a.com": (9, 0)}


def test_a_send_of_which_a_row_is_refused_applies_the_others_and_may_be_repeated(both):
    server, copy = both
    names = [f"{number}.com" for number in range(6)]
    server.spoil("2.com")
    with pytest.raises(PushFailed):
        copy.send([row(name, 3) for name in names], HERE, {"4.com", "5.com"})
    server.mend("2.com")
    assert totals(copy, *names) == {name: (3, 0) for name in names if name != "2.com"}
    copy.send([row(name, 3) for name in names], HERE, {"4.com", "5.com"})
    assert totals(copy, *names) == dict.fromkeys(names, (3, 0))


def test_a_restored_server_has_the_counts_fences_and_claims_of_then(both):
    server, copy = both
    copy.claim(HERE, 0, "x")
    copy.send([row("a.com", 1)], HERE)
    copy.advance(HERE, 0, "x", 1)
    then = server.snapshot()
    copy.claim(HERE, 0, "y")
    copy.send([row("a.com", 2), row("b.com", 1)], HERE)
    server.restore(then)
    assert totals(copy, "a.com", "b.com") == {"a.com": (1, 0)}
    assert not copy.advance(HERE, 0, "y", 2)
    assert copy.advance(HERE, 0, "x", 3)


def _calls(draw: random.Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """A random use of a copy: (method, arguments)."""
    names = [f"{number}.com" for number in range(12)]
    for _ in range(40):
        component, partition, claim = draw.choice((HERE, f"{HERE}-2", THERE)), draw.randrange(2), draw.choice("xyz")
        at = NOW + draw.randrange(-9000, 9000)
        rows = [row(n, draw.randrange(4), draw.randrange(3), at) for n in draw.sample(names, draw.randrange(1, 12))]
        yield draw.choice(
            [
                ("claim", (component, partition, claim)),
                ("send", (rows, component, frozenset(draw.sample(names, draw.randrange(5))))),
                ("send", (rows, component)),
                ("advance", (component, partition, claim, draw.randrange(9))),
                ("others", (names, lambda _: HERE)),
                ("snapshot", ()),
                ("restore", ()),
            ]
        )


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_calls_leaves_both_in_the_same_state(real, seed):
    in_memory = MemoryServer()
    pairs = [(in_memory, MemoryCopy(in_memory)), real]
    then = [server.snapshot() for server, _ in pairs]
    for method, arguments in _calls(random.Random(seed)):
        if method == "snapshot":
            then = [server.snapshot() for server, _ in pairs]
        elif method == "restore":
            for (server, _), snapshot in zip(pairs, then, strict=True):
                server.restore(snapshot)
        else:
            answers = [getattr(copy, method)(*arguments) for _, copy in pairs]
            assert answers[0] == answers[1], (method, arguments)
    assert in_memory.documents == real[0].documents
    assert in_memory.fences == real[0].fences
