"""`catchall check-data` finds what a start would find, and changes nothing."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from faults import BOOT, HOST, Host, append, flush, settle
from service import SMALL

from catchall.engine import data_folder
from catchall.engine.data_folder import Manifest
from catchall.engine.lines import with_id
from catchall.tools import check_data
from catchall.tools.cli import main

PARTITIONS = 3


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three partitions as `kill -9` leaves them: 300 domains each in the ledger, 40 events still in a segment."""
    monkeypatch.setattr(check_data, "boot_id", lambda: BOOT)
    living = tmp_path / "living"
    host = Host(living, PARTITIONS)
    (living / "manifest").write_text(Manifest(HOST, PARTITIONS, 1).text())
    (living / "lock").touch()
    queues = [host.queue(number) for number in range(PARTITIONS)]
    partitions = [host.own(number) for number in range(PARTITIONS)]
    for queue, partition in zip(queues, partitions, strict=True):
        append(queue, b"".join(with_id(b"+n%d.example\n" % i, b"%032x" % i) for i in range(300)))
        settle(partition)
        append(queue, b"-n1.example\n" * 20)
        partition.reader.discover()
        partition.drain(1 << 20)
        flush(partition)
        append(queue, b"+n1.example 2\n" * 20)
        append(queue, with_id(b"+n2.example\n", b"%032x" % 1) * 2)  # it was counted before
        queue.sync()
    shutil.copytree(living, tmp_path / "data")
    for each in (*queues, *partitions):
        each.close()
    return tmp_path / "data"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def look(folder: Path, capsys) -> tuple[int, dict]:
    before = content(folder)
    code = main(["check-data", str(folder), "--json"])
    assert content(folder) == before, "it changes nothing"
    return code, json.loads(capsys.readouterr().out)


def problems(found: dict) -> list[str]:
    return [problem for partition in found["partitions"] for problem in partition["problems"]] + found["problems"]


def test_an_undamaged_folder_is_good_and_what_is_in_it_is_told(folder, capsys):
    code, found = look(folder, capsys)
    assert (code, problems(found), found["set_aside"]) == (0, [], [])
    assert found["host"] == HOST
    for number, partition in enumerate(found["partitions"]):
        assert partition["partition"] == number
        assert (partition["domains"], partition["unread_events"]) == (300, 40)
        assert partition["unread_bytes"] == 20 * len("+n1.example 2\n") + 2 * len("+n2.example #\n" + 32 * "0")
        assert partition["segments"] >= 1
        assert partition["flush"] >= 2
    assert main(["check-data", str(folder)]) == 0
    assert "no damage was found" in capsys.readouterr().out


def change_ledger(folder: Path, statement: str) -> None:
    db = sqlite3.connect(folder / "01" / "ledger.db")
    db.execute(statement)
    db.commit()
    db.close()


def busiest(folder: Path) -> Path:
    """The segment of partition 1 that is being read."""
    return max((folder / "01" / "q").iterdir(), key=lambda path: path.read_bytes().count(b"n1.example"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "the manifest": (lambda f: flip(f / "manifest", 12), "does not match its crc"),
    "no manifest": (lambda f: (f / "manifest").unlink(), "the manifest is gone"),
    "a row": (lambda f: change_ledger(f, "update domain set delivered = 7 where name = 'n5.example'"), "'n5.example'"),
    "a tally": (lambda f: change_ledger(f, "delete from domain where name = 'n5.example'"), "its tallies say"),
    "meta": (lambda f: change_ledger(f, "update meta set flush = 9"), "about itself"),
    "a position": (lambda f: change_ledger(f, "update segment set consumed = consumed - 12"), "positions"),
    "ids": (lambda f: change_ledger(f, "delete from id where age = 0 and hash < x'0000000000000000000000000000000f'"), "ids"),
    "no ledger": (lambda f: (f / "01" / "ledger.db").unlink(), "is gone"),
    "an empty ledger": (lambda f: (f / "01" / "ledger.db").write_bytes(b""), "01/ledger.db"),
    "another's ledger": (lambda f: [p.rename(f / "01" / p.name) for p in (f / "02").glob("ledger.db*")], "this is format 2"),
    "a lost wal": (lambda f: (f / "01" / "ledger.db-wal").write_bytes(b""), "its end is lost"),
    "a segment's header": (lambda f: flip(busiest(f), 13), "header's crc"),
    "a segment's payload": (lambda f: flip(busiest(f), 4096 + 30), "does not match its mark"),
    "a segment's length": (lambda f: busiest(f).write_bytes(b"x" * 70), "too short"),
    "published": (lambda f: flip(busiest(f), 67), "contradict"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(folder, capsys, name):
    damage, said = DAMAGES[name]
    damage(folder)
    code, found = look(folder, capsys)
    assert code == 3
    assert said in " ".join(problems(found))
    assert main(["check-data", str(folder)]) == 3
    text = capsys.readouterr().out
    assert "DAMAGED" in text
    assert text.endswith("damage was found\n")


def test_what_was_set_aside_before_is_listed(folder, capsys):
    (folder / "02" / "q" / "0123456789abcdef.corrupt").touch()
    code, found = look(folder, capsys)
    assert (code, found["set_aside"]) == (3, ["02/q/0123456789abcdef.corrupt"])


@pytest.mark.parametrize("lock", ["lock", "01/lock"])
def test_a_folder_in_use_is_refused(folder, capsys, lock):
    with open(folder / lock, "rb") as file:
        assert data_folder.try_lock(file.fileno())
        assert main(["check-data", str(folder)]) == 1
    assert "held by a running service" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["none", "file", "empty"])
def test_what_is_no_data_folder_is_refused(tmp_path, capsys, what):
    path = tmp_path / "data"
    if what == "file":
        path.touch()
    elif what == "empty":
        path.mkdir()
    assert main(["check-data", str(path)]) == 1
    assert capsys.readouterr().out == ""


def test_the_folder_of_a_real_service_is_refused_while_it_runs_and_good_afterwards(serve, capsys):
    service = serve(*SMALL)
    assert service.client().put("a.example") == 200
    assert main(["check-data", str(service.data_dir)]) == 1
    service.stop()
    code, found = look(service.data_dir, capsys)
    assert (code, problems(found)) == (0, [])
    assert sum(partition["domains"] for partition in found["partitions"]) == 1
