"""What keeps MongoDB's copy equal to the ledgers: fences, claims, what is pushed again, and what is kept meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import HOST, Host, append, ledger_counts, settle
from mongod import Connect, Mongo
from test_mongodb import row

from catchall.engine import others, partition, push
from catchall.engine.ids import event_id
from catchall.engine.lines import with_id
from catchall.engine.metrics_page import MetricsPage, Slot
from catchall.engine.others import Others
from catchall.engine.partition import Partition, RecentRows
from catchall.engine.push import MONGODB_UP, PUSH_FAILURES, Pusher, Superseded
from catchall.engine.settings import MongoDB
from catchall.storage.ledger import Ledger
from catchall.storage.ledger_failures import LedgerFull
from catchall.storage.mongodb import BadMongoURI, MongoCopy, MongoOptions, MongoUnavailable, PushFailed
from catchall.storage.mongodb_stats import StoredStats

PATIENCE_S = 30.0
OTHER_HOST = "b1" * 16


@pytest.fixture
def copy(mongo: Mongo, connect_copy: Connect) -> MongoCopy:
    return connect_copy(mongo.uri)


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    (tmp_path / "run").mkdir()
    return MetricsPage(tmp_path / "run", shards=1, http_places=1, create=True).slot("shard", 0)


Own = Callable[..., Partition]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    """Open a partition of one host; own("a.example") also counts a delivery for each name."""
    host = Host(tmp_path / "data", partitions=4)
    opened: list[Partition] = []

    def open_one(*names: str, number: int = 0) -> Partition:
        if names:
            queue = host.queue(number)
            append(queue, b"".join(b"+%b\n" % name.encode() for name in names))
            queue.close()
        for former in [p for p in opened if p.number == number]:
            opened.remove(former)
            former.close()
        opened.append(host.own(number, keep_rows=True))
        settle(opened[-1])
        return opened[-1]

    yield open_one
    for left in opened:
        left.close()


def pusher_of(slot: Slot, *partitions: Partition, **mongodb: Any) -> Pusher:
    return Pusher(partitions, MongoDB(**mongodb), threshold=10, slot=slot, first=True)


def until(what: str, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def copied(copy: MongoCopy) -> dict[str, tuple[int, int]]:
    """What MongoDB holds of each domain, over all components."""
    documents = copy._database.domains.find()
    return {d["_id"]: (sum(d.get("delivered", {}).values()), sum(d.get("bounced", {}).values())) for d in documents}


class Wrapped:
    """A copy of which some calls are replaced."""

    def __init__(self, inner: MongoCopy, **calls: Any) -> None:
        self._inner, self._calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._inner, name)


# ---- fences and claims


def contested(copy: MongoCopy, component: str) -> Any:
    """Another process claims every fence between our send and our advance."""

    def send(*args: Any) -> None:
        copy.send(*args)
        copy.claim(component, 0, "another")

    return Wrapped(copy, send=send)


def test_one_lost_claim_pushes_again_from_the_start_and_the_second_in_a_row_supersedes(
    own: Own, copy: MongoCopy, slot: Slot
) -> None:
    held = own("a.example")
    pusher = pusher_of(slot, held)
    for _ in range(3):  # losses that are not in a row
        pusher._push_all(contested(copy, HOST))
        assert pusher._contested.lasts
        assert held.ledger.meta.pushed == 0
        pusher._push_all(copy)
        assert not pusher._contested.lasts
        assert held.ledger.meta.pushed == held.ledger.meta.flush > 0
        held.ledger.set_pushed(0)
    pusher._push_all(contested(copy, HOST))
    with pytest.raises(Superseded, match="in use elsewhere") as superseded:
        pusher._push_all(contested(copy, HOST))
    assert superseded.value.partition == 0


def test_a_claim_between_two_pushes_is_lost_too_even_if_nobody_is_ahead(own: Own, copy: MongoCopy, slot: Slot) -> None:
    held = own("a.example")
    pusher = pusher_of(slot, held)
    pusher._push_all(copy)
    for _ in range(2):
        copy.claim(HOST, 0, "another")
        held = own("a.example")
        pusher._partitions = (held,)
        pusher._push_all(copy)
        assert pusher._contested.lasts
        pusher._push_all(copy)
        assert not pusher._contested.lasts
        assert held.ledger.meta.pushed == held.ledger.meta.flush
    pusher._from_zero.add(0)
    copy.claim(HOST, 0, "another")
    pusher._push_all(copy)
    copy.claim(HOST, 0, "another")
    with pytest.raises(Superseded, match="in use elsewhere"):
        pusher._push_all(copy)


def test_a_ledger_behind_its_fence_is_superseded_at_the_first_look_without_an_event(
    own: Own, copy: MongoCopy, slot: Slot
) -> None:
    held = own("a.example", number=3)
    copy.claim(HOST, 3, "later")
    copy.advance(HOST, 3, "later", 100)
    held.ledger.set_pushed(held.ledger.meta.flush)
    with pytest.raises(Superseded) as superseded:
        pusher_of(slot, held)._turn(copy, last=False)
    assert superseded.value.partition == 3


def test_a_superseded_ledger_hands_its_positions_on_and_sets_nothing_aside_in_its_queues(tmp_path: Path) -> None:
    host = Host(tmp_path)
    queue, dead = host.queue(), host.queue()
    append(queue, b"+counted.example\n")
    append(dead, b"+counted.example\n")
    first = host.own()
    settle(first)
    append(queue, b"+living.example\n")
    append(dead, b"+dead.example\n")
    dead.close()
    first.supersede("a later state is known")
    first.close()
    for _ in range(2):
        second = host.own()
        settle(second)
        assert second.ledger.meta.component.startswith(f"{HOST}-")
        assert ledger_counts(second) == {"living.example": (1, 0), "dead.example": (1, 0)}
        second.close()
    assert not list(tmp_path.glob("00/q/*.corrupt"))
    assert len(list(tmp_path.glob("00/ledger-*.superseded"))) == 1
    queue.close()


@pytest.mark.parametrize("which", ["ledger.db", "ledger.new"])
def test_a_disk_that_fills_while_a_superseded_ledger_is_replaced_only_delays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """SQLite does not say that a close could not move the -wal into its file; renamed without it, the file would be damaged."""
    host = Host(tmp_path)
    queue, first = host.queue(), host.own()
    event = with_id(b"+a.example\n", event_id("1", b"+", b"a.example"))
    append(queue, event)
    settle(first)
    first.supersede("a later state is known")
    first.close()
    close = Ledger.close

    def leave_its_wal(ledger: Ledger) -> None:
        wal = ledger.path.with_name(f"{ledger.path.name}-wal")
        written = wal.read_bytes() if wal.exists() else b""
        close(ledger)
        if ledger.path.name == which:
            wal.write_bytes(written)

    with monkeypatch.context() as full:
        full.setattr(Ledger, "close", leave_its_wal)
        for _ in range(3):
            with pytest.raises(LedgerFull):
                host.own()
    second = host.own()
    append(queue, event + b"+b.example\n")
    settle(second)
    assert ledger_counts(second) == {"b.example": (1, 0)}
    assert not list(tmp_path.glob("00/**/*.corrupt"))
    assert len(list(tmp_path.glob("00/ledger-*.superseded"))) == 1
    second.close()
    queue.close()


def test_a_mark_that_outlived_the_ledger_it_was_meant_for_changes_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path)
    partition = host.own()
    partition.supersede("a later state is known")
    partition.close()
    mark = (tmp_path / "00" / "ledger.superseded").read_text()
    partition = host.own()
    component = partition.ledger.meta.component
    partition.close()
    (tmp_path / "00" / "ledger.superseded").write_text(mark)  # a death came just before it was removed
    partition = host.own()
    assert partition.ledger.meta.component == component
    assert not (tmp_path / "00" / "ledger.superseded").exists()
    partition.close()


def test_a_mongodb_that_was_emptied_is_filled_again_without_an_event(own: Own, copy: MongoCopy, slot: Slot) -> None:
    one, two = own("a.example", "b.example"), own("c.example", number=2)
    pusher = pusher_of(slot, one, two, stats_interval=0.001)
    pusher._turn(copy, last=False)
    wanted = {"a.example": (1, 0), "b.example": (1, 0), "c.example": (1, 0)}
    assert copied(copy) == wanted
    copy._client.drop_database(copy._database.name)
    until("the time of the next look has come", lambda: time.monotonic() >= pusher._check_at)
    pusher._turn(copy, last=False)
    assert copied(copy) == wanted
    pusher._turn(copy, last=False)
    assert "domain_status" in copy._database.list_collection_names()


def test_a_mongodb_restored_from_a_backup_is_brought_up_to_date_without_an_event(
    own: Own, copy: MongoCopy, slot: Slot
) -> None:
    held = own("a.example")
    pusher_of(slot, held)._turn(copy, last=False)
    backup = {name: list(copy._database[name].find()) for name in ("domains", "domains_fences")}
    held = own("a.example", "b.example")
    pusher_of(slot, held)._turn(copy, last=False)
    for name, documents in backup.items():
        copy._database[name].delete_many({})
        copy._database[name].insert_many(documents)
    assert copied(copy) == {"a.example": (1, 0)}
    pusher_of(slot, held)._turn(copy, last=False)
    assert copied(copy) == {"a.example": (2, 0), "b.example": (1, 0)}


def test_a_document_that_is_refused_holds_up_no_other_partition(own: Own, copy: MongoCopy, slot: Slot) -> None:
    pusher = pusher_of(slot, *(own(f"{number}.example", number=number) for number in range(4)))
    copy._database.domains.insert_one({"_id": "0.example", "delivered": "a text"})
    with pytest.raises(PushFailed):
        pusher._push_all(copy)
    copy._database.domains.delete_one({"_id": "0.example"})
    assert set(copied(copy)) == {"1.example", "2.example", "3.example"}
    pusher._push_all(copy)
    assert set(copied(copy)) == {f"{number}.example" for number in range(4)}


# ---- statistics


@pytest.mark.parametrize(
    ("fences", "is_alone"),
    [
        ([], True),
        ([(HOST, 0), (HOST, 1), (HOST, 15)], True),  # of all shards of this host, whichever asks
        ([(HOST, 0), (f"{HOST}-2", 1)], True),  # partition 1 pushed nothing before its ledger was set aside
        ([(HOST, 0), (HOST, 1), (f"{HOST}-2-0a1b2c3d", 1)], False),  # what MongoDB has of the former ledger is in no other
        ([(HOST, 0), (OTHER_HOST, 1)], False),
        ([(OTHER_HOST, 0)], False),
    ],
)
def test_a_host_is_alone_only_if_its_ledgers_hold_all_that_mongodb_holds(
    fences: list[tuple[str, int]], is_alone: bool
) -> None:
    assert push.alone(HOST, fences) is is_alone


def test_after_a_ledger_was_set_aside_reads_and_statistics_still_count_what_it_had(
    own: Own, copy: MongoCopy, slot: Slot
) -> None:
    held = own("a.example", "b.example")
    pusher = pusher_of(slot, held)
    pusher._turn(copy, last=False)
    assert pusher.shared is None, "its own tallies are the truth"
    held.supersede("a later state is known")
    held = own("a.example")
    other_shard = pusher_of(slot, own("c.example", number=1))  # the one that keeps the statistics need not own that partition
    pusher_of(slot, held)._turn(copy, last=False)
    other_shard._turn(copy, last=False)
    assert isinstance(other_shard.shared, StoredStats)
    assert other_shard.shared.total == 3
    assert copy.others(["a.example", "b.example"], lambda _: held.ledger.meta.component) == {
        "a.example": (1, 0), "b.example": (1, 0)
    }  # fmt: skip


# ---- an outage without end


def test_a_uri_that_can_never_work_ends_no_thread(own: Own, slot: Slot) -> None:
    pusher = pusher_of(slot, own("a.example"), uri="mongodb://h:port/", backoff_min=0.001, backoff_max=0.001)
    pusher.start()
    until("it has failed and tried again", lambda: slot.cells[PUSH_FAILURES] > 2)
    assert pusher.is_alive()
    assert slot.cells[MONGODB_UP] == 0
    assert pusher.stop(PATIENCE_S)


def test_a_stop_while_mongodb_is_away_tries_nothing_more(own: Own, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    def away(_: MongoOptions) -> MongoCopy:
        nonlocal tries
        tries += 1
        raise MongoUnavailable("nobody is there")

    monkeypatch.setattr(push, "MongoCopy", away)
    pusher = pusher_of(slot, own("a.example"), backoff_min=3000.0, backoff_max=3600.0)
    pusher.start()
    until("it has failed", lambda: slot.cells[PUSH_FAILURES])
    assert pusher.stop(PATIENCE_S)
    assert tries == 1


def test_the_rows_kept_for_a_push_are_bounded_however_long_it_does_not_come() -> None:
    recent = RecentRows(1000)
    for number in range(1, 500):
        recent.add(number, [row(f"{number}-{i}.example", 1, 0) for i in range(90)], set())
        assert recent._rows <= 1000
    assert recent.take(498) is not None
    assert recent.take(0) is None, "those are in the ledger"


def test_a_host_keeps_no_more_rows_for_pushes_with_many_partitions_than_with_few(tmp_path: Path) -> None:
    for partitions in (1, 4, 256):
        held = Host(tmp_path / str(partitions), partitions=partitions).own(keep_rows=True)
        assert held.recent is not None
        assert held.recent._rows_max * partitions <= partition.RECENT_ROWS_MAX
        held.close()


class SlowServer:
    """Answers a question when it is let through."""

    def __init__(self) -> None:
        self.questions: list[list[str]] = []
        self.go = threading.Semaphore(0)
        self.closed = False
        self.error: Exception | None = None

    def others(self, names: Sequence[str], component_of: Callable[[str], str]) -> Mapping[str, tuple[int, int]]:
        self.questions.append(sorted(names))
        assert self.go.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        return {name: (len(name), 0) for name in names}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowServer:
    server = SlowServer()
    monkeypatch.setattr(others, "MongoCopy", lambda _: server)
    return server


def test_names_asked_for_while_a_question_is_under_way_travel_together_in_the_next(slow: SlowServer) -> None:
    answered = threading.Semaphore(0)
    asking = Others(MongoOptions(uri="mongodb://h"), ttl_s=0.0, names_max=10, answered=answered.release)
    results = [asking.ask({"first": HOST})]
    until("the first question is under way", lambda: slow.questions)
    results += [asking.ask({f"n{i}": HOST}) for i in range(100)]
    slow.go.release(2)
    for _ in range(2):
        assert answered.acquire(timeout=PATIENCE_S)
    assert slow.questions == [["first"], sorted(f"n{i}" for i in range(100))]
    assert results == [{"first": 5}, *({f"n{i}": len(f"n{i}")} for i in range(100))]
    asking.close()
    assert slow.closed


def test_while_mongodb_is_away_no_read_waits_for_the_question_whether_it_is_back(
    slow: SlowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "RETRY_S", 0.0)
    answered = threading.Semaphore(0)
    asking = Others(MongoOptions(uri="mongodb://h"), ttl_s=0.0, names_max=10, answered=answered.release)
    slow.go.release()
    asking.ask({"a.example": HOST})
    assert answered.acquire(timeout=PATIENCE_S)
    slow.error = MongoUnavailable("away")
    slow.go.release()
    assert asking.get("a.example", HOST) is None, "it was there until then"
    asking.ask({"a.example": HOST})
    assert answered.acquire(timeout=PATIENCE_S)
    assert asking.get("a.example", HOST) == len("a.example"), "what was last known"
    assert asking.get("b.example", HOST) == 0
    until("the question is under way", lambda: len(slow.questions) == 3)
    slow.error = None
    slow.go.release(2)
    until("it is back", lambda: not asking._away.lasts)
    assert asking.get("a.example", HOST) is None
    asking.close()


@pytest.mark.parametrize("error", [MongoUnavailable("away"), BadMongoURI("never")], ids=["away", "bad URI"])
def test_who_waits_for_other_hosts_gets_an_answer_whatever_mongodb_does(slow: SlowServer, error: Exception) -> None:
    answered = threading.Semaphore(0)
    asking = Others(MongoOptions(uri="mongodb://h"), ttl_s=0.0, names_max=10, answered=answered.release)
    slow.error = error
    slow.go.release()
    result = asking.ask({"a.example": HOST})
    assert answered.acquire(timeout=PATIENCE_S)
    assert result == {"a.example": 0}
    asking.close()
