"""Keeps MongoDB's copy of a shard's ledgers up to date. One thread a shard; one push at a time for a partition.

    1 claim    write a fresh claim into the fence and read its `flush`. Behind our `pushed`: MongoDB was restored or rolled
               back, so begin from 0. Ahead of our ledger: this ledger is an older one; it is superseded, the shard starts anew
    2 send     every row with flush > from, as of a COMMIT that has returned: the last flushes from memory, else a scan
    3 advance  move the fence to T if the claim is still ours; else begin from 0 at the next push
    4 pushed   store T in the ledger

Every step can be repeated, so any failure means: try again later, with back-off. Nothing waits for a push.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Sequence

from catchall.engine import metric_names
from catchall.engine.logs import BadState
from catchall.engine.metrics_page import Slot
from catchall.engine.partition import Partition
from catchall.engine.settings import MongoDB
from catchall.storage.backoff import backoff
from catchall.storage.ledger import LedgerDamaged, LedgerFull
from catchall.storage.mongodb import MongoCopy, MongoError, MongoOptions, MongoRefused
from catchall.storage.mongodb_stats import StoredStats

log = logging.getLogger("catchall.push")

MONGODB_UP = metric_names.cell("catchall_mongodb_up")
PUSHED_ROWS = metric_names.cell("catchall_mongodb_pushed_rows_total")
PUSH_FAILURES = metric_names.cell("catchall_mongodb_push_failures_total")
LAG_FLUSHES = metric_names.cell("catchall_mongodb_lag_flushes")


class Superseded(Exception):
    """MongoDB holds a later state of a ledger than the ledger itself: the folder is a copy or an old backup."""


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


def push(partition: Partition, copy: MongoCopy, from_zero: bool = False) -> tuple[int, bool]:
    """Steps 1 to 4 once. Returns (rows sent, whether the claim held). Raises MongoError, Superseded."""
    ledger = partition.ledger
    component = ledger.meta.component
    claim = secrets.token_hex(8)
    target = ledger.meta.flush
    fence = copy.claim(component, partition.number, claim) or 0
    if fence > ledger.meta.flush:
        raise Superseded(f"partition {partition.number} is at flush {ledger.meta.flush}, and MongoDB at {fence} of {component}")
    start = 0 if from_zero or fence < ledger.meta.pushed else ledger.meta.pushed
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
        return sent, False
    ledger.set_pushed(target)
    return sent, True


class Pusher(threading.Thread):
    """The push thread of one shard.

    first       whether this shard is the one that also keeps the view and the statistics of all hosts
    superseded  set, with the reason, when the shard must exit so that a ledger is set aside
    damaged     the same, for a ledger that turned out to be damaged
    shared      the statistics over all hosts, when there are other hosts
    alone       whether no other component than this host's was ever seen; False before that is known
    """

    def __init__(self, partitions: Sequence[Partition], mongodb: MongoDB, *, threshold: int, slot: Slot, first: bool) -> None:
        super().__init__(name="push", daemon=True)
        self._partitions, self._mongodb, self._threshold, self._slot = partitions, mongodb, threshold, slot
        self._first = first
        self._wake = threading.Event()
        self._stopping = False
        self._from_zero: set[int] = set()
        self._away = BadState(log)
        self._contested = BadState(log)
        self.superseded: str | None = None
        self.damaged: LedgerDamaged | None = None
        self.shared: StoredStats | None = None

    def stop(self, timeout_s: float) -> None:
        """Push what is left, for at most `timeout_s`. What remains is pushed at the next start."""
        self._stopping = True
        self._wake.set()
        self.join(timeout_s)

    def run(self) -> None:
        copy = MongoCopy(options_of(self._mongodb))
        attempt = 0
        view_made = False
        stats_at = 0.0
        last = False
        while not last:
            last = self._stopping
            try:
                if self._first and not view_made:
                    self._make_view(copy)
                    view_made = True
                self._push_all(copy)
                if self._first and time.monotonic() >= stats_at and not last:
                    self._keep_stats(copy)
                    stats_at = time.monotonic() + self._mongodb.stats_interval
            except Superseded as reason:
                self.superseded = str(reason)
                return
            except LedgerDamaged as damage:
                self.damaged = damage
                return
            except Exception as error:  # a full disk, say: whatever it is, the copy must catch up afterwards
                if not isinstance(error, MongoError | LedgerFull):
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
            if not last:
                self._wake.wait(pause)
        copy.close()

    def _make_view(self, copy: MongoCopy) -> None:
        try:
            copy.ensure_view(self._threshold)
        except MongoRefused as error:
            log.warning("the view domain_status was not made: %s", error)

    def _push_all(self, copy: MongoCopy) -> None:
        lag = 0
        for partition in self._partitions:
            meta = partition.ledger.meta
            if meta.flush == meta.pushed and partition.number not in self._from_zero:
                continue
            sent, held = push(partition, copy, partition.number in self._from_zero)
            self._slot.cells[PUSHED_ROWS] += sent
            if held:
                self._from_zero.discard(partition.number)
            else:
                self._from_zero.add(partition.number)
                self._contested.enter(
                    f"another process pushes partition {partition.number} as {meta.component}: is a copy of this data folder "
                    f"in use elsewhere?", time.monotonic(),
                )  # fmt: skip
            lag += meta.flush - meta.pushed
        self._slot.cells[LAG_FLUSHES] = lag

    def _keep_stats(self, copy: MongoCopy) -> None:
        """With several hosts one of them, by a lease, counts the domains of all; every host serves the result."""
        own = {partition.ledger.meta.component for partition in self._partitions}
        host = next(iter(own))[:32]
        if all(component[:32] == host for component in copy.components()):
            self.shared = None
            return
        lease = 2 * self._mongodb.stats_interval
        copy.refresh_stats(self._threshold, time.time(), host, lease)
        self.shared = copy.stored_stats(self._threshold)
