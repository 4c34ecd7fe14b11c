"""A disk that is full to the brim: reads go on, writes are refused, nothing acknowledged is lost, and room is all it takes.

The service runs on a real tmpfs of its own. That needs the right to mount: root, or a user namespace
(`unshare -rm .venv/bin/pytest tests/test_full_disk.py`).
"""

import contextlib
import os
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import HOST, Host, append, ledger_counts, settle
from service import Client, Service, eventually

from catchall.engine import full_disk
from catchall.engine.full_disk import FullDisk
from catchall.engine.settings import Data, Settings
from catchall.engine.settings import Storage as StorageSettings
from catchall.storage import ledger_failures
from catchall.storage.counts import Row
from catchall.storage.ledger import Ledger
from catchall.storage.ledger_failures import LedgerFull
from catchall.storage.ledger_rows import Tallies

MIB = 1 << 20
RESERVE = MIB
FLAGS = ("--set", f"data.reserve={RESERVE}", "--set", "data.partitions=2", "--set", "data.hold=0s",
         "--set", "limits.pause_backlog=1GiB", "--flush-interval", "20ms")  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"this test mounts a tmpfs and may not ({done.stderr.strip()}); run it as root or under unshare -rm")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert os.statvfs(folder).f_bavail == 0
    return ballast


class Sent:
    """What was acknowledged, by name."""

    def __init__(self, client: Client) -> None:
        self.client, self.acknowledged = client, Counter[str]()
        self._next = 0

    def more(self) -> Any:
        names = [f"{self._next + i}.{'long' * 12}.example" for i in range(200)]
        answer = self.client.bulk(*({"domain": name, "type": "delivered"} for name in [*names, "each.example"]))
        if answer.status == 200:
            self._next += 100  # half of the names come twice
            self.acknowledged.update([*names, "each.example"])
        else:
            assert answer.status == 503, answer
            assert answer.json["type"] == "urn:catchall:problem:no_space"
            assert "Nothing was recorded." in answer.json["detail"]
            assert int(answer.headers["retry-after"]) > 0
        return answer.status

    def until_refused(self) -> None:
        for _ in range(10_000):
            if self.more() == 503:
                return
        raise AssertionError("a full disk takes no end of events")

    def compare(self, *, full: bool = False) -> None:
        """Counts are as of now. So is the total, but for a full disk, when it may be as of the last flush that committed."""
        for name in ("each.example", *list(self.acknowledged)[::50]):
            assert self.client.counts(name) == (self.acknowledged[name], 0), name
        if not full:
            eventually("all names are told", lambda: self.client.stats()["total"] == len(self.acknowledged))


def service_on(disk: Path, log_folder: Path) -> Service:
    service = Service(log_folder, *FLAGS)
    service.data_dir = disk / "data"
    return service


def test_a_disk_full_to_the_brim_refuses_writes_answers_reads_and_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    with service_on(small_disk, tmp_path) as service:
        sent = Sent(service.client())
        for times in (1, 2):
            sent.more()
            ballast = fill(small_disk)
            sent.until_refused()
            fill(small_disk)  # the reserve that was given up, too
            sent.until_refused()
            eventually("a flush has met the full disk", lambda times=times: service.log.count("the disk is full") == times)
            sent.compare(full=True)
            assert service.ready
            ballast.unlink()
            eventually("writes are accepted again", lambda: sent.more() == 200)
            eventually("flushes commit", lambda times=times: service.log.count("there is room again") == times)
            sent.compare()
        eventually("the reserve is back", lambda: (service.data_dir / "reserve").stat().st_size == RESERVE)
        sent.client.close()
        service.restart()
        sent.compare()
        service.stop()


def test_a_stop_and_a_death_on_a_full_disk_lose_nothing(small_disk: Path, tmp_path: Path) -> None:
    with service_on(small_disk, tmp_path) as service:
        sent = Sent(service.client())
        sent.more()
        fill(small_disk)
        sent.until_refused()
        service.signal(signal.SIGKILL, "shard", 0)
        fill(small_disk)
        sent.client.close()
        service.stop()
        (small_disk / "ballast").unlink()
        service.start()
        sent.compare()
        service.stop()


# ---- the reserve


@pytest.fixture
def reserve(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    free = {"bytes": 0}
    monkeypatch.setattr(full_disk, "free_bytes", lambda _: free["bytes"])
    return free


def test_the_reserve_comes_back_only_where_there_is_room_to_spare(tmp_path: Path, reserve: dict[str, int]) -> None:
    disk = FullDisk(tmp_path, Settings(data=Data(reserve=4096, min_free_space=10_000)))
    file = tmp_path / "reserve"
    file.write_bytes(bytes(4096))
    disk.meet(LedgerFull("full"))
    assert file.stat().st_size == 0
    reserve["bytes"] = 20_000
    disk.refill()
    assert file.stat().st_size == 0, "no commit has gone through yet"
    disk.leave()
    reserve["bytes"] = 14_095
    disk.refill()
    assert file.stat().st_size == 0, "it would be below min_free_space at once"
    reserve["bytes"] = 14_096
    disk.refill()
    assert file.stat().st_size == 4096


def test_memory_has_no_reserve(tmp_path: Path, reserve: dict[str, int]) -> None:
    reserve["bytes"] = 1 << 60
    disk = FullDisk(tmp_path, Settings(storage=StorageSettings(kind="memory")))
    disk.meet(LedgerFull("full"))
    disk.leave()
    disk.refill()
    assert not list(tmp_path.iterdir())


# ---- the ledger's own errors


class Failing:
    """A connection whose statements fail from a given one on, once."""

    def __init__(self, inner: sqlite3.Connection, word: str, code: int) -> None:
        self._inner, self._word, self._code = inner, word, code

    def execute(self, statement: str, *values: Any) -> Any:
        if self._word and statement.startswith(self._word):
            self._word = ""
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self._code
            raise error
        return self._inner.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


ROWS: list[Row] = [("a.example", 1, 0, 1, 1, 0)]


def failing_ledger(folder: Path, word: str, code: int) -> Ledger:
    ledger = Ledger(folder / "ledger.db", host=HOST, component=HOST, partition=0, partitions=1, threshold=10)
    ledger._db = Failing(ledger._db, word, code)  # type: ignore[assignment]
    return ledger


@pytest.mark.parametrize("word", ["begin", "insert", "update meta"])
@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_TRUNCATE, sqlite3.SQLITE_CANTOPEN])
def test_an_error_of_a_disk_that_has_no_room_is_rolled_back_and_the_flush_can_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, code: int
) -> None:
    ledger = failing_ledger(tmp_path, word, code)
    with monkeypatch.context() as patch:
        patch.setattr(ledger_failures, "_disk_is_full", lambda _: True)
        with pytest.raises(LedgerFull):
            ledger.write(ROWS, {}, [], Tallies(0, 0, 1))
    assert ledger.write(ROWS, {}, [], Tallies(0, 0, 1)) == 1
    assert ledger.load(["a.example"]) == {"a.example": 1}
    ledger.close()


@pytest.mark.parametrize(("word", "full"), [("commit", True), ("insert", False)])
def test_an_error_whose_outcome_is_unknown_is_never_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, full: bool
) -> None:
    ledger = failing_ledger(tmp_path, word, sqlite3.SQLITE_IOERR_WRITE)
    monkeypatch.setattr(ledger_failures, "_disk_is_full", lambda _: full)
    with pytest.raises(sqlite3.OperationalError):
        ledger.write(ROWS, {}, [], Tallies(0, 0, 1))
    ledger.close()


def test_whether_a_disk_is_full_is_asked_of_the_disk(small_disk: Path) -> None:
    assert not ledger_failures._disk_is_full(small_disk)
    fill(small_disk)
    assert ledger_failures._disk_is_full(small_disk)
    assert not ledger_failures._disk_is_full(small_disk / "missing")
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast"]


def test_a_ledger_on_a_full_disk_says_so_at_every_step_of_its_life(small_disk: Path) -> None:
    host = Host(small_disk / "data", synchronous="FULL")
    queue = host.queue()
    append(queue, b"+a.example\n")
    partition = host.own()
    settle(partition)
    partition.close()
    fill(small_disk)
    with pytest.raises(LedgerFull):
        host.own()
    (small_disk / "ballast").unlink()
    partition = host.own()
    append(queue, b"".join(b"+n%d.example\n" % i for i in range(200)))
    fill(small_disk)
    assert partition.catch_up()
    flight = partition.begin_flush()
    flight.run(partition.ledger, partition.cache, partition.reader)
    assert flight.full is not None
    partition.end_flush(flight)
    (small_disk / "ballast").unlink()
    queue.close()
    settle(partition)
    assert len(ledger_counts(partition)) == 201
    partition.close()
