"""Hosts whose processes are driven step by step, and the books of what they were sent: the world of test_model.py.

The modules are the real ones: EventQueue, Partition, Flush, push. MongoDB is the stand-in, power cuts are those of power.py.

    Machine    one host: its data folder, writers, shard processes, and Books
    World      machines that share one MongoDB. Its methods are what may happen; test_model.py draws them

Trouble      Each action of a process takes a Trouble: at its n-th step (a disk call, a load or store of a segment's words, a
             statement, a point of a push) it dies, loses its connection, or waits while another process does something.
Books        For every name: acknowledged <= counted <= sent, for reads, ledgers, tallies and MongoDB. `sent` is what was
             acknowledged and what is ambiguous: its writer died, or its sync failed, before the answer.
             No power cut may take what was `synced` or, the highest count that was committed, what was `kept`; `seen` is
             the highest that a read returned.
Events with ids belong into `Machine.lines_of` and, as a set of ids for each key beside its counts, into Books.
"""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from faults import (
    NOW,
    Died,
    Host,
    Steps,
    flush,
    leave_for_dead,
    ledger_counts,
    loads_are_steps,
    make_mortal,
    settle,
)
from mongo_stand_in import MemoryCopy, MemoryServer
from power import Power

from catchall.engine.data_folder import queue_folder
from catchall.engine.disk import DISK
from catchall.engine.event_queue import EventQueue, OpenSegment
from catchall.engine.partition import Partition, lock_partition
from catchall.engine.push import push
from catchall.engine.rules import partition_of, shard_of, status
from catchall.storage.counts import unpack
from catchall.storage.ledger import Tallies
from catchall.storage.mongodb import MongoUnavailable

PARTITIONS = 2
THRESHOLD = 10
NAMES = [f"n{i}.example" for i in range(6)]
NAMES_OF = [[name for name in NAMES if partition_of(name.encode(), PARTITIONS) == p] for p in range(PARTITIONS)]

Event = tuple[int, str, int]  # which name, "+" or "-", count
Key = tuple[str, str]  # name, "+" or "-"


class Trouble(NamedTuple):
    """What happens before the `step`-th step of an action: "death", "no answer", or one of MEANWHILE."""

    what: str
    step: int


class Books:
    def __init__(self) -> None:
        self.acknowledged: Counter[Key] = Counter()
        self.sent: Counter[Key] = Counter()
        self.synced: Counter[Key] = Counter()
        self.kept: Counter[Key] = Counter()
        self.seen: Counter[Key] = Counter()

    def check(self, counted: Counter[Key], least: Counter[Key], who: str, names: list[str] = NAMES) -> None:
        for key in ((name, sign) for name in names for sign in "+-"):
            told = f"{who}: {least[key]} <= {counted[key]} <= {self.sent[key]} of {key}"
            assert least[key] <= counted[key] <= self.sent[key], told

    def begin_anew(self, counted: Counter[Key]) -> None:
        """After a power cut: what it took is gone for good, and what it left stays."""
        for book in (self.acknowledged, self.sent, self.synced, self.kept, self.seen):
            book.clear()
            book.update(counted)


def by_key(counts: dict[str, tuple[int, int]]) -> Counter[Key]:
    return Counter({(name, sign): n for name, pair in counts.items() for sign, n in zip("+-", pair, strict=True) if n})


def recount(counted: Counter[Key], names: list[str]) -> Tallies:
    found = Counter(status(counted[n, "+"], counted[n, "-"], THRESHOLD) for n in names if counted[n, "+"] or counted[n, "-"])
    return Tallies(found["catch-all"], found["not-catch-all"], found["unknown"])


class Writer:
    """An HTTP worker: a queue for each partition."""

    def __init__(self, machine: "Machine") -> None:
        self.steps = Steps()
        self.held: list[OpenSegment] = []
        self.unsynced: list[Counter[Key]] = [Counter() for _ in range(PARTITIONS)]  # acknowledged, and nothing says it is safe
        self.staged: list[dict[int, Counter[Key]]] = []  # requests, by partition
        self.queues = [self._queue(machine, partition) for partition in range(PARTITIONS)]

    def _queue(self, machine: "Machine", partition: int) -> EventQueue:
        writer = self

        class Queue(EventQueue):
            def make(self, size: int = 0) -> OpenSegment:
                made = super().make(size)
                make_mortal(made, writer.steps)
                writer.held.append(made)
                return made

        def make_next(queue: EventQueue) -> None:
            with suppress(OSError):
                queue.install(queue.make())

        return Queue(
            str(queue_folder(machine.host.root, partition)),
            partition=partition,
            segment_size=8192,
            boot_id=machine.boot,
            host_id=bytes.fromhex(machine.host.host_id),
            durable=machine.policy != "never",
            disk=machine.power[partition].disk(self.steps),
            now_s=lambda: machine.now,
            wants_next=make_next,
        )

    def bury(self) -> None:
        for segment in self.held:
            if not segment.map.closed:
                segment.close()


class Shard:
    """A shard process and the partitions it owns."""

    def __init__(self, number: int) -> None:
        self.number, self.steps, self.stopped = number, Steps(), False
        self.partitions: dict[int, Partition] = {}
        self.from_zero: set[int] = set()

    def bury(self) -> None:
        for partition in self.partitions.values():
            leave_for_dead(partition)


class Machine:
    def __init__(self, root: Path, number: int, policy: str, names_max: int) -> None:
        self.host = Host(root, PARTITIONS, host_id=f"{number + 10:02x}" * 16)
        self.policy, self.names_max = policy, names_max
        self.now, self.boots, self.shard_count = NOW, 1, 1
        self.power = [Power(root / f"{p:02d}") for p in range(PARTITIONS)]
        self.writers: dict[int, Writer] = {}
        self.shards: list[Shard] = []
        self.books = Books()

    @property
    def boot(self) -> bytes:
        return self.boots.to_bytes(16, "little")

    def owner(self, partition: int) -> Shard | None:
        """The process that owns it, if it runs."""
        return next((s for s in self.shards if partition in s.partitions and not s.stopped), None)

    # ---- writers

    @staticmethod
    def lines_of(events: list[Event]) -> tuple[dict[int, bytes], dict[int, Counter[Key]]]:
        """One request: (lines, what they count), by partition."""
        blobs: dict[int, bytes] = {}
        counts: dict[int, Counter[Key]] = {}
        for which, sign, count in events:
            name = NAMES[which]
            partition = partition_of(name.encode(), PARTITIONS)
            line = f"{sign}{name}\n" if count == 1 else f"{sign}{name} {count}\n"
            repeats = 30 if which % 2 else 1  # some requests fill segments
            blobs[partition] = blobs.get(partition, b"") + line.encode() * repeats
            counts.setdefault(partition, Counter())[name, sign] += count * repeats
        return blobs, counts

    def append(self, writer: Writer, events: list[Event]) -> None:
        blobs, counts = self.lines_of(events)
        always = self.policy == "always"
        if always and writer.staged:
            if not all(writer.queues[p].room_now(len(lines)) for p, lines in blobs.items()):
                return
        else:
            for p, lines in blobs.items():
                if not writer.queues[p].room(len(lines)):
                    try:
                        writer.queues[p].install(writer.queues[p].make(len(lines)))
                    except OSError:
                        return  # refused: nothing was touched
        for part in counts.values():
            self.books.sent += part
        for p, lines in blobs.items():
            assert (writer.queues[p].stage if always else writer.queues[p].append)(lines), "there was room"
        if always:
            writer.staged.append(counts)
            return
        for p, part in counts.items():
            self.books.acknowledged += part
            writer.unsynced[p] += part

    def commit_group(self, writer: Writer) -> None:
        """Policy `always`: sync what was staged, publish it, acknowledge it."""
        group, writer.staged = writer.staged, []
        failed = set()
        for p in sorted({p for counts in group for p in counts}):
            try:
                writer.queues[p].sync_staged()
                writer.queues[p].publish()
            except OSError:
                failed.add(p)
                writer.queues[p].abandon()
        for counts in group:
            if failed.isdisjoint(counts):
                for part in counts.values():
                    self.books.acknowledged += part
                    self.books.synced += part

    def sync(self, writer: Writer) -> None:
        for p, queue in enumerate(writer.queues):
            try:
                queue.tidy()
                if self.policy == "interval":
                    queue.sync()
                    self.books.synced += writer.unsynced[p]
            except OSError:
                if self.policy == "interval":
                    queue.abandon()
            writer.unsynced[p].clear()  # what a failed sync left unproven stays so

    def close(self, number: int) -> None:
        """A writer's clean end."""
        writer = self.writers[number]
        for p, queue in enumerate(writer.queues):
            with suppress(OSError):
                queue.close()
                if self.policy == "interval":
                    self.books.synced += writer.unsynced[p]
        del self.writers[number]

    # ---- owners

    def start(self, shard: Shard) -> None:
        """Take the partitions that are this shard's, but for those that a former owner still holds, stopped or not."""
        for p in range(PARTITIONS):
            if shard_of(p, self.shard_count) != shard.number:
                continue
            if any(p in other.partitions for other in self.shards):
                assert lock_partition(self.host.root, p, DISK) is None, "a partition has one owner, stopped ones included"
                continue
            self.power[p].before_opening()
            partition = self.host.own(
                p,
                disk=self.power[p].disk(shard.steps),
                boot=self.boot,
                threshold=THRESHOLD,
                cache_names=4,
                pending_names_max=self.names_max,
                keep_rows=True,
            )
            shard.steps.statements_of(partition.ledger)
            self.power[p].opened(partition.ledger)
            shard.partitions[p] = partition

    def kill(self, process: Writer | Shard) -> None:
        process.steps.in_peace()
        process.bury()
        if isinstance(process, Shard):
            self.shards.remove(process)
        else:
            self.writers = {n: writer for n, writer in self.writers.items() if writer is not process}

    def kill_all(self) -> None:
        for process in [*self.shards, *self.writers.values()]:
            self.kill(process)

    def look(self, shard: Shard, p: int, bytes_max: int) -> None:
        partition = shard.partitions[p]
        partition.reader.discover()
        partition.reader.check_writers()
        loads_are_steps(partition.reader, shard.steps)
        partition.drain(bytes_max)

    def check_read(self, p: int) -> None:
        """A read of all names of a partition, and of its statistics."""
        shard = self.owner(p)
        if shard is None:
            return
        partition, books = shard.partitions[p], self.books
        least = books.acknowledged | books.seen
        while not partition.catch_up():
            if partition.flight is not None:
                return  # it waits for the flush under way
            if flush(partition).full is not None:
                return
        read: dict[str, tuple[int, int]] = {}
        for name in NAMES_OF[p]:
            packed = partition.known(name, name.encode())
            read[name] = unpack(partition.load({name: name.encode()})[name] if packed is None else packed)
        counted = by_key(read)
        books.check(counted, least, "read", NAMES_OF[p])
        books.seen |= counted
        if self.policy == "always":
            books.kept |= counted
        tallies = partition.tallies(5000, 1)
        if tallies is not None and tallies[1] == 1:  # as of now
            assert tallies[0] == recount(counted, NAMES_OF[p]), "statistics"

    def check_ledger(self, p: int, partition: Partition, least: Counter[Key]) -> None:
        """Everything was flushed."""
        rows = ledger_counts(partition)
        self.books.check(by_key(rows), least, "ledger", NAMES_OF[p])
        assert partition.ledger.meta.tallies == recount(by_key(rows), NAMES_OF[p]), "tallies"
        self.books.kept |= by_key(rows)
        for piece in partition.ledger.scan(0):
            for _, _, _, *times in piece:
                assert all(at == 0 or abs(at - NOW) < 10_000_000 for at in times), "a time that no clock showed"


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
            if what == "kill other":
                self.kill_shard(machine, 0)
            elif what in ("flush", "append"):
                for p in range(PARTITIONS):
                    self.look(machine, p, 1 << 20)
                    self.flush(machine, p)
            else:
                machine.check_read(number)
        elif what == "append":
            self.append(machine, number, [(number, "+", 1), (1 - number, "+", 1), (3, "-", 2)])
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
    MEANWHILE = ("append", "close", "kill other", "read", "flush", "restore", "outage", "no answer")

    # ---- writers

    def _writer(self, machine: Machine, number: int) -> Writer:
        if number not in machine.writers:
            machine.writers[number] = Writer(machine)
        return machine.writers[number]

    def append(self, machine: Machine, number: int, events: list[Event], trouble: Trouble | None = None) -> None:
        writer = self._writer(machine, number)
        self._do(machine, writer, trouble, lambda: machine.append(writer, events))

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
                _, held = push(partition, MemoryCopy(self.server, at), p in shard.from_zero)  # type: ignore[arg-type]
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
        self.settle(machine, machine.books.synced | machine.books.kept)
        counted: Counter[Key] = Counter()
        for shard in machine.shards:
            for partition in shard.partitions.values():
                counted |= by_key(ledger_counts(partition))
                self.check_copy(partition, equal=False)
                assert partition.reader.corrupt_files == 0 or machine.policy == "never", "a power cut is no damage"
        machine.books.begin_anew(counted)
        for process in machine.writers.values():
            process.unsynced = [Counter() for _ in range(PARTITIONS)]

    # ---- quiescence

    def settle(self, machine: Machine, least: Counter[Key] | None = None) -> None:
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
            machine.check_ledger(p, shard.partitions[p], machine.books.acknowledged if least is None else least)

    def finish(self) -> None:
        """Everything ends or dies, and begins again: the books balance everywhere, and nothing is left over."""
        self.up = True
        total: Counter[Key] = Counter()
        for machine in self.machines:
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
            left = {path.suffix for path in machine.host.root.rglob("q/*")} - {".corrupt"}
            assert left <= (set() if killed else {".tmp"}), "at rest there is no segment"
        copied = MemoryCopy(self.server).others(NAMES, lambda _: "none")
        assert by_key(copied) == total, "MongoDB has the sum of all hosts"

    def bury(self) -> None:
        for machine in self.machines:
            with suppress(OSError):
                machine.kill_all()
