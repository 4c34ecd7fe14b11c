"""Damage anywhere in a data folder: no start fails, and no count is wrong without a word.

tests/damage.py makes the random damages; this file runs some hundreds of them, the particular faults that were once found, and
some against the real service.
"""

import errno
import json
import logging
import os
import random
import re
import resource
import shutil
import sqlite3

import damage
import pytest
from damage import TRIALS_PER_TEMPLATE, counts_of, make_template, open_and_settle, trials
from faults import HOST, Host, append, disk_of, failing, flush, ledger_counts, new_queue, settle
from service import eventually

from catchall.engine import partition as partition_module
from catchall.engine.data_folder import queue_folder, read_manifest
from catchall.engine.disk import boot_id
from catchall.engine.metrics_page import SLOT_BYTES, Slot
from catchall.engine.partition import Partition
from catchall.engine.push import Pusher
from catchall.engine.rules import partition_of
from catchall.engine.settings import MongoDB
from catchall.storage import ledger_trace
from catchall.storage.counts import pack
from catchall.storage.ledger_failures import LedgerDamaged, LedgerFull
from catchall.storage.mongodb import Fence

BLOCKS = 12


@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_random_damage_stops_a_start_or_changes_a_count_without_a_word(tmp_path, block):
    first = block * TRIALS_PER_TEMPLATE
    outcomes = list(trials(tmp_path, range(first, first + TRIALS_PER_TEMPLATE)))
    assert not [str(outcome) for outcome in outcomes if outcome.failure]
    assert sum(bool(outcome.wrong) for outcome in outcomes) > 3, "the damages do damage"
    assert sum(not outcome.wrong for outcome in outcomes) > 3, "and not all is lost by each"


def test_an_undamaged_folder_has_every_count_and_says_nothing(tmp_path, caplog):
    for seed in range(4):
        template = make_template(tmp_path / f"{seed}", seed)
        host = Host(template.folder, damage.PARTITIONS)
        for number, truth in enumerate(template.counts):
            partition, openings = open_and_settle(host, number, HOST)
            assert openings == 1
            assert counts_of(partition, list(truth)) == truth
            assert partition.corrupt_files() == partition.set_aside == 0
            partition.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_trials_fail_where_the_trace_is_not_looked_at(tmp_path, monkeypatch):
    """A canary: without it a ledger that lost its -wal is an older one, and nobody is told."""
    monkeypatch.setattr("catchall.engine.ledger_opening._compare", lambda *_: 0)
    assert [outcome for outcome in trials(tmp_path, range(3 * TRIALS_PER_TEMPLATE)) if outcome.failure]


# ---- the ledger


@pytest.fixture
def host(tmp_path) -> Host:
    """One partition at rest: 3000 domains with one delivery each, in the pages of its ledger."""
    host = Host(tmp_path)
    queue = host.queue(segment_size=1 << 20)
    append(queue, b"".join(b"+%b\n" % name.encode() for name in NAMES))
    queue.close()
    partition = host.own()
    settle(partition)
    partition.close()
    return host


NAMES = [f"n{i:05d}.example" for i in range(3000)]


def overwrite(host: Host, start: int, data: bytes) -> None:
    with open(host.root / "00" / "ledger.db", "r+b") as file:
        file.seek(start)
        file.write(data)


def deep_page(host: Host) -> int:
    """Where the page lies that holds a name in the middle."""
    return (host.root / "00" / "ledger.db").read_bytes().index(NAMES[1500].encode()) // 16384 * 16384


def begins_anew(host: Host) -> Partition:
    partition = host.own()
    assert partition.ledger.meta.component.startswith(f"{HOST}-")
    assert list((host.root / "00").glob("ledger-*.corrupt"))
    assert partition.set_aside == 1
    return partition


def test_a_page_damaged_deep_in_a_ledger_that_opens_is_found_in_use_and_set_aside_once(host):
    overwrite(host, deep_page(host), os.urandom(4096))
    partition = host.own()
    with pytest.raises(LedgerDamaged) as caught:
        partition.ledger.load(NAMES)
    assert caught.value.path == partition.ledger.path
    partition.condemn(str(caught.value))
    partition.close()
    partition = begins_anew(host)
    assert partition.ledger.load(NAMES) == {}
    component = partition.ledger.meta.component
    partition.close()
    partition = host.own()
    assert partition.ledger.meta.component == component
    partition.close()


@pytest.mark.parametrize("use", ["scrub", "flush", "push"])
def test_whoever_comes_upon_a_damaged_page_says_that_the_ledger_is_damaged(host, use):
    overwrite(host, deep_page(host), bytes(4096))
    partition = host.own()
    queue = host.queue(segment_size=1 << 20)
    append(queue, b"".join(b"+%b\n" % name.encode() for name in NAMES))
    with pytest.raises(LedgerDamaged):  # noqa: PT012
        if use == "scrub":
            while partition.scrub.step():
                pass
        elif use == "flush":
            assert partition.catch_up()
            flush(partition)
        else:
            list(partition.ledger.scan(0))
    partition.close()
    queue.close()


@pytest.mark.parametrize("how", ["deleted", "emptied", "without tables"])
def test_a_lost_ledger_is_not_taken_for_a_new_one(host, how, caplog):
    path = host.root / "00" / "ledger.db"
    path.unlink()
    if how == "emptied":
        path.touch()
    elif how == "without tables":
        sqlite3.connect(path).execute("pragma journal_mode = wal").connection.close()
    partition = host.own()
    assert partition.ledger.meta.component.startswith(f"{HOST}-")
    assert partition.corrupt_files() > 0
    assert "begin anew" in caplog.text
    partition.close()


def test_a_new_component_is_never_one_that_was_there_before(host):
    components = set()
    for _ in range(5):
        (host.root / "00" / "ledger.db").write_bytes(b"")
        partition = host.own()
        components.add(partition.ledger.meta.component)
        partition.close()
        for aside in host.root.rglob("*.corrupt"):
            aside.unlink()
    assert len(components) == 5


def test_a_ledger_that_lost_its_wal_is_used_and_says_what_is_missing(tmp_path, caplog):
    host = Host(tmp_path)
    queue = host.queue()
    partition = host.own()
    append(queue, b"+a.example\n")
    settle(partition)
    partition.close()
    partition = host.own()
    append(queue, b"+a.example\n")
    queue.close()
    settle(partition)
    shutil.copytree(tmp_path / "00", tmp_path / "copy")
    partition.close()
    shutil.rmtree(tmp_path / "00")
    (tmp_path / "copy").rename(tmp_path / "00")
    (tmp_path / "00" / "ledger.db-wal").write_bytes(b"")
    partition = host.own()
    assert ledger_counts(partition) == {"a.example": (1, 0)}
    assert "its end is lost" in caplog.text
    assert len(list((tmp_path / "00").glob("behind-*.corrupt"))) == 1
    assert "seg is gone; 23 bytes" in caplog.text, "it was retired after a commit that is lost"
    partition.close()
    caplog.clear()
    host.own().close()
    assert "its end is lost" not in caplog.text, "once is enough; the note is still there"


def test_with_a_copy_in_mongodb_a_ledger_that_lost_its_end_begins_anew(host):
    lock = os.open(host.root / "00" / "lock", os.O_RDWR)
    noted = ledger_trace.read(lock)
    assert noted is not None
    ledger_trace.Trace(lock, noted.uuid).note(noted.flush + 1)
    os.close(lock)
    partition = host.own(keep_rows=True)
    assert partition.ledger.meta.component.startswith(f"{HOST}-")
    partition.close()


def change(host: Host, *statements: str) -> None:
    for statement in statements:
        db = sqlite3.connect(host.root / "00" / "ledger.db")
        db.execute("pragma writable_schema = on")
        db.execute(statement)
        db.commit()
        db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "update meta set flush = flush + 1",
        "update meta set catch_all = 7",
        "delete from meta",
        "insert into segment values ('aa', 5, 0, 0)",
        "update sqlite_schema set sql = replace(sql, 'bounced', 'bouncex') where name = 'domain'",
        "delete from sqlite_schema where name = 'segment'",
        "update sqlite_schema set sql = 'nonsense' where name = 'meta'",
    ],
)
def test_what_a_ledger_says_about_itself_is_checked_when_it_is_opened(host, statement):
    change(host, statement)
    begins_anew(host).close()


@pytest.mark.parametrize("value", ["'text'", "null", "-1", "9223372036854775807", "1e300", "x'ff00'"])
def test_a_row_that_holds_no_count_is_named_and_holds_up_nothing(tmp_path, value, caplog):
    host = Host(tmp_path)
    queue, partition = host.queue(), host.own()
    append(queue, b"+a.example\n+b.example 7\n")
    settle(partition)
    partition.close()
    change(
        host,
        "create table spare as select sql from sqlite_schema where name = 'domain'",
        "update sqlite_schema set sql = replace(replace(sql, ') strict,', ') '), ' not null', '') where name = 'domain'",
        f"update domain set delivered = {value} where name = 'a.example'",
        "update sqlite_schema set sql = (select sql from spare) where name = 'domain'",
        "drop table spare",
    )
    partition = host.own()
    while partition.scrub.step():
        pass
    assert partition.load({"b.example": b"b.example"}) == {"b.example": pack(7, 0)}
    assert partition.ledger.damaged_rows == 1
    assert "the row of 'a.example' is damaged" in caplog.text
    assert [row[0] for piece in partition.ledger.scan(0) for row in piece] == ["b.example"], "it is not pushed"
    append(queue, b"+a.example 3\n")
    queue.close()
    settle(partition)
    assert partition.load({"a.example": b"a.example"}) == {"a.example": pack(3, 0)}, "it begins anew"
    (line,) = (tmp_path / "00" / "rows.corrupt").read_bytes().splitlines()
    assert json.loads(line)["name"] == "'a.example'"
    assert partition.corrupt_files() == 1
    partition.close()


def test_rows_that_cannot_be_reached_any_more_are_missed_even_while_flushes_add_new_ones(host, caplog):
    change(host, f"delete from domain where name = '{NAMES[2000]}'")
    partition = host.own()
    queue = host.queue()
    steps = 0
    while partition.scrub.step():
        append(queue, b"+a%d.example\n+o%d.example\n" % (steps, steps))
        settle(partition)
        steps += 1
    assert steps > 5
    assert f"{2999 + 2 * steps} domains can be read, its tallies say {3000 + 2 * steps}" in caplog.text
    assert partition.corrupt_files() == 1
    queue.close()
    partition.close()


def test_with_a_copy_in_mongodb_a_ledger_that_lost_rows_is_damaged(host):
    change(host, f"delete from domain where name = '{NAMES[2000]}'")
    partition = host.own(keep_rows=True)
    with pytest.raises(LedgerDamaged, match="2999 domains can be read"):  # noqa: PT012
        while partition.scrub.step():
            pass
    partition.close()


def test_a_push_that_comes_upon_damage_hands_it_to_the_shard(host, monkeypatch):
    class Copy:
        def __init__(self, *_: object) -> None: ...

        def fences(self) -> dict[tuple[str, int], int]:
            return {}

        def claim(self, *_: object) -> Fence:
            return Fence(0, None)

        def send(self, *_: object) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("catchall.engine.push.MongoCopy", Copy)
    overwrite(host, deep_page(host), bytes(4096))
    partition = host.own(keep_rows=True)
    slot = Slot("shard", 0, memoryview(bytearray(SLOT_BYTES)).cast("Q"))
    pusher = Pusher([partition], MongoDB(), threshold=10, slot=slot, first=False)
    pusher.run()
    assert pusher.damaged is not None
    assert pusher.damaged.path == partition.ledger.path
    partition.close()


def test_on_a_full_disk_a_lost_ledger_waits_for_room_and_is_then_set_aside(host, monkeypatch):
    (host.root / "00" / "ledger.db").write_bytes(b"")
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, on=1, error=errno.ENOSPC))
    with pytest.raises(LedgerFull):
        host.own()
    partition = host.own()
    assert partition.ledger.meta.component.startswith(f"{HOST}-")
    partition.close()


# ---- queues, and bounds


def test_a_read_of_a_large_backlog_drains_it_in_pieces_and_ends_although_more_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(partition_module, "CATCH_UP_BYTES", 10_000)
    host = Host(tmp_path)
    queue, partition = host.queue(segment_size=1 << 20), host.own()
    append(queue, b"+a.example\n" * 20_000)
    ends = partition.arrived()
    turns = 0
    while not partition.catch_up(ends):
        append(queue, b"+a.example\n" * 20_000)
        turns += 1
        assert turns < 25
    assert partition.known("a.example", b"a.example") is None
    assert partition.load({"a.example": b"a.example"}) == {"a.example": pack(20_000, 0)}, "what had arrived, and no more"
    queue.close()
    partition.close()


def test_a_read_waits_until_every_segment_could_be_opened(tmp_path):
    host = Host(tmp_path)
    queue = host.queue()
    append(queue, b"+a.example\n")
    partition = host.own(disk=disk_of(open=failing(os.open, on=2, error=errno.EMFILE)))
    assert not partition.reader.complete
    assert partition.arrived() is not None, "the second try opens it"
    assert partition.catch_up()
    queue.close()
    partition.close()


def test_a_segment_that_was_read_in_part_and_is_gone_is_said_to_be(tmp_path, caplog):
    host = Host(tmp_path)
    queue, partition = host.queue(), host.own()
    append(queue, b"+a.example\n" * 100)
    partition.reader.discover()
    partition.drain(1)
    flush(partition)
    partition.close()
    queue.close()
    host.segments()[0].unlink()
    for _ in range(2):
        partition = host.own()
        settle(partition)
        assert partition.corrupt_files() == 1
        partition.close()
    assert caplog.text.count("seg is gone") == 1


# ---- the real service


@pytest.mark.parametrize("seed", range(6))
def test_the_real_service_starts_answers_and_ends_on_a_damaged_folder(serve, seed):
    service = serve("--workers", "2")
    client = service.client()
    names = [f"n{i}.example" for i in range(40)]
    for name in names * 3:
        assert client.put(name) == 200
    service.kill_all()
    draw = random.Random(seed)
    ledgers = sorted(service.data_dir.glob("*/ledger.db"))
    for path in draw.sample(ledgers, 3):
        match draw.choice(("random", "empty", "gone", "page")):
            case "random":
                path.write_bytes(draw.randbytes(40_000))
            case "empty":
                path.write_bytes(b"")
            case "gone":
                path.unlink()
            case "page":
                content = path.read_bytes()
                path.write_bytes(content[:100] + draw.randbytes(8000) + content[8100:])
    segments = sorted(service.data_dir.glob("*/q/*.seg"))
    if segments:
        draw.choice(segments).write_bytes(b"")
    if seed % 2:
        (service.data_dir / "manifest").write_bytes(b"")
    service.start()
    client = service.client()
    hurt = {int(path.parent.parts[-2 if path.parent.name == "q" else -1]) for path in service.data_dir.rglob("*/*.corrupt")}
    assert hurt
    for name in names:
        count = client.counts(name)[0]
        assert count == 3 or partition_of(name.encode(), 16) in hurt, name
        assert client.put(name) == 200
    eventually("it says so", lambda: client.request("GET", "/readyz").json["status"] == "degraded")
    assert re.search(rb"^catchall_set_aside_files [1-9]", client.request("GET", "/metrics").body, re.MULTILINE)
    assert re.search(rb"^catchall_corrupt_files_total [1-9]", client.request("GET", "/metrics").body, re.MULTILINE)
    service.restart()
    client = service.client()
    eventually("it still says so", lambda: client.request("GET", "/readyz").json["status"] == "degraded")
    for aside in service.data_dir.rglob("*.corrupt*"):
        aside.unlink()
    eventually("all is well", lambda: client.request("GET", "/readyz").json["status"] == "ready")
    service.stop()


def test_a_page_found_damaged_while_the_service_runs_restarts_one_shard_once(serve):
    service = serve("--workers", "2")
    client = service.client()
    for i in range(2000):
        assert client.put(f"n{i}.example") == 200
    service.stop()
    number = partition_of(b"n0.example", 16)
    path = service.data_dir / f"{number:02d}" / "ledger.db"
    content = bytearray(path.read_bytes())
    at = content.index(b"n0.example") // 16384 * 16384
    content[at : at + 4096] = bytes(4096)
    path.write_bytes(content)
    service.start()
    client = service.client()
    eventually("the ledger is set aside", lambda: list(path.parent.glob("ledger-*.corrupt")))
    eventually("it is degraded", lambda: client.request("GET", "/readyz").json["status"] == "degraded")
    assert client.put("n0.example") == 200
    assert client.counts("n0.example") == (1, 0)
    assert len(list(path.parent.glob("ledger-*.corrupt"))) == 1
    service.stop()


def test_sigterm_ends_a_service_that_recovers_from_damage_with_a_backlog(serve):
    service = serve("--workers", "1")
    service.stop()
    host_id = read_manifest(service.data_dir).host_id
    for number in range(16):
        folder = queue_folder(service.data_dir, number)
        queue = new_queue(folder, partition=number, host_id=bytes.fromhex(host_id), segment_size=4 << 20, boot_id=boot_id())
        for _ in range(3):
            append(queue, b"+a.example\n" * 300_000)
        queue.close()
        (folder / "0000000000000000.seg").write_bytes(b"")
        (folder.parent / "ledger.db").write_bytes(b"damaged" * (number % 3))
    service.spawn()
    eventually("its shard runs", lambda: service.pids("shard"))
    service.stop()
    service.start()
    assert service.client().request("GET", "/readyz").json["status"] in ("ready", "degraded")
    service.stop()


def test_a_backlog_of_more_segments_than_descriptors_is_counted(serve):
    service = serve("--workers", "1", "--set", "storage.flush_interval=50ms")
    number = partition_of(b"a.example", 16)
    folder = queue_folder(service.data_dir, number)
    (supervisor,) = service.pids("supervisor")
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (200, 200))  # for the shard that is started next
    service.kill("shard", 0)
    host_id = bytes.fromhex(read_manifest(service.data_dir).host_id)
    for _ in range(150):
        queue = new_queue(folder, partition=number, host_id=host_id, boot_id=boot_id())
        append(queue, b"+a.example\n")
        queue.close()
    service.wait_until_ready()
    assert service.client().counts("a.example") == (150, 0)
    assert "tried again" in service.log
    assert len(service.pids("shard")) == 1
    assert not list(folder.glob("*.corrupt"))
    assert service.log.count("is started again") == 1, "only after the kill"
    service.stop()
