"""The shard process: owns the partitions p with p % shards == its number, counts their events and answers reads.

    python -m catchall.engine.shard RUN_FOLDER NUMBER PARENT_PID    started by the supervisor, stopped by SIGTERM

One flat loop over epoll. A turn: take what the sockets and threads brought, answer reads. A round, every 20 ms while events
come in and at least every 50 ms: drain a few slices, begin a flush if one is due and none is under way. Nobody but a read waits
for an event to be counted, a read drains for itself, and fewer, larger slices cost less.

Both ask the kernel first which folders got new names (folder_watch.py) and list those. Looking for published bytes in the
segments that are known is a few loads from memory.

SIGTERM     drain everything, flush it, push it (bounded), exit 0. The supervisor's death counts as SIGTERM.
Exit 1      after an error whose outcome is unknown: the next start recovers.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from catchall.engine import logs, metric_names
from catchall.engine.disk import DISK
from catchall.engine.flush import Flush
from catchall.engine.folder_watch import FolderWatch
from catchall.engine.full_disk import RETRY_S, FullDisk
from catchall.engine.ids import forget_oldest
from catchall.engine.metrics_page import DRAINING, READY
from catchall.engine.others import Others
from catchall.engine.partition import Partition, PartitionOptions, lock_partition
from catchall.engine.process import Runtime, die_with_parent, read_runtime
from catchall.engine.push import Pusher, Superseded, options_of
from catchall.engine.rules import shard_of
from catchall.engine.shard_gauges import Gauges
from catchall.engine.shard_reads import Reads
from catchall.engine.shard_sockets import Sockets
from catchall.storage.ledger_failures import LedgerDamaged, LedgerFull
from catchall.storage.ledger_rows import Tallies

log = logging.getLogger("catchall.shard")

TURN_BYTES = 256 << 10  # drained in one turn, before the sockets are looked at again
SLEEP_MIN_S, SLEEP_MAX_S, SLEEP_GROWTH = 0.02, 0.05, 1.5
READS_WAIT_S = 0.002
TICK_S = 1.0  # between two heartbeats, and two looks for dead writers and for room to refill the reserve
OPEN_RETRY_S = 0.1  # between two tries on a full disk while nothing else is to be done: at the start and at the stop
FULL_AT_STOP_S = 3.0  # how long a stop tries on a full disk; what is left is in the queues

COUNTED = metric_names.cell("catchall_events_counted_total", "delivered"), metric_names.cell(
    "catchall_events_counted_total", "bounced"
)
FLUSH_TIME = metric_names.Histogram("catchall_flush_duration_seconds")
FLUSH_ROWS = metric_names.cell("catchall_flush_rows_total")
FLUSH_FAILURES = metric_names.cell("catchall_flush_failures_total")
FLUSH_SUCCESS = metric_names.cell("catchall_flush_last_success_timestamp_seconds")
REPEATS = metric_names.cell("catchall_events_duplicate_total")
BAD_LINES = metric_names.cell("catchall_queue_bad_lines_total")


class Shard:
    def __init__(self, runtime: Runtime, number: int) -> None:
        self._runtime, self._number = runtime, number
        self._settings = runtime.settings
        self._slot = runtime.page.slot("shard", number)
        self._slot.take()
        self._stopping = False
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_r, select.EPOLLIN)
        self._watch = FolderWatch()
        self._full = FullDisk(runtime.root, self._settings)
        self._partitions = self._recover()
        self._gauges = Gauges(runtime, number, self._partitions)
        self._ids = [partition.ids for partition in self._partitions]
        forget_oldest(self._ids, self._settings.ids.max)  # a shard that took over others' may hold far too many
        self._scrubs = [partition.scrub for partition in self._partitions]
        self._by_number = {partition.number: partition for partition in self._partitions}
        self._sockets = Sockets(runtime.run_folder, number, self._epoll)
        mongodb = self._settings.storage.kind == "mongodb"
        self._others = self._make_others() if mongodb else None
        self._pusher = self._make_pusher() if mongodb else None
        patience = self._settings.server.write_timeout + 1.0  # a worker looks a moment later than that
        self._reads = Reads(self._by_number, runtime.manifest.partitions, self._others, self._shared_stats, patience)
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: tuple[Partition, Flush, Future[None]] | None = None
        self._next_flush = time.monotonic() + self._settings.storage.flush_interval
        self._due: list[Partition] = []
        self._ticked = self._gauged = 0.0
        self._sleep, self._next_round = SLEEP_MIN_S, 0.0
        self._turn = 0
        self._check_writers = True  # even queues in which nothing new is published are to be looked at once

    def _on_term(self, *_: object) -> None:
        self._stopping = True

    # ---- start

    def _recover(self) -> list[Partition]:
        """Take and open all partitions of this shard, waiting for former owners to be gone."""
        config, manifest = self._settings, self._runtime.manifest
        shards = config.shards.workers
        numbers = [p for p in range(manifest.partitions) if shard_of(p, shards) == self._number]
        memory = config.storage.kind == "memory"
        options = PartitionOptions(
            root=self._runtime.root,
            partitions=manifest.partitions,
            host_id=manifest.host_id,
            boot_id=self._runtime.boot_id,
            threshold=config.rules.threshold,
            synchronous="OFF" if memory else "FULL",
            ledger_cache=config.storage.ledger_cache // manifest.partitions,
            cache_names=config.cache.names // manifest.partitions if config.cache.enabled else 0,
            pending_names_max=max(1000, 2 * config.storage.flush_rows // len(numbers)),
            keep_rows=config.storage.kind == "mongodb",
            ids_window=config.ids.window,
            disk=DISK,
            watch=self._watch,
        )
        partitions = []
        waiting = logs.BadState(log)
        for number in numbers:
            while (lock := lock_partition(options.root, number, DISK)) is None:
                if self._stopping:
                    raise SystemExit(0)
                waiting.enter(f"partition {number} is still held by another process; waiting for it to end", time.monotonic())
                time.sleep(0.02)
            waiting.leave("the partition was given up by its former owner", time.monotonic())
            partitions.append(self._open(number, options, lock))
        return partitions

    def _open(self, number: int, options: PartitionOptions, lock: int) -> Partition:
        """Opening a ledger commits, so on a full disk it gives up the reserve, and then waits for room."""
        while not self._stopping:
            try:
                partition = Partition(number, options, lock)
            except LedgerFull as error:
                self._full.meet(error)
                time.sleep(OPEN_RETRY_S)
            else:
                self._full.leave()
                return partition
        raise SystemExit(0)

    def _make_others(self) -> Others:
        cache = self._settings.cache
        return Others(
            options_of(self._settings.mongodb),
            ttl_s=cache.ttl if cache.enabled else 0.0,
            names_max=cache.names // self._settings.shards.workers,
            answered=self._wake,
        )

    def _make_pusher(self) -> Pusher:
        pusher = Pusher(
            self._partitions,
            self._settings.mongodb,
            threshold=self._settings.rules.threshold,
            slot=self._slot,
            first=self._number == 0,
        )
        pusher.start()
        return pusher

    def _shared_stats(self) -> tuple[Tallies, int] | None:
        stored = self._pusher.shared if self._pusher is not None else None
        if stored is None:
            return None
        return Tallies(stored.catch_all, stored.not_catch_all, stored.unknown), stored.timestamp * 10**9

    def _wake(self) -> None:
        try:
            os.write(self._wake_w, b"\0")
        except BlockingIOError:
            pass  # full, so it will wake anyway

    # ---- the loop

    def run(self) -> None:
        try:
            self._slot.set_state(READY)
            while not self._stopping:
                self._one_turn()
            self._slot.set_state(DRAINING)
            self._finish()
        except LedgerDamaged as damage:
            self._condemn(damage)

    def _one_turn(self) -> None:
        pause = 0.0 if self._reads.again else READS_WAIT_S if self._reads.waiting else SLEEP_MAX_S
        for fd, event in self._epoll.poll(max(0.0, min(pause, self._next_round - time.monotonic()))):
            if fd == self._wake_r:
                self._drain_wake_pipe()
            else:
                self._sockets.handle(fd, event)
        now = time.monotonic()
        if self._flushing is not None and self._flushing[2].done():
            self._end_flush()
            self._next_round = now
        if requests := self._sockets.requests():
            self._reads.add(requests)
        if self._reads.waiting:
            self._watch.poll()
            self._reads.answer()
        self._sockets.send_all()
        if now >= self._next_round:
            self._next_round = now + self._round(now)

    def _round(self, now: float) -> float:
        """What is not urgent: drain some, begin a flush, set gauges. Returns the seconds until the next round."""
        self._watch.poll()
        for partition in self._partitions:
            partition.reader.discover()
        if took := self._drain_some():
            self._gauges.note_backlog()
        if self._flushing is None:
            self._begin_flush(now)
        if now - self._ticked >= TICK_S:
            self._ticked = now
            self._tick()
        if now - self._gauged >= self._settings.metrics.interval:
            self._gauged = now
            self._gauges.set()
        if took >= TURN_BYTES:
            return 0.0
        self._scrub_some()
        self._sleep = SLEEP_MIN_S if took else min(SLEEP_MAX_S, self._sleep * SLEEP_GROWTH)
        return self._sleep

    def _tick(self) -> None:
        self._slot.beat()
        self._check_writers = True
        self._full.refill()
        self._reads.degraded = self._gauges.note_damage()
        if self._pusher is not None and self._pusher.superseded is not None:
            self._supersede(self._pusher.superseded)
        if self._pusher is not None and self._pusher.damaged is not None:
            raise self._pusher.damaged

    def _drain_wake_pipe(self) -> None:
        try:
            while os.read(self._wake_r, 4096):
                pass
        except BlockingIOError:
            pass

    def _drain_some(self) -> int:
        """Drain up to TURN_BYTES, beginning with another partition each time."""
        took = 0
        self._turn += 1
        count = len(self._partitions)
        for i in range(count):
            partition = self._partitions[(i + self._turn) % count]
            if self._check_writers or partition.reader.unread():
                took += partition.drain(TURN_BYTES - took)
                if took >= TURN_BYTES:
                    return took
        self._check_writers = False
        return took

    def _scrub_some(self) -> None:
        """One piece of one ledger, until all of them were read once since the start."""
        while self._scrubs and not self._scrubs[0].step():
            self._scrubs.pop(0)
            if not self._scrubs:
                log.info("all rows of this shard's ledgers were checked")
        if self._scrubs:
            self._scrubs.append(self._scrubs.pop(0))

    # ---- flush

    def _begin_flush(self, now: float) -> None:
        """Submit the next partition that is due: all of them each flush_interval, sooner when many names are pending."""
        if now < self._full.retry_at:
            return
        if not self._due:
            early = now < self._next_flush
            full = [partition for partition in self._partitions if partition.full and partition.due]
            names = sum(partition.pending.names for partition in self._partitions)
            if early and not full and names < self._settings.storage.flush_rows:
                return
            forget_oldest(self._ids, self._settings.ids.max)
            self._due = [partition for partition in self._partitions if partition.due and not partition.full] + full
            self._next_flush = now + self._settings.storage.flush_interval
            if not self._due:
                self._slot.cells[FLUSH_SUCCESS] = time.time_ns()
                return
        partition = self._due.pop()
        flight = partition.begin_flush()
        future = self._flusher.submit(flight.run, partition.ledger, partition.cache, partition.reader)
        future.add_done_callback(lambda _: self._wake())
        self._flushing = partition, flight, future

    def _end_flush(self) -> None:
        assert self._flushing is not None
        partition, flight, future = self._flushing
        self._flushing = None
        if (error := future.exception()) is not None:
            log.critical("a flush of partition %d ended in doubt, so this shard starts anew: %r", partition.number, error)
            if isinstance(error, LedgerDamaged):
                raise error
            raise SystemExit(1) from error
        partition.end_flush(flight)
        cells = self._slot.cells
        if flight.full is not None:
            cells[FLUSH_FAILURES] += 1
            self._full.meet(flight.full, OPEN_RETRY_S if self._stopping else RETRY_S)
            return
        self._full.leave()
        cells[FLUSH_SUCCESS] = time.time_ns()
        cells[FLUSH_ROWS] += len(flight.rows)
        FLUSH_TIME.observe(cells, flight.duration_ns)
        delivered, bounced = flight.events
        cells[COUNTED[0]] += delivered
        cells[COUNTED[1]] += bounced
        cells[REPEATS] += flight.ids.repeats
        self._note_bad_lines(partition, flight.bad_lines + flight.cut.bad_lines)

    def _note_bad_lines(self, partition: Partition, bad: int) -> None:
        if bad:
            self._slot.cells[BAD_LINES] += bad
            log.error("partition %d: %d lines in its queues are no events; they were skipped", partition.number, bad)

    def _supersede(self, reason: Superseded) -> None:
        log.critical("%s. This data folder is a copy or an old backup: its ledger is set aside and begun anew", reason)
        try:
            self._by_number[reason.partition].supersede(str(reason))
        except OSError as error:
            log.error("partition %d cannot be marked for that yet: %s", reason.partition, error)  # a full disk: again soon
            return
        raise SystemExit(1)

    def _condemn(self, damage: LedgerDamaged) -> None:
        """A ledger turned out to be damaged while it was in use: the next start sets it aside, and counts nothing from it."""
        log.critical("%s. This shard starts anew, and sets the ledger aside", damage)
        for partition in self._partitions:
            if partition.ledger.path == damage.path:
                partition.condemn(str(damage).removeprefix(f"{damage.path}: "))
        raise SystemExit(1)

    # ---- stop

    def _finish(self) -> None:
        """Drain and flush until nothing is left that can be flushed; then push what is left, for a bounded time."""
        self._sockets.close()  # whoever reads asks the next shard
        deadline = time.monotonic() + self._settings.server.shutdown_timeout
        idle = False
        while not idle and time.monotonic() < deadline:
            if self._flushing is not None:
                wait([self._flushing[2]], 0.05)
                if self._flushing[2].done():
                    self._end_flush()
                    if self._full.lasts:
                        deadline = min(deadline, time.monotonic() + FULL_AT_STOP_S)
                        time.sleep(OPEN_RETRY_S)
                continue
            took = 0
            self._watch.poll()
            for partition in self._partitions:
                partition.reader.discover()
                partition.reader.check_writers()
                took += partition.drain(64 << 20)
            self._next_flush = 0.0
            self._begin_flush(time.monotonic())
            idle = self._flushing is None and not took and not any(partition.due for partition in self._partitions)
            if self._flushing is None and not idle and not took:
                time.sleep(SLEEP_MIN_S)  # a full disk is not to be tried again yet
        self._gauges.set()
        patience = min(5.0, self._settings.server.shutdown_timeout)
        ledgers_free = self._pusher is None or self._pusher.stop(patience)
        if self._others is not None:
            self._others.close()
        left = sum(partition.reader.backlog for partition in self._partitions)
        names = sum(partition.pending.names for partition in self._partitions)
        if not idle or left or names:
            log.warning("stopped with %d bytes not read and %d names not flushed; their queues are kept, and the next start "
                        "counts them", left, names)  # fmt: skip
        self._flusher.shutdown()
        self._watch.close()
        if ledgers_free:  # else the end of the process closes them, as a death would
            for partition in self._partitions:
                partition.close()


def main() -> None:
    run_folder, number = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent(signal.SIGTERM, int(sys.argv[3]))
    sys.setswitchinterval(0.001)
    runtime = read_runtime(run_folder)
    logs.setup(f"shard-{number}", runtime.settings.log)
    shard = Shard(runtime, number)
    # Hardly anything here lives in cycles, and collections over the rows of a large flush would hold up every read.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    shard.run()


if __name__ == "__main__":
    main()
