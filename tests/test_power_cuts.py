"""What a power cut may take under each policy, and what it may not (tests/power.py says how it is modelled)."""

import os
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from faults import Died, Host, Mortal, Steps, append, flush, leave_for_dead, ledger_counts, settle
from power import Power

from catchall.engine import lines
from catchall.engine.event_queue import EventQueue
from catchall.engine.ids import event_id
from catchall.engine.partition import Partition

NAMES = [f"n{i}.example" for i in range(5)]


class World:
    """One partition with its writer and its owner, over several boots."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, draw: random.Random, durable: bool = True) -> None:
        self.draw, self.steps, self.owner_steps = draw, Steps(), Steps()
        self.mortal = Mortal(monkeypatch, self.steps)
        self.host = Host(root)
        self.power = Power(root / "00")
        self.durable, self.boots = durable, 1
        self.queue: EventQueue | None = None
        self.partition: Partition | None = None
        self.least: Counter[str] = Counter()  # what no power cut may take any more
        self.most: Counter[str] = Counter()  # everything that was ever sent

    @property
    def boot(self) -> bytes:
        return self.boots.to_bytes(16, "little")

    def writer(self) -> EventQueue:
        if self.queue is None:
            disk = self.power.disk(self.steps)
            self.queue = self.host.queue(disk=disk, boot_id=self.boot, durable=self.durable)
        return self.queue

    def owner(self) -> Partition:
        if self.partition is None:
            self.power.before_opening()
            self.partition = self.host.own(disk=self.power.disk(self.owner_steps), boot=self.boot)
            self.owner_steps.statements_of(self.partition.ledger)
            self.power.opened(self.partition.ledger)
        return self.partition

    def kill_owner(self) -> None:
        if self.partition is not None:
            leave_for_dead(self.partition)
        self.partition = None

    def cut_power(self) -> None:
        self.kill_owner()
        self.mortal.bury()
        self.queue = None
        self.power.cut(self.draw)
        self.boots += 1

    def flush(self) -> None:
        owner = self.owner()
        owner.reader.discover()
        owner.drain(self.draw.choice((3000, 20_000, 1 << 20)))
        if owner.due:
            flush(owner)
        self.least |= Counter({name: delivered for name, (delivered, _) in ledger_counts(owner).items()})

    def die_in_a_flush(self) -> None:
        """Its commit may be visible to the next owner and not durable."""
        self.owner_steps.dies_at = self.owner_steps.taken + self.draw.randrange(1, 40)
        with suppress(Died):
            self.flush()
        self.owner_steps.in_peace()
        self.kill_owner()

    def check(self) -> None:
        self.kill_owner()
        owner = self.owner()
        settle(owner)
        counted = {name: delivered for name, (delivered, _) in ledger_counts(owner).items()}
        for name in NAMES:
            assert self.least[name] <= counted.get(name, 0) <= self.most[name], name
        assert owner.reader.corrupt_files == 0 or not self.durable, "a power cut is no damage"
        assert owner.ledger.damaged_rows == 0
        assert not self.host.segments()
        # What the cut took is gone for good: from here on it may not come back.
        self.least = Counter(counted)
        self.most = Counter(counted)


def send(world: World, names: list[str], acknowledged: Counter[str]) -> None:
    for name in names:
        world.most[name] += 20
        append(world.writer(), f"+{name}\n".encode() * 20)
        acknowledged[name] += 20


@pytest.mark.parametrize("seed", range(150))
def test_interval_loses_at_most_what_was_sent_since_the_last_sync_or_commit(tmp_path, monkeypatch, seed):
    interval_loses_at_most_what_was_sent_since_the_last_sync_or_commit(World(tmp_path, monkeypatch, random.Random(seed)))


def interval_loses_at_most_what_was_sent_since_the_last_sync_or_commit(world: World) -> None:
    acknowledged: Counter[str] = Counter()
    doubtful: Counter[str] = Counter()  # in a segment whose sync failed: only a commit makes it safe
    for _ in range(world.draw.randrange(15, 50)):
        action = world.draw.choice(("write", "write", "write", "sync", "failed sync", "flush", "die in a flush", "cut"))
        if action == "write":
            send(world, world.draw.choices(NAMES, k=world.draw.randrange(1, 15)), acknowledged)
        elif action in ("sync", "failed sync"):
            world.steps.broken = action == "failed sync"
            try:
                world.writer().tidy()
                world.writer().sync()
                world.least |= acknowledged - doubtful
            except OSError:
                world.writer().abandon()
                doubtful |= acknowledged - world.least
            world.steps.broken = False
        elif action == "flush":
            world.flush()
        elif action == "die in a flush":
            world.die_in_a_flush()
        else:
            world.cut_power()
            world.check()
            acknowledged, doubtful = Counter(world.least), Counter()
    world.cut_power()
    world.check()
    world.kill_owner()


@pytest.mark.parametrize("seed", range(100))
def test_always_loses_nothing_that_was_acknowledged_or_read(tmp_path, monkeypatch, seed):
    always_loses_nothing_that_was_acknowledged_or_read(World(tmp_path, monkeypatch, random.Random(seed)))


def always_loses_nothing_that_was_acknowledged_or_read(world: World) -> None:
    draw = world.draw
    acknowledged: Counter[str] = Counter()

    def cut() -> None:
        world.cut_power()
        world.check()
        acknowledged.clear()
        acknowledged.update(world.least)

    def commit_group() -> None:
        """Stage, sync, publish: a power cut may come before, and a read at any step of them."""
        queue = world.writer()
        group: Counter[str] = Counter()
        for name in draw.choices(NAMES, k=draw.randrange(1, 15)):
            lines = f"+{name}\n".encode() * 20
            if not queue.staged and not queue.room(len(lines)):
                queue.install(queue.make())
            if not queue.stage(lines):
                break
            group[name] += 20
            world.most[name] += 20
        happens = draw.choice(("sync", "sync", "sync", "cut", "fail"))
        world.steps.broken = happens == "fail"
        world.steps.meanwhile(draw.randrange(10), read)
        try:
            if happens == "cut":
                cut()
                return
            queue.sync_staged()
            queue.publish()
            acknowledged.update(group)
            world.least |= acknowledged
        except OSError:
            queue.abandon()
        finally:
            world.steps.broken = False
            world.steps.in_peace()

    def read() -> None:
        """What a read shows may not be taken back."""
        owner = world.owner()
        assert owner.catch_up()
        for name in NAMES:
            seen = owner.known(name, name.encode())
            world.least[name] = max(world.least[name], owner.load({name: name.encode()})[name] if seen is None else seen)

    for _ in range(draw.randrange(10, 40)):
        action = draw.choice(("write", "write", "write", "tidy", "flush", "die in a flush", "read", "cut"))
        if action == "write":
            commit_group()
        elif action == "tidy":
            world.writer().tidy()
        elif action == "flush":
            world.flush()
        elif action == "die in a flush":
            world.die_in_a_flush()
        elif action == "read":
            read()
        else:
            cut()
    world.cut_power()
    world.check()
    world.kill_owner()


@pytest.mark.parametrize("seed", range(60))
def test_never_loses_nothing_that_a_flush_committed(tmp_path, monkeypatch, seed):
    world = World(tmp_path, monkeypatch, random.Random(seed), durable=False)
    for _ in range(world.draw.randrange(15, 50)):
        action = world.draw.choice(("write", "write", "write", "tidy", "flush", "die in a flush", "cut"))
        if action == "write":
            send(world, world.draw.choices(NAMES, k=world.draw.randrange(1, 15)), Counter())
        elif action == "tidy":
            world.writer().tidy()
        elif action == "flush":
            world.flush()
        elif action == "die in a flush":
            world.die_in_a_flush()
        else:
            world.cut_power()
            world.check()
    world.cut_power()
    world.check()
    world.kill_owner()


@pytest.mark.parametrize("seed", range(40))
def test_no_power_cut_parts_an_id_from_its_count_so_a_resend_counts_what_is_missing(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    world = World(tmp_path, monkeypatch, draw, durable=draw.random() < 0.7)
    no_power_cut_parts_an_id_from_its_count(world)


def no_power_cut_parts_an_id_from_its_count(world: World) -> None:
    draw, requests = world.draw, list[tuple[str, bytes]]()
    name_of: dict[bytes, str] = {}  # by id

    def send(name: str) -> None:
        digits = [event_id(f"{len(requests)} {at}", b"+", name.encode()) for at in range(20)]
        name_of.update((bytes.fromhex(some.decode()), name) for some in digits)
        requests.append((name, b"".join(lines.with_id(b"+%b\n" % name.encode(), some) for some in digits)))
        append(world.writer(), requests[-1][1])

    def check() -> Counter[str]:
        owner = world.owner()
        settle(owner)
        table, intact = owner.ledger.ids()
        assert intact
        assert {hash for hash, _, _ in table} == owner.ids._held.keys()
        counted = Counter({name: delivered for name, (delivered, _) in ledger_counts(owner).items()})
        assert counted == Counter(name_of[hash] for hash in owner.ids._held)
        return counted

    for _ in range(draw.randrange(15, 50)):
        action = draw.choice(("write", "write", "resend", "resend", "sync", "flush", "die in a flush", "cut"))
        if action == "write":
            for name in draw.choices(NAMES, k=draw.randrange(1, 8)):
                send(name)
        elif action == "resend" and requests:
            for _, again in draw.choices(requests, k=draw.randrange(1, 8)):
                append(world.writer(), again)
        elif action == "sync":
            world.writer().tidy()
            world.writer().sync()
        elif action == "flush":
            world.flush()
        elif action == "die in a flush":
            world.die_in_a_flush()
        elif action == "cut":
            committed = {hash for hash, _, _ in world.owner().ledger.ids()[0]}
            world.cut_power()
            check()
            assert committed <= world.owner().ids._held.keys()
    for _, again in requests:
        append(world.writer(), again)
    assert check() == Counter({name: 20 * n for name, n in Counter(name for name, _ in requests).items()})
    world.kill_owner()


@pytest.mark.parametrize("dies_at", range(1, 60))
def test_after_a_power_cut_the_ledger_is_as_of_the_last_commit_that_returned_or_of_the_one_under_way(
    tmp_path, monkeypatch, dies_at
):
    """Counts, positions and tallies together: the events that came back are counted again, and no others."""
    for seed in range(4):
        root = tmp_path / str(seed)
        root.mkdir()
        world = World(root, monkeypatch, random.Random(seed))
        send(world, NAMES * 3, Counter())
        world.writer().tidy()
        world.writer().sync()
        world.flush()
        committed = Counter(world.least)
        send(world, NAMES * 3, Counter())
        world.owner_steps.dies_at = world.owner_steps.taken + dies_at
        with suppress(Died):
            owner = world.owner()
            assert owner.catch_up()
            flush(owner)
        world.owner_steps.in_peace()
        world.cut_power()
        owner = world.owner()
        counted = Counter({name: delivered for name, (delivered, _) in ledger_counts(owner).items()})
        tallies = owner.ledger.meta.tallies
        assert counted in (committed, world.most), "either all of a flush or nothing"
        assert tallies.catch_all + tallies.not_catch_all + tallies.unknown == len(counted)
        world.least = committed
        world.check()
        world.kill_owner()


def test_bytes_that_no_sync_covered_are_counted_and_told_when_a_power_cut_leaves_them(tmp_path, caplog):
    host = Host(tmp_path)
    queue = host.queue(boot_id=bytes(16))
    append(queue, b"+synced.example\n")
    queue.sync()
    append(queue, b"+unsynced.example\n")
    os.close(queue._current.fd)
    owner = host.own()
    settle(owner)
    assert ledger_counts(owner) == {"synced.example": (1, 0), "unsynced.example": (1, 0)}
    assert owner.reader.unverified_bytes == len(b"+unsynced.example\n")
    assert "left 18 bytes that no mark covers; they are counted" in caplog.text
    owner.close()
