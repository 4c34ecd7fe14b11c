"""Keeps MongoDB's copy of a shard's ledgers up to date. One thread a shard; one push at a time for a partition.

    1 claim    write a fresh claim into the fence and read its `flush`. Behind our `pushed`: MongoDB was restored or rolled
               back, so begin from 0. Ahead of our ledger: this ledger is an older one; it is superseded, the shard starts anew.
               Found a claim of another process since our last one: it is lost, as in 3
    2 send     every row with flush > from, as of a COMMIT that has returned: the last flushes from memory, else a scan
    3 advance  move the fence to T if the claim is still ours; else begin from 0 at the next push. One lost claim may be a late
               write of our own predecessor; the second in a row is another process with a copy of this data folder: superseded
    4 pushed   store T in the ledger

Check       At the start and every stats_interval all fences are read in one query: a MongoDB that was emptied or restored from
            a backup is filled again although no event comes in.
Outage      Every step can be repeated, so any failure means: try again later, with back-off. Nothing waits for a push, and
            nothing is kept for it but the rows of RecentRows, which are bounded; what is older is read from the ledger.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from catchall.engine import metric_names
from catchall.engine.logs import BadState
from catchall.engine.metrics_page import Slot
from catchall.engine.partition import Partition
from catchall.engine.settings import MongoDB
from catchall.storage.backoff import backoff
from catchall.storage.ledger_failures import LedgerDamaged, LedgerFull
from catchall.storage.mongodb import BadMongoURI, MongoCopy, MongoError, MongoOptions, MongoRefused
from catchall.storage.mongodb_stats import StoredStats

log = logging.getLogger("catchall.push")

LOST_CLAIMS_MAX = 1  # in a row; one more, and the folder is in use elsewhere
HOST_CHARS = 32  # of a component: the id of its host

MONGODB_UP = metric_names.cell("catchall_mongodb_up")
PUSHED_ROWS = metric_names.cell("catchall_mongodb_pushed_rows_total")
PUSH_FAILURES = metric_names.cell("catchall_mongodb_push_failures_total")
LAG_FLUSHES = metric_names.cell("catchall_mongodb_lag_flushes")


class Superseded(Exception):
    """Another process is, or was, ahead of the ledger of `partition`: the data folder is a copy or an old backup."""

    def __init__(self, partition: int, message: str) -> None:
        super().__init__(message)
        self.partition = partition


def options_of(mongodb: MongoDB) -> MongoOptions:
    return MongoOptions(
        uri=mongodb.uri,
        database=mongodb.database,
        collection=mongodb.collection,
        connect_timeout=mongodb.connect_timeout,
        server_selection_timeout=mongodb.server_selection_timeout,
        socket_timeout=mongodb.socket_timeout,
        pool_size=mongodb.pool_size,
        batch_rows=mongodb.batch_rows,
    )


def push(partition: Partition, copy: MongoCopy, owner: str, claimed: set[int], from_zero: bool) -> tuple[int, bool]:
    """Steps 1 to 4 once. Returns (rows sent, whether the claim held). Raises MongoError, Superseded.

    owner    what all claims of this process begin with
    claimed  partitions whose fence held a claim of this process when it was last seen
    """
    ledger = partition.ledger
    component = ledger.meta.component
    claim = f"{owner}-{secrets.token_hex(4)}"
    target = ledger.meta.flush
    found = copy.claim(component, partition.number, claim)
    fence = found.flush or 0
    if fence > ledger.meta.flush:
        raise Superseded(partition.number, _ahead(partition, fence))
    restored = fence < ledger.meta.pushed
    taken = partition.number in claimed and not (found.claim or owner).startswith(owner)
    claimed.add(partition.number)
    if taken and not restored:
        return 0, False
    start = 0 if from_zero or restored else ledger.meta.pushed
    sent = 0
    recent = partition.recent.take(start) if partition.recent is not None else None
    if recent is not None:
        rows, new_names, target = recent
        copy.send(rows, component, new_names)
        sent = len(rows)
    else:
        for piece in ledger.scan(start):
            copy.send(piece, component, frozenset(row[0] for row in piece) if start == 0 and fence == 0 else frozenset())
            sent += len(piece)
    if not copy.advance(component, partition.number, claim, target):
        claimed.discard(partition.number)  # the next push would find the claim that this one has lost to
        return sent, False
    ledger.set_pushed(target)
    return sent, True


def _ahead(partition: Partition, fence: int) -> str:
    meta = partition.ledger.meta
    return f"partition {partition.number} is at flush {meta.flush}, and MongoDB at {fence} of {meta.component}"


def alone(host: str, fences: Iterable[tuple[str, int]]) -> bool:
    """Whether the ledgers of this host, all shards together, hold all that MongoDB holds, so that their tallies are the truth.

    fences  (component, partition) of every fence. Not alone is a host beside others, and one with a partition that has two
            components: its ledger was set aside once, and what MongoDB has of that one is in no ledger of this host.
    """
    components = Counter(partition for _, partition in fences)
    return all(component[:HOST_CHARS] == host for component, _ in fences) and all(n == 1 for n in components.values())


class Pusher(threading.Thread):
    """The push thread of one shard.

    first       whether this shard is the one that also keeps the view and the statistics of all hosts
    superseded  set when the shard must exit so that a ledger is set aside
    damaged     the same, for a ledger that turned out to be damaged
    shared      the statistics over all hosts, when this host is not alone; None before that is known
    """

    def __init__(self, partitions: Sequence[Partition], mongodb: MongoDB, *, threshold: int, slot: Slot, first: bool) -> None:
        super().__init__(name="push", daemon=True)
        self._partitions, self._mongodb, self._threshold, self._slot = partitions, mongodb, threshold, slot
        self._first = first
        self._wake = threading.Event()
        self._stopping = False
        self._view_made = False
        self._check_at = 0.0
        self._owner = secrets.token_hex(8)
        self._claimed: set[int] = set()
        self._from_zero: set[int] = set()
        self._lost_claims: Counter[int] = Counter()  # in a row, by partition
        self._away = BadState(log)
        self._contested = BadState(log)
        self.superseded: Superseded | None = None
        self.damaged: LedgerDamaged | None = None
        self.shared: StoredStats | None = None

    def stop(self, timeout_s: float) -> bool:
        """Push what is left, for at most `timeout_s`; what remains is pushed at the next start. While MongoDB is away nothing
        more is tried. False: the thread still uses the ledgers, so they must be left open."""
        self._stopping = True
        self._wake.set()
        self.join(timeout_s)
        return not self.is_alive()

    def run(self) -> None:
        copy: MongoCopy | None = None
        attempt = 0
        while not (self._stopping and self._away.lasts):
            last = self._stopping
            try:
                copy = copy or MongoCopy(options_of(self._mongodb))
                self._turn(copy, last)
            except Superseded as reason:
                self.superseded = reason
                break
            except LedgerDamaged as damage:
                self.damaged = damage
                break
            except Exception as error:  # a full disk, say: whatever it is, the copy must catch up afterwards
                if not isinstance(error, MongoError | LedgerFull | BadMongoURI):
                    log.exception("a push failed")
                self._slot.cells[PUSH_FAILURES] += 1
                self._slot.cells[MONGODB_UP] = 0
                self._away.enter(f"MongoDB does not take the copy; it lags, counting goes on: {error}", time.monotonic())
                pause = backoff(attempt, self._mongodb.backoff_min, self._mongodb.backoff_max, random.random())
                attempt += 1
            else:
                attempt = 0
                self._slot.cells[MONGODB_UP] = 1
                self._away.leave("MongoDB takes the copy again", time.monotonic())
                pause = self._mongodb.push_interval
            self._slot.cells[LAG_FLUSHES] = sum(p.ledger.meta.flush - p.ledger.meta.pushed for p in self._partitions)
            if last:
                break
            self._wake.wait(pause)
        if copy is not None:
            copy.close()

    def _turn(self, copy: MongoCopy, last: bool) -> None:
        if self._first and not self._view_made:
            self._make_view(copy)
            self._view_made = True
        check = time.monotonic() >= self._check_at and not last
        if check:
            self._compare(copy.fences(), copy)
        self._push_all(copy)
        if check:
            if self._first:
                self._keep_stats(copy)
            self._check_at = time.monotonic() + self._mongodb.stats_interval

    def _make_view(self, copy: MongoCopy) -> None:
        try:
            copy.ensure_view(self._threshold)
        except MongoRefused as error:
            log.warning("the view domain_status was not made: %s", error)

    def _compare(self, fences: dict[tuple[str, int], int], copy: MongoCopy) -> None:
        """Find what MongoDB has lost since it was pushed. A missing fence is made, so that shard 0 knows of all components."""
        for partition in self._partitions:
            meta = partition.ledger.meta
            fence = fences.get((meta.component, partition.number))
            if fence is None:
                fence = copy.claim(meta.component, partition.number, self._owner).flush or 0
            if fence > meta.flush:
                raise Superseded(partition.number, _ahead(partition, fence))
            if fence < meta.pushed:
                log.warning("MongoDB has partition %d up to flush %d only, and had it up to %d: it was restored or emptied; it "
                            "is filled again", partition.number, fence, meta.pushed)  # fmt: skip
                self._from_zero.add(partition.number)
                self._view_made = False

    def _push_all(self, copy: MongoCopy) -> None:
        refused: MongoRefused | None = None
        for partition in self._partitions:
            meta = partition.ledger.meta
            if meta.flush == meta.pushed and partition.number not in self._from_zero:
                continue
            try:
                self._push_one(partition, copy)
            except MongoRefused as error:  # one document that MongoDB will not take must not hold up the other partitions
                refused = error
        if refused is not None:
            raise refused
        if not self._lost_claims:
            self._contested.leave("no other process pushes partitions of this shard", time.monotonic())

    def _push_one(self, partition: Partition, copy: MongoCopy) -> None:
        number = partition.number
        sent, held = push(partition, copy, self._owner, self._claimed, number in self._from_zero)
        self._slot.cells[PUSHED_ROWS] += sent
        if held:
            self._from_zero.discard(number)
            self._lost_claims.pop(number, None)
        else:
            self._lose_claim(partition)

    def _lose_claim(self, partition: Partition) -> None:
        """Raises Superseded."""
        number, component = partition.number, partition.ledger.meta.component
        self._from_zero.add(number)
        self._lost_claims[number] += 1
        told = f"another process pushes partition {number} as {component}: is a copy of this data folder in use elsewhere?"
        if self._lost_claims[number] > LOST_CLAIMS_MAX:
            raise Superseded(number, told)
        self._contested.enter(told, time.monotonic())

    def _keep_stats(self, copy: MongoCopy) -> None:
        """With several hosts one of them, by a lease, counts the domains of all; every host serves the result."""
        host = self._partitions[0].ledger.meta.component[:HOST_CHARS]
        if alone(host, copy.fences()):
            self.shared = None
            return
        copy.refresh_stats(self._threshold, time.time(), host, 2 * self._mongodb.stats_interval)
        self.shared = copy.stored_stats(self._threshold)
