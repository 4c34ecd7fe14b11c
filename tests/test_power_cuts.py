"""What a power cut may take, and what it may not: pages that were not synced, names whose folder was not.

Model: every page of a file is, after the cut, either what it was at the file's last sync or what it is now, each by itself.
A name is there if the folder was synced with it; one that came or went since may be either. The ledger keeps what it committed.
"""

import os
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from faults import DISK_CALLS, Died, Host, Mortal, Steps, append, flush, ledger_counts, settle

from catchall.engine.disk import DISK, Disk
from catchall.engine.event_queue import EventQueue
from catchall.engine.partition import Partition

NAMES = [f"n{i}.example" for i in range(5)]
PAGE = 4096


class Power:
    """Remembers what is durable in one folder of queues, and cuts the power."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._content: dict[int, bytes] = {}  # by inode: what a sync covered
        self._names: dict[str, int] = {}  # names that are durable, and their inodes

    def disk(self, steps: Steps) -> Disk:
        calls = {name: steps.wrap(getattr(DISK, name)) for name in DISK_CALLS}
        return Disk(**calls | {"fsync": steps.wrap(self._sync), "fdatasync": steps.wrap(self._sync)})

    def _sync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == self._folder:
            self._names = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._content[os.fstat(fd).st_ino] = os.pread(fd, os.fstat(fd).st_size, 0)

    def cut(self, draw: random.Random) -> None:
        now = {path.name: path for path in self._folder.glob("*.seg")}
        for name in {*now, *(name for name in self._names if name.endswith(".seg"))}:
            path = self._folder / name
            unsure = (name in now) != (name in self._names)
            present = draw.random() < 0.5 if unsure else name in now
            inode = self._names.get(name) or path.stat().st_ino
            durable = self._content[inode]
            current = path.read_bytes() if name in now else durable
            path.unlink(missing_ok=True)
            if present:
                pages = range(0, len(current), PAGE)
                path.write_bytes(b"".join(draw.choice((current, durable))[at : at + PAGE] for at in pages))
        self._content = {path.stat().st_ino: path.read_bytes() for path in self._folder.glob("*.seg")}
        self._names = {path.name: path.stat().st_ino for path in self._folder.glob("*.seg")}


class World:
    """One partition with its writer and its owner, over several boots."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, draw: random.Random) -> None:
        self.draw, self.steps, self.owner_steps = draw, Steps(), Steps()
        self.mortal = Mortal(monkeypatch, self.steps)
        self.host = Host(root)
        self.power = Power(root / "00" / "q")
        self.boots = 1
        self.queue: EventQueue | None = None
        self.partition: Partition | None = None
        self.least: Counter[str] = Counter()  # what no power cut may take any more
        self.most: Counter[str] = Counter()  # everything that was ever sent

    @property
    def boot(self) -> bytes:
        return self.boots.to_bytes(16, "little")

    def writer(self) -> EventQueue:
        if self.queue is None:
            self.queue = self.host.queue(disk=self.power.disk(self.steps), boot_id=self.boot)
        return self.queue

    def owner(self) -> Partition:
        if self.partition is None:
            self.partition = self.host.own(disk=self.power.disk(self.owner_steps), boot=self.boot)
            self.owner_steps.statements_of(self.partition.ledger)
        return self.partition

    def kill_owner(self) -> None:
        if self.partition is not None:
            self.partition.close()
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

    def check(self) -> None:
        self.kill_owner()
        owner = self.owner()
        settle(owner)
        counted = {name: delivered for name, (delivered, _) in ledger_counts(owner).items()}
        for name in NAMES:
            assert self.least[name] <= counted.get(name, 0) <= self.most[name], name
        assert owner.reader.corrupt_files == 0, "a power cut is no damage"
        assert owner.ledger.damaged_rows == 0
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
    draw = random.Random(seed)
    world = World(tmp_path, monkeypatch, draw)
    acknowledged: Counter[str] = Counter()
    for _ in range(draw.randrange(15, 50)):
        action = draw.choice(("write", "write", "write", "sync", "tidy", "flush", "die in a flush", "cut"))
        if action == "write":
            send(world, draw.choices(NAMES, k=draw.randrange(1, 15)), acknowledged)
        elif action == "sync":
            world.writer().tidy()
            world.writer().sync()
            world.least |= acknowledged
        elif action == "tidy":
            world.writer().tidy()
        elif action == "flush":
            world.flush()
        elif action == "die in a flush":
            world.owner_steps.dies_at = world.owner_steps.taken + draw.randrange(1, 40)
            with suppress(Died):
                world.flush()
            world.owner_steps.dies_at = None
            world.kill_owner()
        else:
            world.cut_power()
            world.check()
            acknowledged = Counter(world.least)
    world.cut_power()
    world.check()
    assert not world.host.segments()
    world.kill_owner()


@pytest.mark.parametrize("seed", range(100))
def test_always_loses_nothing_that_was_acknowledged(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    world = World(tmp_path, monkeypatch, draw)

    def commit_group() -> None:
        """Stage, sync, publish: a power cut may come before each of them."""
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
        if draw.random() < 0.1:
            world.cut_power()
            world.check()
            return
        queue.sync_staged()
        queue.publish()
        world.least += group

    for _ in range(draw.randrange(10, 40)):
        action = draw.choice(("write", "write", "write", "tidy", "flush", "cut"))
        if action == "write":
            commit_group()
        elif action == "tidy":
            world.writer().tidy()
        elif action == "flush":
            world.flush()
        else:
            world.cut_power()
            world.check()
    world.cut_power()
    world.check()
    assert not world.host.segments()
    world.kill_owner()
