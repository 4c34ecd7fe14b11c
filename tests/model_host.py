"""One host of the model: its data folder, its writers and shard processes, and the books of what it was sent.

The modules are the real ones: EventQueue, Partition, Flush. Power cuts are those of power.py; model.py puts hosts together.

Books        For every name: acknowledged <= counted <= sent, for reads, ledgers and tallies. `sent` is what was acknowledged
             and what is ambiguous: its writer died, or its sync failed, before the answer. No power cut may take what was
             `synced` or, the highest count that was committed, what was `kept`; `seen` is the highest that a read returned.
Events with ids belong into `Machine.lines_of` and, as a set of ids for each key beside its counts, into Books.
"""

from collections import Counter
from contextlib import suppress
from pathlib import Path

from faults import NOW, Host, Steps, flush, leave_for_dead, ledger_counts, loads_are_steps, make_mortal
from power import Power

from catchall.engine.data_folder import queue_folder
from catchall.engine.disk import DISK
from catchall.engine.event_queue import EventQueue, OpenSegment
from catchall.engine.partition import Partition, lock_partition
from catchall.engine.rules import partition_of, shard_of, status
from catchall.storage.counts import unpack
from catchall.storage.ledger_rows import Tallies

PARTITIONS = 2
THRESHOLD = 10
NAMES = [f"n{i}.example" for i in range(6)]
NAMES_OF = [[name for name in NAMES if partition_of(name.encode(), PARTITIONS) == p] for p in range(PARTITIONS)]

Event = tuple[int, str, int]  # which name, "+" or "-", count
Key = tuple[str, str]  # name, "+" or "-"


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
