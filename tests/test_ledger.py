"""The ledger: one transaction or nothing, whatever happens to the file."""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import HOST, Died, Host, Steps, append, dying, ledger_counts

from catchall.storage.counts import pack
from catchall.storage.ledger import NAMES_PER_LOAD, ROWS_PER_SCAN, Ledger
from catchall.storage.ledger import ROWS_PER_STATEMENT as ROWS
from catchall.storage.ledger_failures import LedgerDamaged, LedgerFull
from catchall.storage.ledger_rows import Position
from catchall.storage.ledger_rows import Tallies as T

Open = Callable[..., Ledger]
ROW = ("a.example", 5, 1, 100, 200, 150)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def opened(path) -> Iterator[Open]:
    """Opens the ledger, after closing the one that was opened before."""
    last: list[Ledger] = []

    def reopen(**over: Any) -> Ledger:
        while last:
            last.pop().close()
        options = {"host": HOST, "component": HOST, "partition": 1, "partitions": 4, "threshold": 10, "synchronous": "OFF"}
        last.append(Ledger(path, **options | over))
        return last[-1]

    yield reopen
    while last:
        last.pop().close()


def rows_of(ledger: Ledger, after: int = 0) -> list[tuple]:
    return [row for piece in ledger.scan(after) for row in piece]


def many(count: int, delivered: int = 1) -> list[tuple]:
    return [(f"n{i:06d}.example", delivered, i % 3, 100, 100, 100) for i in range(count)]


def test_what_was_written_is_there_after_reopening(opened):
    ledger = opened()
    assert ledger.write([ROW], {"aa": Position(10, 100)}, [], T(0, 1, 0)) == 1
    for again in range(2):
        ledger = opened() if again else ledger
        assert ledger.load(["a.example", "b.example"]) == {"a.example": pack(5, 1)}
        assert ledger.positions() == {"aa": Position(10, 100)}
        assert rows_of(ledger) == [ROW]
        assert (ledger.meta.flush, ledger.meta.pushed, ledger.meta.tallies) == (1, 0, T(0, 1, 0))


@pytest.mark.parametrize("count", [0, 1, ROWS - 1, ROWS, 3 * ROWS + 7, ROWS_PER_SCAN + 1])
def test_any_number_of_rows_is_written_and_loaded(opened, count):
    ledger = opened()
    ledger.write(many(count), {}, [], T())
    assert rows_of(ledger) == many(count)
    names = [row[0] for row in many(count)] + [f"none{i}" for i in range(NAMES_PER_LOAD)]
    assert ledger.load(names) == {row[0]: pack(row[1], row[2]) for row in many(count)}
    assert ledger.damaged_rows == 0


def test_times_merge_and_an_unknown_one_hides_none(opened):
    ledger = opened()
    for first, last_d, last_b in ((0, 0, 0), (150, 150, 0), (100, 90, 70), (0, 160, 0), (120, 0, 60)):
        ledger.write([("a.example", 1, 1, first, last_d, last_b)], {}, [], T())
    assert rows_of(ledger) == [("a.example", 1, 1, 100, 160, 70)]


def test_a_position_moves_and_goes_with_the_rest(opened):
    ledger = opened()
    ledger.write([], {"aa": Position(10, 1), "bb": Position(20, 2)}, [], T())
    ledger.write([], {"aa": Position(30, 3)}, ["bb", "never seen"], T())
    assert opened().positions() == {"aa": Position(30, 3)}


def test_a_scan_gives_only_what_is_newer(opened):
    ledger = opened()
    ledger.write(many(10), {}, [], T())
    ledger.write(many(3, delivered=2), {}, [], T())
    assert rows_of(ledger, after=1) == many(3, delivered=2)
    assert rows_of(ledger, after=2) == []
    ledger.set_pushed(2)
    assert opened().meta.pushed == 2


@pytest.mark.parametrize("dies_at", range(1, 20))
def test_a_flush_that_dies_at_any_statement_is_whole_or_nothing(opened, dies_at):
    count = ROWS + 3
    ledger = opened()
    ledger.write(many(count), {"aa": Position(1, 1), "bb": Position(1, 1)}, [], T(1, 1, 1))
    before = (rows_of(ledger), ledger.positions(), ledger.meta.flush, ledger.meta.tallies)
    steps = Steps(dies_at)
    steps.statements_of(ledger)
    after = (many(count, 2), {"aa": Position(2, 2)}, 2, T(2, 2, 2))
    try:
        ledger.write(many(count, 2), {"aa": Position(2, 2)}, ["bb"], T(2, 2, 2))
        died = False
    except Died:
        died = True
    ledger = opened()
    found = (rows_of(ledger), ledger.positions(), ledger.meta.flush, ledger.meta.tallies)
    assert found in (before, after)
    assert died or (found == after and steps.taken < dies_at)
    assert died == (dies_at <= 18), "before and after each of 9 statements"


def test_the_first_thing_that_opening_does_is_a_commit(opened, path):
    for _ in range(3):
        opened()
    opened().close()
    with sqlite3.connect(path) as db:
        assert db.execute("select opened from meta").fetchone() == (4,)
    db.close()


def test_another_threshold_counts_the_tallies_anew(opened):
    ledger = opened(threshold=10)
    rows = [("a", 10, 0, 0, 0, 0), ("b", 11, 0, 0, 0, 0), ("c", 100, 0, 0, 0, 0), ("d", 100, 1, 0, 0, 0), ("e", 0, 1, 0, 0, 0)]
    ledger.write(rows, {}, [], T(2, 2, 1))
    assert opened(threshold=10).meta.tallies == T(2, 2, 1)
    assert opened(threshold=11).meta.tallies == T(1, 2, 2)
    assert opened(threshold=100).meta.tallies == T(0, 2, 3)
    assert opened(threshold=9).meta.tallies == T(3, 2, 0)


# ---- a full disk


def limit_pages(ledger: Ledger, extra: int | None) -> None:
    pages = ledger._db.execute("pragma page_count").fetchone()[0]
    ledger._db.execute(f"pragma max_page_count = {pages + extra if extra is not None else 1 << 30}")


@pytest.mark.parametrize("extra", range(0, 40, 3))
def test_a_full_disk_rolls_all_of_it_back_and_a_later_flush_succeeds(opened, extra):
    ledger = opened()
    ledger.write(many(10), {"aa": Position(1, 1)}, [], T(1, 0, 0))
    limit_pages(ledger, extra)
    with pytest.raises(LedgerFull):
        ledger.write(many(20_000), {"aa": Position(2, 2)}, [], T(2, 0, 0))
    assert rows_of(ledger) == many(10)
    assert ledger.positions() == {"aa": Position(1, 1)}
    assert (ledger.meta.flush, ledger.meta.tallies) == (1, T(1, 0, 0))
    limit_pages(ledger, None)
    assert ledger.write(many(3000), {"aa": Position(3, 3)}, [], T(3, 0, 0)) == 2
    ledger = opened()
    assert rows_of(ledger) == many(3000)
    assert ledger.positions() == {"aa": Position(3, 3)}


# ---- damage


@pytest.mark.parametrize("column", ["delivered", "bounced", "flush", "chk"])
def test_a_row_with_a_changed_count_is_noticed(opened, path, column):
    opened().write(many(5), {}, [], T())
    opened().close()
    db = sqlite3.connect(path)
    db.execute(f"update domain set {column} = {column} + 1 where name = 'n000003.example'")
    db.commit()
    db.close()
    ledger = opened()
    ledger.load([row[0] for row in many(3)])
    assert ledger.damaged_rows == 0
    ledger.load([row[0] for row in many(5)])
    assert ledger.damaged_rows == 1


@pytest.mark.parametrize("damage", [b"not a ledger" * 1000, b"SQLite format 3\0" + b"\xff" * 40_000])
def test_a_file_that_is_no_ledger_is_refused(opened, path, damage):
    path.write_bytes(damage)
    with pytest.raises(LedgerDamaged, match=r"ledger\.db"):
        opened()


@pytest.mark.parametrize("other", [{"host": "b0" * 16}, {"partition": 2}, {"partitions": 5}])
def test_the_ledger_of_another_folder_or_partition_is_refused(opened, other):
    opened().write([ROW], {}, [], T())
    with pytest.raises(LedgerDamaged, match="this is format 2"):
        opened(**other)
    assert rows_of(opened()) == [ROW]


def test_a_second_process_cannot_open_it(opened, path):
    opened()
    db = sqlite3.connect(path, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        db.execute("select * from meta").fetchall()
    db.close()


@pytest.mark.parametrize("dies_at", range(1, 4))
def test_a_partition_whose_ledger_is_damaged_begins_anew_as_another_component(tmp_path, monkeypatch, dies_at):
    host = Host(tmp_path)
    queue = host.queue()
    append(queue, b"+old.example\n")
    (tmp_path / "00" / "ledger.db").write_bytes(b"damaged" * 1000)
    monkeypatch.setattr(Path, "rename", dying(Path.rename, on=dies_at))
    try:
        partition = host.own()
    except Died:
        monkeypatch.undo()
        partition = host.own()
    assert partition.ledger.meta.component.startswith(f"{HOST}-")
    append(queue, b"+later.example\n")
    queue.abandon()
    append(queue, b"+new.example\n")
    queue.close()
    assert partition.catch_up()
    partition.end_flush(run(partition))
    assert ledger_counts(partition) == {"later.example": (1, 0), "new.example": (1, 0)}
    assert len(list((tmp_path / "00" / "q").glob("*.corrupt"))) == 1
    partition.close()


def test_a_superseded_ledger_is_set_aside_once(tmp_path):
    host = Host(tmp_path)
    partition = host.own()
    partition.condemn("a later one is known")
    partition.close()
    components = set()
    for _ in range(3):
        partition = host.own()
        components.add(partition.ledger.meta.component)
        partition.close()
    assert len(components) == 1
    assert components.pop().startswith(f"{HOST}-")


# ---- two threads


def run(partition) -> Any:
    flight = partition.begin_flush()
    flight.run(partition.ledger, partition.cache, partition.reader)
    return flight


@pytest.mark.parametrize("cache_names", [0, 100, 10_000])
def test_reads_beside_a_flush_never_see_a_wrong_sum(tmp_path, cache_names):
    host = Host(tmp_path)
    partition = host.own(cache_names=cache_names)
    queue = host.queue(segment_size=1 << 20)
    names = {f"n{i}.example": b"n%d.example" % i for i in range(1200)}
    for times in range(1, 16):
        append(queue, b"".join(b"+%b\n" % key for key in names.values()))
        assert partition.catch_up()
        flight = partition.begin_flush()
        failures: list[BaseException] = []

        def flush(flight=flight, failures=failures) -> None:
            try:
                flight.run(partition.ledger, partition.cache, partition.reader)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        thread = threading.Thread(target=flush)
        thread.start()
        looks = 0
        while thread.is_alive() or looks < len(names):
            some = dict(list(names.items())[looks % 1200 : looks % 1200 + 40])
            looks += 40
            known = {name: partition.known(name, key) for name, key in some.items()}
            known |= partition.load({name: some[name] for name, packed in known.items() if packed is None})
            assert set(known.values()) == {times}
        thread.join()
        assert not failures
        partition.end_flush(flight)
    assert set(partition.load(names).values()) == {15}
    queue.close()
    partition.close()


def test_tallies_are_exact_before_during_and_after_a_flush(tmp_path):
    host = Host(tmp_path)
    partition = host.own()
    queue = host.queue()
    append(queue, b"+a.example 10\n+b.example 11\n-c.example\n+c.example 50\n")
    assert partition.catch_up()
    assert partition.tallies(100, 77) == (T(1, 1, 1), 77)
    flight = partition.begin_flush()
    assert partition.tallies(100, 77) is None, "a small flush is about to tell"
    append(queue, b"+a.example\n-b.example\n+d.example\n")
    assert partition.catch_up()
    flight.run(partition.ledger, partition.cache, partition.reader)
    assert partition.tallies(100, 78) == (T(1, 2, 1), 78)
    partition.end_flush(flight)
    assert partition.tallies(100, 79) == (T(1, 2, 1), 79)
    found = partition.tallies(1, 80)
    assert found is not None
    assert found[0] == T(1, 1, 1), "too much is pending: as of the last cut"
    assert 0 < found[1] == partition.cut_at_ns
    partition.end_flush(run(partition))
    assert partition.ledger.meta.tallies == T(1, 2, 1)
    queue.close()
    partition.close()


def test_the_instant_of_a_cut_is_one_up_to_which_everything_was_drained(tmp_path):
    host = Host(tmp_path)
    queue = host.queue()
    for _ in range(900):
        append(queue, b"+a.example\n+b.example\n")
    partition = host.own()
    assert partition.drain(1) > 0
    partition.end_flush(run(partition))
    assert partition.cut_at_ns == 0, "most of what was acknowledged is not in this commit"
    assert partition.catch_up()
    partition.end_flush(run(partition))
    assert partition.cut_at_ns > 0
    queue.close()
    partition.close()
