"""The crash drill: its plan is the seed's, it sees an event too many and one too few, and it says what it found in one form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from catchall.tools import crash_drill
from catchall.tools.drill_faults import nothing
from catchall.tools.drill_plan import Kind, Params, Setup, make_plan
from catchall.tools.drill_record import ACKNOWLEDGED, AMBIGUOUS, REFUSED, Mismatch, Record, verdict
from catchall.tools.drill_service import Service
from catchall.tools.drill_stage import Stage

VERDICT = re.compile(r"lost=(\d+) doubled=(\d+) ambiguous=(\d+)\n")
SETUP = Setup(workers=2, http_workers=2, stop_seconds=10.0, replicas=1)
SHORT = ("--seed", "5", "--names", "20")


def found(capsys: pytest.CaptureFixture[str]) -> tuple[int, int, int]:
    """The verdict, which is all that stdout holds."""
    match = VERDICT.fullmatch(capsys.readouterr().out)
    assert match is not None
    lost, doubled, ambiguous = map(int, match.groups())
    return lost, doubled, ambiguous


# ---- the plan


def test_the_same_seed_gives_the_same_plan_and_another_seed_another_one() -> None:
    plans = [list(map(str, make_plan(seed, 300, crash_drill.KINDS, SETUP))) for seed in (7, 7, 8)]
    assert plans[0] == plans[1] != plans[2]


def test_a_longer_plan_begins_as_the_shorter_one() -> None:
    short, long = (list(map(str, make_plan(7, count, crash_drill.KINDS, SETUP))) for count in (50, 300))
    assert long[:50] == short


def test_a_plan_has_every_kind_and_only_shards_that_run_then() -> None:
    workers, kinds = SETUP.workers, set()
    for planned in make_plan(7, 2000, crash_drill.KINDS, SETUP):
        kinds.add(planned.kind.name)
        if planned.kind.name == "kill-shard":
            assert int(planned.params["shard"]) < workers
        workers = int(planned.params.get("workers", workers))
    assert kinds == {kind.name for kind in crash_drill.KINDS}


def test_a_plan_is_printed_and_nothing_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "none"
    assert crash_drill.main(["--plan", "--kills", "12", "--seed", "7", "--data-dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split(" ")[0]) for line in lines] == [*range(1, 13)]
    assert all(line.split(" ")[1].startswith("kill-") for line in lines)
    assert not folder.exists()


def test_a_drill_says_its_seed_and_how_to_replay_it(capsys: pytest.CaptureFixture[str]) -> None:
    crash_drill.main(["--plan", "--faults", "5", "--kinds", "kill-shard,hup"])
    said = capsys.readouterr()
    replay = re.search(r"replay with: catchall drill (.*)", said.err)
    assert replay is not None
    crash_drill.main(replay[1].split(" "))
    assert capsys.readouterr().out == said.out


# ---- the record


def test_counts_may_lie_between_acknowledged_and_acknowledged_and_ambiguous() -> None:
    record = Record(["a.example", "b.example"])
    record.note(ACKNOWLEDGED, [("a.example", "delivered")] * 5)
    record.note(AMBIGUOUS, [("a.example", "delivered")] * 2)
    record.note(REFUSED, [("a.example", "delivered"), ("b.example", "bounced")])
    wrong = {counted: record.mismatches({"a.example": (counted, 0), "b.example": (0, 0)}) for counted in range(10)}
    assert [counted for counted in range(10) if not wrong[counted]] == [5, 6, 7]
    assert (wrong[3][0].lost, wrong[9][0].doubled) == (2, 2)
    assert record.mismatches({"a.example": (5, 1), "b.example": (0, 1)}) == [
        Mismatch("a.example", "bounced", 0, 0, 1), Mismatch("b.example", "bounced", 0, 0, 1)
    ]  # fmt: skip


def test_the_verdict_adds_up_events() -> None:
    wrong = [Mismatch("a", "bounced", 5, 0, 2), Mismatch("b", "bounced", 5, 1, 8), Mismatch("c", "bounced", 1, 0, 0)]
    assert verdict(wrong, 9) == "lost=4 doubled=2 ambiguous=9"


# ---- the drill itself


def double(stage: Stage, params: Params) -> None:
    """As a service would that counts an event twice."""
    assert stage.service.client().put(stage.load.record.names[0]) == 200


def lose(stage: Stage, params: Params) -> None:
    """As a service would that forgets what it acknowledged."""
    stage.load.record.note(ACKNOWLEDGED, [(stage.load.record.names[0], "bounced")] * 3)


def log_a_traceback(stage: Stage, params: Params) -> None:
    with (stage.folder / "log").open("a") as log:
        log.write('Traceback (most recent call last):\n  File "x.py", line 1, in x\nKeyError: 1\n')


def kill_for_good(stage: Stage, params: Params) -> None:
    stage.service.kill_all()


@pytest.mark.drill
def test_kills_lose_and_double_nothing_and_the_report_says_what_was_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    assert crash_drill.main([*SHORT, "--kills", "6", "--every", "4", "--json", str(report)]) == 0
    lost, doubled, ambiguous = found(capsys)
    assert (lost, doubled) == (0, 0)
    told = json.loads(report.read_text())
    assert (told["schema"], told["seed"], told["exit_code"], told["failure"], told["mismatches"]) == (1, 5, 0, None, [])
    assert told["verdict"] == f"lost=0 doubled=0 ambiguous={ambiguous}"
    assert told["command"] == f"catchall drill --seed 5 --names 20 --kills 6 --every 4 --json {report}"
    assert [fault["number"] for fault in told["faults"]] == [1, 2, 3, 4, 5, 6]
    assert [point["after"] for point in told["checkpoints"]] == [4, 6, 6]
    events = told["events"]
    assert 0 < events["acknowledged"] <= events["counted"] <= events["acknowledged"] + ambiguous
    assert set(told["versions"]) == {"catchall", "granian", "pymongo", "python"}
    assert told["tracebacks"] == []


@pytest.mark.drill
def test_every_signal_and_a_second_instance_lose_and_double_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "stop-process,stop-all,hup,second-instance,restart"
    assert crash_drill.main([*SHORT, "--faults", "8", "--kinds", kinds, "--stop-seconds", "0.5"]) == 0
    assert found(capsys)[:2] == (0, 0)


@pytest.mark.drill
def test_storage_in_memory_outlives_what_it_promises_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert crash_drill.main([*SHORT, "--kills", "5", "--storage", "memory"]) == 0
    assert found(capsys)[:2] == (0, 0)


@pytest.mark.drill
def test_an_event_that_was_counted_twice_is_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = [*SHORT, "--faults", "30", "--every", "2", "--kinds", "double", "--json", str(report)]
    assert crash_drill.main(arguments, [Kind("double", nothing, double)]) == 2
    assert found(capsys) == (0, 2, 0)
    told = json.loads(report.read_text())
    assert (told["exit_code"], told["mismatched"], len(told["faults"])) == (2, 1, 2)
    assert (told["mismatches"][0]["domain"], told["mismatches"][0]["kind"]) == ("d0.seed-5.example", "delivered")


@pytest.mark.drill
def test_an_event_that_was_lost_is_seen_whoever_sees_it_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert crash_drill.main([*SHORT, "--faults", "1", "--kinds", "lose"], [Kind("lose", nothing, lose)]) == 2
    assert found(capsys) == (3, 0, 0)


@pytest.mark.drill
def test_a_service_that_does_not_recover_in_time_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    extra = [Kind("kill-for-good", nothing, kill_for_good)]
    assert crash_drill.main([*SHORT, "--faults", "3", "--kinds", "kill-for-good", "--within", "1"], extra) == 2
    assert "the service did not recover within 1 s" in capsys.readouterr().err


@pytest.mark.drill
def test_a_traceback_in_the_log_is_a_failure_even_if_every_count_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    extra = [Kind("log", nothing, log_a_traceback)]
    assert crash_drill.main([*SHORT, "--faults", "1", "--kinds", "log"], extra) == 2
    said = capsys.readouterr()
    assert "the service has logged a traceback: KeyError: 1" in said.err
    assert VERDICT.fullmatch(said.out)


def test_tracebacks_of_the_service_are_told_from_those_of_a_child_that_lost_its_parent_at_birth(tmp_path: Path) -> None:
    born = 'Traceback (most recent call last):\n  File "s.py", line 1, in spawn_main\n    x\nEOFError: Ran out of input\n'
    ours = 'Traceback (most recent call last):\n  File "x.py", line 1, in x\n    y\nKeyError: 1\n'
    logged = "2026-01-01T00:00:00Z error http it failed | Traceback (most recent call last): | KeyError: 2\n"
    (tmp_path / "log").write_text("a line\n" + born + ours + logged + born)
    assert Service(tmp_path).tracebacks == ["KeyError: 1", logged.rstrip()]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--kinds", "kill-everybody"], "there is no 'kill-everybody'"),
        (["--kinds", "cut-mongodb"], "cut-mongodb needs what is not here or not asked for: mongodb, one server"),
        (["--kills", "3", "--kinds", "restart"], "restart kills nothing"),
        (["--kills", "0"], "at least 1"),
        (["--stop-seconds", "31"], "at most 30"),
        (["--kills", "1", "--json", "/proc/nowhere/report.json"], "nothing can be written there"),
        (["--replicas", "3"], "ask for --storage mongodb"),
    ],
)
def test_what_cannot_be_run_is_exit_code_1_and_no_mismatch(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        crash_drill.main(words)
    assert ended.value.code == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--data-dir", "{here}"], ["--storage", "mongodb", "--mongodb-binary", "{here}/mongod"]])
def test_a_folder_in_use_and_a_missing_mongod_are_exit_code_1(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert crash_drill.main(["--kills", "1", *(word.format(here=tmp_path) for word in words)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
