"""Every rule of order that the storage protocol has is broken here on purpose, and a check of this suite must find it.

A canary that sings says that the check is blind: a rule could be lost without a test failing. Each test names the check that
finds it, with the number of tries that it may take. What is broken is a few lines laid over the real code; the check is
the very function that guards the rule.
"""

import random
import sqlite3
from pathlib import Path
from typing import Any

import faults
import pytest
import test_interleavings
import test_model
import test_power_cuts
import test_push_deaths
import test_recovery
from canaries import FOUND, Check, broken
from hypothesis.stateful import run_state_machine_as_test
from mongo_stand_in import push

from catchall.engine import event_queue
from catchall.engine.disk import Disk, try_lock
from catchall.engine.event_queue import EventQueue, OpenSegment
from catchall.engine.flush import Flush
from catchall.engine.partition import Partition
from catchall.engine.queue_reader import QueueReader
from catchall.engine.segment import PUBLISHED, SEALED
from catchall.storage.ledger import Ledger
from catchall.storage.mongodb import Fence


@pytest.fixture
def owner_deaths(tmp_path: Path) -> Check:
    sweep = test_recovery.test_an_owner_that_dies_at_any_step_counts_everything_once
    return lambda n: sweep(tmp_path / str(n), n)


@pytest.fixture
def looks_at_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    sweep = test_interleavings.test_an_owner_that_looks_before_any_step_of_a_writer_misses_nothing

    def check(number: int) -> None:
        with monkeypatch.context() as undone:
            sweep(tmp_path / str(number), undone, number)

    return check


@pytest.fixture
def power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    def check(seed: int) -> None:
        world = test_power_cuts.World(tmp_path / str(seed), monkeypatch, random.Random(seed))
        test_power_cuts.interval_loses_at_most_what_was_sent_since_the_last_sync_or_commit(world)

    return check


class NoFolderSync(Disk):
    def sync_folder(self, path: str) -> None:
        pass


def without_folder_sync(disk: Disk) -> Disk:
    return NoFolderSync(**{call: getattr(disk, call) for call in faults.DISK_CALLS})


# ---- writers


def test_interleavings_see_a_segment_that_gets_its_name_before_its_lock(monkeypatch, caught, looks_at_a_writer):
    class LockedLate(OpenSegment):
        def __init__(self, path: str, fd: int, payload_size: int) -> None:
            super().__init__(path, fd, payload_size)
            try_lock(fd)

    monkeypatch.setattr(event_queue, "try_lock", lambda fd: True)
    monkeypatch.setattr(event_queue, "OpenSegment", LockedLate)
    caught(looks_at_a_writer, test_interleavings.WRITER_STEPS)


def test_power_cuts_see_a_segment_that_is_used_before_its_folder_was_synced(monkeypatch, caught, power_cuts):
    def unsynced(make: Any) -> Any:
        return lambda folder, disk, **options: make(folder, disk=without_folder_sync(disk), **options)

    broken(monkeypatch, event_queue, "make_segment", unsynced)
    caught(power_cuts, 150)


def test_interleavings_see_a_segment_that_is_sealed_before_its_last_lines_are_published(
    monkeypatch, caught, looks_at_a_writer
):
    def sealed_early(append: Any) -> Any:
        def wrong(self: EventQueue, lines: bytes) -> bool:
            last = self._next is not None and self.room_now(len(lines))
            if last:
                self._current.words[SEALED] = self._current.published + 1
            done = append(self, lines)
            if last:
                self._roll()
            return done

        return wrong

    broken(monkeypatch, EventQueue, "append", sealed_early)
    caught(looks_at_a_writer, test_interleavings.WRITER_STEPS)


def test_power_cuts_see_lines_that_are_published_before_their_sync_under_always(monkeypatch, caught, tmp_path):
    def published_early(sync_staged: Any) -> Any:
        def wrong(self: EventQueue) -> None:
            self.publish()
            sync_staged(self)

        return wrong

    def check(seed: int) -> None:
        world = test_power_cuts.World(tmp_path / str(seed), monkeypatch, random.Random(seed))
        test_power_cuts.always_loses_nothing_that_was_acknowledged_or_read(world)

    broken(monkeypatch, EventQueue, "sync_staged", published_early)
    caught(check, 100)


# ---- readers


def test_interleavings_see_a_reader_that_loads_published_before_sealed(monkeypatch, caught, tmp_path):
    class Stale:
        """`published` is as it was; `sealed` says now that nothing follows."""

        def __init__(self, words: Any) -> None:
            self._words, self._published = words, words[PUBLISHED]

        def __getitem__(self, at: int) -> int:
            return self._published if at == PUBLISHED else self._words[SEALED] and self._published + 1

    def stale(stop: Any) -> Any:
        def wrong(self: QueueReader, found: Any, now: float) -> int:
            words, found.words = found.words, Stale(found.words)
            try:
                return stop(self, found, now)
            finally:
                found.words = words

        return wrong

    broken(monkeypatch, QueueReader, "_stop", stale)
    sweep = test_interleavings.test_a_writer_that_acts_before_any_step_of_an_owner_is_counted_once
    caught(lambda n: sweep(tmp_path / str(n), test_interleavings.end, n), test_interleavings.OWNER_STEPS)


def test_the_model_sees_a_read_that_does_not_list_the_folder_first(monkeypatch):
    def blind(catch_up: Any) -> Any:
        def wrong(self: Partition, *ends: Any) -> bool:
            self.reader.discover = lambda: None  # type: ignore[method-assign]
            try:
                return catch_up(self, *ends)
            finally:
                del self.reader.discover

        return wrong

    broken(monkeypatch, Partition, "catch_up", blind)
    with pytest.raises(FOUND):
        run_state_machine_as_test(test_model.Service, settings=test_model.SETTINGS)


# ---- flushes


def test_deaths_see_a_segment_that_is_retired_before_the_commit(monkeypatch, caught, owner_deaths):
    def retired_first(run: Any) -> Any:
        def wrong(self: Flush, ledger: Ledger, cache: Any, reader: QueueReader) -> None:
            reader.unlink(self.finished)
            run(self, ledger, cache, reader)

        return wrong

    broken(monkeypatch, Flush, "run", retired_first)
    caught(owner_deaths, test_recovery.OWNER_STEPS)


def test_deaths_see_a_row_that_is_forgotten_with_the_commit_that_finishes_its_segment(monkeypatch, caught, owner_deaths):
    def forgotten_early(run: Any) -> Any:
        def wrong(self: Flush, *rest: Any) -> None:
            self.gone += self.finished
            run(self, *rest)

        return wrong

    broken(monkeypatch, Flush, "run", forgotten_early)
    caught(owner_deaths, test_recovery.OWNER_STEPS)


def test_power_cuts_see_a_row_that_is_forgotten_before_the_unlink_is_durable(monkeypatch, caught, power_cuts):
    def unsynced(unlink: Any) -> Any:
        def wrong(self: QueueReader, finished: Any) -> list[str]:
            disk, self._disk = self._disk, without_folder_sync(self._disk)
            try:
                return unlink(self, finished)
            finally:
                self._disk = disk

        return wrong

    broken(monkeypatch, QueueReader, "unlink", unsynced)
    caught(power_cuts, 150)


@pytest.mark.parametrize("first", ["counts", "positions"])
def test_deaths_see_counts_and_positions_in_two_transactions(monkeypatch, caught, owner_deaths, first):
    def in_two(write: Any) -> Any:
        def wrong(self: Ledger, rows: Any, positions: Any, gone: Any, *rest: Any) -> int:
            halves = [(rows, {}), ([], positions)]
            for some, where in halves if first == "counts" else halves[::-1]:
                number: int = write(self, some, where, gone, *rest)
            return number

        return wrong

    broken(monkeypatch, Ledger, "write", in_two)
    caught(owner_deaths, test_recovery.OWNER_STEPS)


def test_power_cuts_see_an_owner_that_acts_on_its_predecessors_commit_without_one_of_its_own(monkeypatch, caught, tmp_path):
    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
            return super().execute("select 1" if "opened = opened + 1" in statement else statement, *values)

    def connecting(connect: Any) -> Any:
        return lambda path, **options: connect(path, factory=Connection, **options)

    broken(monkeypatch, sqlite3, "connect", connecting)
    sweep = test_push_deaths.test_nothing_is_pushed_that_a_power_cut_takes_back
    caught(lambda n: sweep(tmp_path / str(n), n), test_push_deaths.FLUSH_STEPS)


# ---- pushes


class _Wrong:
    """A copy for one push of one partition, with some of its calls made wrong."""

    def __init__(self, copy: Any, partition: Partition) -> None:
        self.copy, self.partition = copy, partition
        self.claim, self.send, self.advance = copy.claim, copy.send, copy.advance


class TargetTakenLate(_Wrong):
    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self.advance = lambda component, p, claim, _: self.copy.advance(component, p, claim, self.partition.ledger.meta.flush)


class ClaimForced(_Wrong):
    """It advances whether the claim holds or not."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self.advance = self._advance

    def _advance(self, component: str, p: int, claim: str, flush: int) -> bool:
        self.copy.server.fences[f"{component}/{p:02d}"] = {"component": component, "claim": claim}
        return bool(self.copy.advance(component, p, claim, flush))


class ClaimedLate(_Wrong):
    """It reads the fence before it sends, and claims it afterwards."""

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self.claim = lambda component, p, _: Fence(self.copy.server.fences.get(f"{component}/{p:02d}", {}).get("flush"), None)
        self.advance = self._advance

    def _advance(self, component: str, p: int, claim: str, flush: int) -> bool:
        self.copy.claim(component, p, claim)
        return bool(self.copy.advance(component, p, claim, flush))


@pytest.mark.parametrize("wrong", [ClaimForced, ClaimedLate])
def test_restored_copies_see_a_push_that_does_not_keep_to_its_claim(monkeypatch, caught, tmp_path, wrong):
    monkeypatch.setattr(test_push_deaths, "push", lambda p, copy, from_zero=False: push(p, wrong(copy, p), from_zero))
    sweep = test_push_deaths.test_a_copy_that_is_put_back_to_an_earlier_state_at_any_step_of_a_push_catches_up
    caught(lambda n: sweep(tmp_path / str(n), n, False, False), test_push_deaths.POINTS)


def test_flushes_during_a_push_see_a_target_that_is_taken_after_the_rows(monkeypatch, caught, tmp_path):
    def wrong(partition: Partition, copy: Any, from_zero: bool = False) -> tuple[int, bool]:
        done = push(partition, TargetTakenLate(copy, partition), from_zero)
        partition.ledger.set_pushed(partition.ledger.meta.flush)
        return done

    monkeypatch.setattr(test_push_deaths, "push", wrong)
    sweep = test_push_deaths.test_a_flush_that_commits_during_a_push_is_in_the_copy_after_the_next
    caught(lambda n: sweep(tmp_path / str(n), n, False), test_push_deaths.POINTS)


def test_a_full_disk_shows_a_push_of_rows_that_were_never_committed(monkeypatch, caught, tmp_path):
    def kept(end_flush: Any) -> Any:
        def wrong(self: Partition, flight: Flush) -> None:
            if flight.full is not None and self.recent is not None:
                self.recent.add(self.ledger.meta.flush + 1, flight.rows, flight.new_names)
            end_flush(self, flight)

        return wrong

    broken(monkeypatch, Partition, "end_flush", kept)
    sweep = test_push_deaths.test_a_flush_for_which_the_disk_was_full_is_in_no_copy_before_it_is_in_the_ledger
    caught(lambda n: sweep(tmp_path / str(n), True), 1)


def test_the_checks_find_nothing_where_nothing_is_broken(tmp_path, owner_deaths, power_cuts, looks_at_a_writer):
    """So what they find above is what was broken, and nothing else."""
    for number, check in enumerate([owner_deaths, power_cuts, looks_at_a_writer] * 3):
        (tmp_path / str(number)).mkdir()
        check(number)
