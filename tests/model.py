"""Hosts that share one MongoDB, driven step by step: the world of test_model.py. Its methods are what may happen.

MongoDB is the stand-in of mongo_stand_in.py; push is the real one. See model_host.py for a host and its books.

Trouble      Each action of a process takes a Trouble: at its n-th step (a disk call, a load or store of a segment's words, a
             statement, a point of a push) it dies, loses its connection, or waits while another process does something.
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from faults import Died, flush, ledger_counts, settle
from model_books import PARTITIONS, Event, Key, request, request_with_ids
from model_host import Machine, Shard, Writer, by_key, held_by
from mongo_stand_in import MemoryCopy, MemoryServer, push

from catchall.engine.partition import Partition
from catchall.engine.rules import partition_of
from catchall.storage.mongodb import MongoUnavailable


class Trouble(NamedTuple):
    """What happens before the `step`-th step of an action: "death", "no answer", or one of MEANWHILE."""

    what: str
    step: int


class World:
    def __init__(self, root: Path, seed: int, policy: str = "interval", hosts: int = 1, names_max: int = 1000) -> None:
        self.draw = random.Random(seed)  # for power cuts
        self.server, self.up, self.restores = MemoryServer(), True, 0
        self._snapshots = [self.server.snapshot()]
        self.machines = [Machine(root / f"host{number}", number, policy, names_max) for number in range(hosts)]
        self._depth = 0

    def _do(self, machine: Machine, process: Writer | Shard, trouble: Trouble | None, action: Callable[[], Any]) -> bool:
        """Let a process act, with trouble. False: it died."""
        steps = process.steps
        if trouble is not None and self._depth == 0:
            if trouble.what == "death":
                steps.dies_at = steps.taken + trouble.step
            else:
                steps.meanwhile(trouble.step - 1, lambda: self._meanwhile(machine, process, trouble))
        self._depth += 1
        try:
            action()
        except Died:
            machine.kill(process)
            return False
        finally:
            self._depth -= 1
            steps.in_peace()
        return True

    def _meanwhile(self, machine: Machine, process: Writer | Shard, trouble: Trouble) -> None:
        what, number = trouble.what, trouble.step % 2
        if what == "no answer":
            if self._pushing:
                raise MongoUnavailable("the connection was lost")
        elif what == "restore":
            self.restore(number)
        elif what == "outage":
            self.outage()
        elif isinstance(process, Writer):
            if what == "resend":
                self.resend(machine, next(n for n in range(3) if machine.writers.get(n) is not process), -1)
            elif what == "kill other":
                self.kill_shard(machine, 0)
            elif what in ("flush", "append"):
                for p in range(PARTITIONS):
                    self.look(machine, p, 1 << 20)
                    self.flush(machine, p)
            else:
                machine.check_read(number)
        elif what == "append":
            self.append(machine, number, [(number, "+", 1), (1 - number, "+", 1), (3, "-", 2)])
        elif what == "resend":
            self.resend(machine, number, -1)
        elif what == "close":  # with a last request
            self.append(machine, number, [(number, "+", 1)])
            self.close(machine, number)
        elif what == "kill other":
            self.kill_writer(machine, number)
        elif self._looping:
            return  # the loop of that shard is busy: it takes no other action meanwhile
        elif what == "read":
            for p in process.partitions:
                machine.check_read(p)
        elif what == "flush":
            for p, partition in process.partitions.items():
                if partition.flight is None and not partition.ledger._transaction.locked():
                    machine.look(process, p, 1 << 20)
                    if partition.due:
                        flush(partition)

    _looping = _pushing = False
    MEANWHILE = ("append", "resend", "close", "kill other", "read", "flush", "restore", "outage", "no answer")

    # ---- writers

    def _writer(self, machine: Machine, number: int) -> Writer:
        if number not in machine.writers:
            machine.writers[number] = Writer(machine)
        return machine.writers[number]

    def append(self, machine: Machine, number: int, events: list[Event], trouble: Trouble | None = None) -> None:
        writer = self._writer(machine, number)
        self._do(machine, writer, trouble, lambda: machine.send(writer, request(events)))

    def send_with_ids(
        self, machine: Machine, number: int, events: list[Event], key: int | None, trouble: Trouble | None = None
    ) -> None:
        machine.requests.append(request_with_ids(events, len(machine.requests), key))
        self.resend(machine, number, -1, trouble)

    def resend(self, machine: Machine, number: int, which: int, trouble: Trouble | None = None) -> None:
        """Any request with ids, however it ended before and whoever had it."""
        if not machine.requests:
            return
        again = machine.requests[which % len(machine.requests)]
        busy = again.claim is not None and self._looping  # a shard whose loop is busy does not answer
        if machine.let_go.isdisjoint(again.hashes) and not busy:
            writer = self._writer(machine, number)
            self._do(machine, writer, trouble, lambda: machine.send(writer, again))

    def sync(self, machine: Machine, number: int, fails: bool = False, trouble: Trouble | None = None) -> None:
        """The periodic sync, or under `always` the group's."""
        writer = self._writer(machine, number)
        writer.steps.broken = fails
        self._do(machine, writer, trouble, lambda: machine.commit_group(writer) if writer.staged else machine.sync(writer))
        writer.steps.broken = False

    def second(self, machine: Machine, number: int, hours: int) -> None:
        """A second begins; or the clock is set, back or forth."""
        machine.now += 3600 * hours or 1
        for queue in self._writer(machine, number).queues:
            if not queue.staged:
                queue.start_second()

    def close(self, machine: Machine, number: int, trouble: Trouble | None = None) -> None:
        writer = machine.writers.get(number)
        if writer is not None:
            if writer.staged:
                self._do(machine, writer, None, lambda: machine.commit_group(writer))
            self._do(machine, writer, trouble, lambda: machine.close(number))

    def kill_writer(self, machine: Machine, number: int) -> None:
        if number in machine.writers:
            machine.kill(machine.writers[number])

    def disk_full(self, machine: Machine) -> None:
        for process in [*machine.writers.values(), *machine.shards]:
            process.steps.full = not process.steps.full

    # ---- owners

    def start(self, machine: Machine, number: int, trouble: Trouble | None = None) -> None:
        shard = Shard(number % machine.shard_count)
        machine.shards.append(shard)
        self._loop(machine, shard, trouble, lambda: machine.start(shard))

    def _loop(self, machine: Machine, shard: Shard, trouble: Trouble | None, action: Callable[[], Any]) -> None:
        before, self._looping = self._looping, True
        try:
            self._do(machine, shard, trouble, action)
        finally:
            self._looping = before

    def look(self, machine: Machine, p: int, bytes_max: int, trouble: Trouble | None = None) -> None:
        if (shard := machine.owner(p)) is not None:
            self._loop(machine, shard, trouble, lambda: machine.look(shard, p, bytes_max))

    def cut(self, machine: Machine, p: int) -> None:
        if (shard := machine.owner(p)) is not None and shard.partitions[p].due:
            shard.partitions[p].begin_flush()

    def run(self, machine: Machine, p: int, trouble: Trouble | None = None) -> None:
        """What is left of a flush that was cut: the part in the flush thread, and its end."""
        shard = machine.owner(p)
        if shard is None or (flight := shard.partitions[p].flight) is None:
            return
        partition = shard.partitions[p]
        if self._do(machine, shard, trouble, lambda: flight.run(partition.ledger, partition.cache, partition.reader)):
            partition.end_flush(flight)

    def flush(self, machine: Machine, p: int, trouble: Trouble | None = None) -> None:
        self.cut(machine, p)
        self.run(machine, p, trouble)

    def push(self, machine: Machine, p: int, trouble: Trouble | None = None) -> None:
        shard = machine.owner(p)
        if shard is None:
            return
        partition, restores = shard.partitions[p], self.restores

        def at(_: str) -> None:
            if not self.up:
                raise MongoUnavailable("away")
            shard.steps.step()

        def once() -> None:
            try:
                _, held = push(partition, MemoryCopy(self.server, at), p in shard.from_zero)
            except MongoUnavailable:
                return
            (shard.from_zero.discard if held else shard.from_zero.add)(p)
            if held and restores == self.restores:
                self.check_copy(partition, partition.ledger.meta.flush == partition.ledger.meta.pushed)

        self._pushing = True
        self._do(machine, shard, trouble, once)
        self._pushing = False

    def check_copy(self, partition: Partition, equal: bool) -> None:
        component = partition.ledger.meta.component
        for name, counts in ledger_counts(partition).items():
            document = self.server.documents.get(name, {})
            copied = tuple(document.get(field, {}).get(component, 0) for field in ("delivered", "bounced"))
            assert copied == counts or (not equal and copied <= counts), f"MongoDB has {copied}, the ledger {counts} of {name}"

    def stop(self, machine: Machine, number: int) -> None:
        """SIGSTOP or SIGCONT."""
        for shard in machine.shards:
            if shard.number == number:
                shard.stopped = not shard.stopped

    def kill_shard(self, machine: Machine, number: int) -> None:
        for shard in [s for s in machine.shards if s.number == number]:
            machine.kill(shard)

    def restart(self, machine: Machine, shard_count: int) -> None:
        """With another number of shards. Stopped ones cannot be ended, and keep what they own."""
        for shard in [s for s in machine.shards if not s.stopped]:
            machine.kill(shard)
        machine.shard_count = shard_count

    # ---- MongoDB and power

    def outage(self) -> None:
        self.up = not self.up

    def snapshot(self) -> None:
        self._snapshots.append(self.server.snapshot())

    def restore(self, which: int) -> None:
        self.server.restore(self._snapshots[which % len(self._snapshots)])
        self.restores += 1

    def cut_power(self, machine: Machine) -> None:
        """Everything since the last sync may be gone; what is there is counted, and never less than the policy promises."""
        machine.kill_all()
        for power in machine.power:
            power.cut(self.draw)
        machine.boots += 1
        self.settle(machine, machine.books.synced.counts | machine.books.kept, cut=True)
        counted: Counter[Key] = Counter()
        held: dict[bytes, bytes | None] = {}
        for shard in machine.shards:
            for p, partition in shard.partitions.items():
                counted |= machine.counted(p, partition)
                held |= held_by(partition)
                self.check_copy(partition, equal=False)
                assert partition.reader.corrupt_files == 0 or machine.policy == "never", "a power cut is no damage"
        machine.books.begin_anew(counted, held, machine.policy == "always")

    # ---- quiescence

    def settle(self, machine: Machine, least: Counter[Key] | None = None, cut: bool = False) -> None:
        """Every partition is owned, and everything published is flushed."""
        for process in [*machine.writers.values(), *machine.shards]:
            process.steps.full = False
        for shard in [shard for shard in machine.shards if shard.stopped]:
            machine.kill(shard)
        for number in range(machine.shard_count):
            self.start(machine, number)
        for p in range(PARTITIONS):
            shard = machine.owner(p)
            assert shard is not None, "no lock is left"
            self.run(machine, p)
            settle(shard.partitions[p])
            machine.check_ledger(p, shard.partitions[p], machine.books.acknowledged.counts if least is None else least, cut)

    def finish(self) -> None:
        """Everything ends or dies, and begins again: the books balance everywhere, and nothing is left over."""
        self.up = True
        total: Counter[Key] = Counter()
        for machine in self.machines:
            refused = self.resend_all(machine)
            for number in list(machine.writers):
                (self.close if self.draw.random() < 0.5 else self.kill_writer)(machine, number)
            if killed := self.draw.random() < 0.5:
                machine.kill_all()
            self.settle(machine)
            for p in range(PARTITIONS):
                shard = machine.owner(p)
                assert shard is not None
                partition = shard.partitions[p]
                machine.check_read(p)
                for _ in range(2):
                    self.push(machine, p)
                assert partition.ledger.meta.pushed == partition.ledger.meta.flush
                self.check_copy(partition, equal=True)
                total += by_key(ledger_counts(partition))
                assert not partition.ledger.positions(), "at rest there is no row of a segment"
            self.check_once(machine, refused)
            left = {path.suffix for path in machine.host.root.rglob("q/*")} - {".corrupt"}
            assert left <= (set() if killed else {".tmp"}), "at rest there is no segment"
        over = set().union(*(machine.components_over for machine in self.machines))
        copied: Counter[Key] = Counter()
        for name, document in self.server.documents.items():
            p = partition_of(name.encode(), PARTITIONS)
            for field, sign in (("delivered", "+"), ("bounced", "-")):
                copied[name, sign] += sum(n for component, n in document.get(field, {}).items() if (component, p) not in over)
        assert +copied == total, "MongoDB has the sum of all hosts, but for ledgers that are over"

    def resend_all(self, machine: Machine) -> set[int]:
        """Send all requests with ids until they are answered. Returns those whose key stands for another request."""
        self.settle(machine)
        refused = set()
        for which, again in enumerate(machine.requests):
            writer = self._writer(machine, self.draw.randrange(2))
            assert not writer.staged or machine.commit_group(writer)
            if machine.let_go.isdisjoint(again.hashes) and not machine.send(writer, again):
                assert again.claim is not None, "there is room, and nobody dies"
                key, digest = again.claim.held
                assert machine.books.keys[key] != digest, "only a key that stands for another request is refused"
                refused.add(which)
            assert not writer.staged or machine.commit_group(writer)
        return refused

    def check_once(self, machine: Machine, refused: set[int]) -> None:
        """Everything with an id was acknowledged at last: so it is counted once, and what was refused is not counted."""
        books, excused = machine.books, set[bytes]()
        untorn = machine.boots == 1 or machine.policy == "always"  # else a power cut may have taken a key and left its events
        for which, again in enumerate(machine.requests):
            if which not in refused and machine.let_go.isdisjoint(again.hashes):
                assert again.events <= books.acknowledged.ids.keys(), "what was answered in the end is in the books"
            elif which not in refused or not untorn or not books.changed.isdisjoint(again.hashes):
                excused |= again.events
        assert books.sent.ids.keys() - books.acknowledged.ids.keys() <= excused, "the bounds of what is counted have met"

    def bury(self) -> None:
        for machine in self.machines:
            with suppress(OSError):
                machine.kill_all()
