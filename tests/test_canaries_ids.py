"""The rules of ids and keys broken on purpose, as test_canaries.py does it with those of the storage."""

import random
from pathlib import Path
from typing import Any

import pytest
import test_ids
import test_keys
import test_model
import test_recovery
from canaries import FOUND, Check, broken
from hypothesis.stateful import run_state_machine_as_test

from catchall.engine import ledger_opening
from catchall.engine.flush import Flush
from catchall.engine.ids import Ids
from catchall.engine.partition import Partition
from catchall.http import events
from catchall.storage.ledger import Ledger


@pytest.fixture
def resends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    def check(seed: int) -> None:
        draw = random.Random(seed)
        with monkeypatch.context() as undone:
            test_recovery.mixture(tmp_path / str(seed), undone, draw, test_recovery.Resender(draw))

    return check


@pytest.mark.parametrize("first", ["counts", "ids"])
def test_deaths_see_ids_and_counts_in_two_transactions(monkeypatch, caught, tmp_path, first):
    def in_two(write: Any) -> Any:
        def wrong(self: Ledger, rows: Any, positions: Any, gone: Any, tallies: Any, ids: Any = None) -> int:
            halves = [(rows, positions, gone, tallies, None), ([], {}, [], tallies, ids)]
            for half in halves if first == "counts" else halves[::-1]:
                number: int = write(self, *half)
            return number

        return wrong

    broken(monkeypatch, Ledger, "write", in_two)
    sweep = test_ids.test_an_owner_that_dies_at_any_step_counts_every_id_once
    caught(lambda n: sweep(tmp_path / str(n), n), 119)


@pytest.mark.parametrize("first", ["positions", "ids"])
def test_resends_see_positions_and_ids_cut_at_two_instants(monkeypatch, caught, resends, first):
    """What is drained in between is saved with one of them and not with the other."""

    def at_two_instants(begin_flush: Any) -> Any:
        def wrong(self: Partition) -> Flush:
            ids = self.ids.cut()
            if first == "ids":
                self.reader.drain(self.pending, 1 << 20)
            flight: Flush = begin_flush(self)
            if first == "positions":
                self.reader.drain(self.pending, 1 << 20)
                self.ids.uncut(ids)
                ids = self.ids.cut()
            else:
                self.ids.uncut(flight.ids)
            flight.ids = ids
            return flight

        return wrong

    broken(monkeypatch, Partition, "begin_flush", at_two_instants)
    caught(resends, 60)


def test_resends_see_ids_that_are_not_put_back_after_a_full_disk(monkeypatch, caught, resends):
    broken(monkeypatch, Ids, "uncut", lambda _: lambda self, cut: None)
    caught(resends, 60)


def test_the_model_sees_a_superseded_ledger_that_does_not_hand_its_ids_on(monkeypatch):
    broken(monkeypatch, ledger_opening, "IdChanges", lambda right: lambda ids, *rest: right((), *rest))
    with pytest.raises(FOUND):
        run_state_machine_as_test(test_model.Service, settings=test_model.SETTINGS)


def test_deaths_see_events_of_a_request_that_are_recorded_before_its_key(monkeypatch, caught, tmp_path):
    claims: list[Any] = []

    async def later(*claim: Any) -> None:
        claims.append(claim)

    claim = events.claim

    def key_last(record: Any) -> Any:
        async def wrong(self: events.Events, *rest: Any) -> Any:
            response = await record(self, *rest)
            await claim(*claims.pop())
            return response

        return wrong

    monkeypatch.setattr(events, "claim", later)
    broken(monkeypatch, events.Events, "_record_with_ids", key_last)

    def check(number: int) -> None:
        with monkeypatch.context() as undone:
            sweep = test_keys.test_of_two_requests_with_one_key_one_counts_wherever_the_worker_of_the_first_died
            sweep(tmp_path / str(number), undone, number)

    caught(check, test_keys.STEPS)


def test_the_check_finds_nothing_where_nothing_is_broken(tmp_path, resends):
    for seed in range(1, 6):
        (tmp_path / str(seed)).mkdir()
        resends(seed)
