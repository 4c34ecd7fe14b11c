"""One host of the model: its data folder, its writers and shard processes, and the books of what it was sent.

The modules are the real ones: EventQueue, Partition, Flush. Power cuts are those of power.py; model.py puts hosts together.
The books are in model_books.py. Superseded ledgers are over, and what they counted stays: it is in `Machine.over`.
"""

from collections import Counter
from contextlib import suppress
from pathlib import Path

from faults import NOW, Host, Steps, flush, leave_for_dead, ledger_counts, loads_are_steps, make_mortal
from model_books import NAMES_OF, PARTITIONS, Books, Key, Line, Request
from power import Power

from catchall.engine.data_folder import queue_folder
from catchall.engine.disk import DISK
from catchall.engine.event_queue import EventQueue, OpenSegment
from catchall.engine.ids import forget_oldest
from catchall.engine.partition import Partition, lock_partition
from catchall.engine.rules import shard_of, status
from catchall.storage.counts import unpack
from catchall.storage.ledger_rows import Tallies

THRESHOLD = 10


def by_key(counts: dict[str, tuple[int, int]]) -> Counter[Key]:
    return Counter({(name, sign): n for name, pair in counts.items() for sign, n in zip("+-", pair, strict=True) if n})


def held_by(partition: Partition) -> dict[bytes, bytes | None]:
    """The ids that a partition holds, and of those that are keys the digests."""
    return {hash: digest for hash, (_, digest) in partition.ids._held.items()}


def recount(counted: Counter[Key], names: list[str]) -> Tallies:
    found = Counter(status(counted[n, "+"], counted[n, "-"], THRESHOLD) for n in names if counted[n, "+"] or counted[n, "-"])
    return Tallies(found["catch-all"], found["not-catch-all"], found["unknown"])


class Writer:
    """An HTTP worker: a queue for each partition."""

    def __init__(self, machine: "Machine") -> None:
        self.steps = Steps()
        self.held: list[OpenSegment] = []
        self.unsynced: list[list[Line]] = [[] for _ in range(PARTITIONS)]  # acknowledged, and nothing says it is safe
        self.staged: list[tuple[dict[int, bytes], dict[int, list[Line]]]] = []  # requests: their lines, and what they are
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
        self.over: list[Counter[Key]] = [Counter() for _ in range(PARTITIONS)]  # what superseded ledgers counted
        self.components_over: set[tuple[str, int]] = set()  # with the partition
        self.requests: list[Request] = []  # those with ids, whatever became of them
        self.let_go: set[bytes] = set()  # ids that were forgotten; what has one is not sent again

    @property
    def boot(self) -> bytes:
        return self.boots.to_bytes(16, "little")

    def owner(self, partition: int) -> Shard | None:
        """The process that owns it, if it runs."""
        return next((s for s in self.shards if partition in s.partitions and not s.stopped), None)

    # ---- writers

    def send(self, writer: Writer, request: Request) -> bool:
        """One request as the HTTP front handles it: first its key is claimed, if it has one. False: its events were refused."""
        claim = request.claim
        if claim is not None:
            key, digest = claim.held
            self.books.claim(key, digest)
            if not self._record(writer, {claim.partition: claim.line}, {}):
                return False
            if writer.staged and not self.commit_group(writer):
                return False
            told = self.digest_of(claim.partition, key)
            if told != digest:
                return False
        return self._record(writer, request.blobs, request.parts)

    def digest_of(self, p: int, key: bytes) -> bytes | None:
        """What a shard answers that is asked for a key; None if it cannot be asked now."""
        shard = self.owner(p)
        if shard is None or not self.caught_up(shard.partitions[p]):
            return None
        digest = shard.partitions[p].ids.digest_of(key)
        self.books.tell(key, digest)
        return digest

    def _record(self, writer: Writer, blobs: dict[int, bytes], parts: dict[int, list[Line]]) -> bool:
        always = self.policy == "always"
        if always and writer.staged:
            if not all(writer.queues[p].room_now(len(lines)) for p, lines in blobs.items()):
                return False
        else:
            for p, lines in blobs.items():
                if not writer.queues[p].room(len(lines)):
                    try:
                        writer.queues[p].install(writer.queues[p].make(len(lines)))
                    except OSError:
                        return False  # refused: nothing was touched
        for part in parts.values():
            self.books.sent.add(part)
        for p, lines in blobs.items():
            assert (writer.queues[p].stage if always else writer.queues[p].append)(lines), "there was room"
        if always:
            writer.staged.append((blobs, parts))
            return True
        for p, part in parts.items():
            self.books.acknowledged.add(part)
            writer.unsynced[p] += part
        return True

    def commit_group(self, writer: Writer) -> bool:
        """Policy `always`: sync what was staged, publish it, acknowledge it. False: not all of it."""
        group, writer.staged = writer.staged, []
        failed = set()
        for p in sorted({p for blobs, _ in group for p in blobs}):
            try:
                writer.queues[p].sync_staged()
                writer.queues[p].publish()
            except OSError:
                failed.add(p)
                writer.queues[p].abandon()
        for blobs, parts in group:
            if failed.isdisjoint(blobs):
                for part in parts.values():
                    self.books.acknowledged.add(part)
                    self.books.synced.add(part)
        return not failed

    def sync(self, writer: Writer) -> None:
        for p, queue in enumerate(writer.queues):
            try:
                queue.tidy()
                if self.policy == "interval":
                    queue.sync()
                    self.books.synced.add(writer.unsynced[p])
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
                    self.books.synced.add(writer.unsynced[p])
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
            for partition in process.partitions.values():
                new = [*partition.ids._new, *(partition.flight.ids.changes.new if partition.flight is not None else ())]
                self.books.loose.update(hash for hash, _, _ in new if hash in self.books.keys)
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

    @staticmethod
    def caught_up(partition: Partition) -> bool:
        """Have everything drained that is published. False: a read would have to wait."""
        while not partition.catch_up():
            if partition.flight is not None or flush(partition).full is not None:
                return False
        return True

    def check_read(self, p: int) -> None:
        """A read of all names of a partition, and of its statistics."""
        shard = self.owner(p)
        if shard is None:
            return
        partition, books = shard.partitions[p], self.books
        least = books.acknowledged.counts | books.seen
        if not self.caught_up(partition):
            return
        read: dict[str, tuple[int, int]] = {}
        for name in NAMES_OF[p]:
            packed = partition.known(name, name.encode())
            read[name] = unpack(partition.load({name: name.encode()})[name] if packed is None else packed)
        counted = by_key(read) + self.over[p]
        books.check(counted, least, "read", NAMES_OF[p])
        books.seen |= counted
        if self.policy == "always":
            books.kept |= counted
        tallies = partition.tallies(5000, 1)
        if tallies is not None and tallies[1] == 1:  # as of now
            assert tallies[0] == recount(by_key(read), NAMES_OF[p]), "statistics"

    def forget(self, p: int, number_max: int) -> None:
        """The window of ids is full. Only when no line is under way whose id could be one of those that go."""
        shard = self.owner(p)
        if shard is None or any(writer.staged for writer in self.writers.values()):
            return
        partition = shard.partitions[p]
        if self.caught_up(partition):
            before = set(partition.ids._held)
            forget_oldest([partition.ids], number_max)
            gone = before - partition.ids._held.keys()
            self.books.forgotten |= gone
            self.let_go |= gone

    def supersede(self, p: int) -> None:
        """MongoDB knows a later state of a ledger: its process ends, and the next one begins a new ledger in its place."""
        shard = self.owner(p)
        if shard is not None:
            partition = shard.partitions[p]
            self.over[p] += by_key(ledger_counts(partition))
            self.components_over.add((partition.ledger.meta.component, p))
            partition.supersede("a later state is known")
            self.kill(shard)

    def counted(self, p: int, partition: Partition) -> Counter[Key]:
        return by_key(ledger_counts(partition)) + self.over[p]

    def check_ledger(self, p: int, partition: Partition, least: Counter[Key], cut: bool = False) -> None:
        """Everything was flushed."""
        counted, books = self.counted(p, partition), self.books
        books.check(counted, least, "ledger", NAMES_OF[p])
        assert partition.ledger.meta.tallies == recount(by_key(ledger_counts(partition)), NAMES_OF[p]), "tallies"
        books.kept |= counted
        table, intact = partition.ledger.ids()
        assert intact, "the ids of a ledger do not match their check"
        held = held_by(partition)
        assert {hash: (age, digest) for hash, digest, age in table} == partition.ids._held, "ids in memory and in the ledger"
        assert len(table) == len(held)
        books.check_ids(held, counted, NAMES_OF[p], cut)
        if not cut:
            books.kept_ids |= held.keys()
        for piece in partition.ledger.scan(0):
            for _, _, _, *times in piece:
                assert all(at == 0 or abs(at - NOW) < 10_000_000 for at in times), "a time that no clock showed"
