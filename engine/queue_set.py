"""All event queues of one HTTP worker: where a request's lines go, and where it waits if it must.

record      all or nothing: first every queue the request needs has room, then the lines of all are published in one block
            without an await. Under `always` they are staged, synced and then published, many requests at a time.
Making      segments are made in a thread, the next one when the current is half full. One that cannot be made because the
            backlog is too large, or the disk too full, is tried again for `hold` seconds; then the request is refused.
Syncing     under `interval` one thread syncs the dirty queues every fsync_interval. A queue whose sync failed is abandoned
            and goes on in a new segment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from catchall.engine import metric_names
from catchall.engine.data_folder import queue_folder
from catchall.engine.disk import DISK, NO_SPACE, Disk
from catchall.engine.event_queue import CLOCK_ROOM, EventQueue, OpenSegment
from catchall.engine.logs import BadState
from catchall.engine.metrics_page import Slot
from catchall.engine.settings import Data

log = logging.getLogger("catchall.queues")

APPENDED_BYTES = metric_names.cell("catchall_queue_appended_bytes_total")
SEGMENTS_MADE = metric_names.cell("catchall_queue_segments_made_total")
SYNC_FAILURES = metric_names.cell("catchall_queue_sync_failures_total")
SYNC_TIME = metric_names.Histogram("catchall_queue_sync_duration_seconds")
RETRY_S = 0.05


class Refused(Exception):
    """The request was not recorded and can be sent again after `retry_after_s`.

    reason  backlog, no_space or sync, as in the metric catchall_http_refused_total. Only after `sync` may its events count.
    """

    def __init__(self, reason: str, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.reason, self.retry_after_s = reason, retry_after_s


class QueueSet:
    def __init__(
        self,
        root: Path,
        *,
        partitions: int,
        host_id: bytes,
        boot_id: bytes,
        data: Data,
        slot: Slot,
        disk: Disk = DISK,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._data, self._slot = root, data, slot
        self._queues = [
            EventQueue(
                str(queue_folder(root, partition)),
                partition=partition,
                segment_size=data.segment_size,
                boot_id=boot_id,
                host_id=host_id,
                durable=data.fsync != "never",
                disk=disk,
                now_s=now_s,
                wants_next=self._make_ahead,
            )
            for partition in range(partitions)
        ]
        self.appenders = [queue.append for queue in self._queues]
        self._making: dict[int, asyncio.Task[None]] = {}
        self._maker = ThreadPoolExecutor(2, "make-segment")
        self._syncer = ThreadPoolExecutor(1, "sync-segments")
        self._commit = _GroupCommit(self, self._queues, self._syncer) if data.fsync == "always" else None
        self._clock: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._refusing = BadState(log)

    @property
    def hot(self) -> bool:
        """Whether a caller may use `appenders` directly: not under `always`, where every line waits for a sync."""
        return self._commit is None

    def start(self) -> None:
        """Begin the periodic work. Needs a running event loop."""
        self._clock = asyncio.create_task(self._every_second())
        self._syncing = asyncio.create_task(self._every_interval())

    async def close(self) -> None:
        """Seal and sync everything: the last act of this writer."""
        if self._commit is not None:
            await self._commit.drain()
        await asyncio.gather(*self._making.values(), return_exceptions=True)  # cancelled, they would lose what a thread made
        for task in (self._clock, self._syncing):
            if task is not None:
                task.cancel()
        self._maker.shutdown()
        self._syncer.shutdown()
        for queue in self._queues:
            try:
                queue.close()
            except OSError as error:
                log.error("the last sync of %s failed: %s", queue.folder, error)

    async def record(self, blobs: Mapping[int, bytes], places: list[bytes] | None = None) -> None:
        """Record event lines, given as {partition: lines}. On return they survive the death of any process.

        places  gets where they are, for the question REPEATS of shard_protocol
        Waits   for room, at most `hold` seconds; under `always` also for one fdatasync shared by all who wait.
        Raises  Refused: nothing was recorded, except after reason `sync`.
        """
        if self._commit is not None:
            await self._commit.record(blobs, places)
            return
        await self.make_room(blobs)
        for partition, lines in blobs.items():
            appended = self._queues[partition].append(lines)
            assert appended, "room was made, and nothing ran in between"
            if places is not None:
                places.append(self._queues[partition].place(len(lines)))
            self._slot.cells[APPENDED_BYTES] += len(lines)

    async def make_room(self, blobs: Mapping[int, bytes]) -> None:
        """Return in a turn of the loop in which every queue has room for its lines. Raises Refused."""
        deadline = time.monotonic() + self._data.hold
        queues = self._queues
        while short := [(queues[p], len(lines)) for p, lines in blobs.items() if not queues[p].room(len(lines))]:
            for queue, size in short:
                await self._make(queue, size, deadline)

    async def _make(self, queue: EventQueue, size: int, deadline: float) -> None:
        while True:
            task = self._making.get(queue.partition)
            if task is None:
                task = self._making[queue.partition] = asyncio.create_task(self._make_one(queue, size))
            try:
                await asyncio.shield(task)
            except Refused:
                if time.monotonic() + RETRY_S > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
            if queue.room(size):
                return

    async def _make_one(self, queue: EventQueue, size: int) -> None:
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._maker, self._make_checked, queue, size)
        except Refused as refused:
            self._refusing.enter(f"writes wait, and are then refused: {refused}", time.monotonic())
            raise
        finally:
            # Here and not in a callback of the task: awaiting a task that is done does not give a callback its turn, so one
            # whose room somebody else used up would be found here again, without end.
            del self._making[queue.partition]
        self._refusing.leave("writes are accepted again", time.monotonic())
        self._slot.cells[SEGMENTS_MADE] += 1
        queue.install(made)

    def _make_checked(self, queue: EventQueue, size: int) -> OpenSegment:
        """In a thread: make a segment if the limits allow it. Raises Refused."""
        data = self._data
        need = max(data.segment_size, size + CLOCK_ROOM)
        try:
            held = self.allocated_bytes()
            if held + need > data.backlog_max:
                raise Refused("backlog", f"event queues hold {held} bytes, and data.backlog_max is {data.backlog_max}")
            room = os.statvfs(self._root)
            free = room.f_bavail * room.f_frsize
            if free < data.min_free_space + need:
                raise Refused("no_space", f"{free} bytes are free, and data.min_free_space is {data.min_free_space}")
            return queue.make(size)
        except OSError as error:
            reason = "no_space" if error.errno in NO_SPACE else "sync"
            raise Refused(reason, f"a new segment in {queue.folder} failed: {error}") from error

    def allocated_bytes(self) -> int:
        """Bytes that the segments of all queues of this data folder take, those of other workers included."""
        total = 0
        for queue in self._queues:
            with os.scandir(queue.folder) as entries:
                for entry in entries:
                    try:
                        total += entry.stat().st_size
                    except FileNotFoundError:
                        continue  # retired by its reader since
        return total

    def _make_ahead(self, queue: EventQueue) -> None:
        if queue.partition not in self._making:
            task = self._making[queue.partition] = asyncio.create_task(self._make_one(queue, 0))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # refused: an append will ask again

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(1 - time.time() % 1)
            for queue in self._queues:
                queue.start_second()

    async def _every_interval(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._data.fsync_interval)
            if not any(queue.untidy for queue in self._queues):
                continue
            failed = await loop.run_in_executor(self._syncer, self._sync_all)
            if self._commit is None:  # else the group commit has synced all that was published, and may have staged more
                for queue in failed:
                    queue.abandon()

    def _sync_all(self) -> list[EventQueue]:
        """In the sync thread: sync and tidy each queue; returns those to abandon."""
        started = time.monotonic_ns()
        failed = []
        dirty = False
        for queue in self._queues:
            try:
                queue.tidy()
                if self._data.fsync == "interval":
                    dirty |= queue.sync()
            except OSError as error:
                self.sync_failed(queue, error)
                failed.append(queue)
        if dirty:
            SYNC_TIME.observe(self._slot.cells, time.monotonic_ns() - started)
        return failed

    def sync_failed(self, queue: EventQueue, error: OSError) -> None:
        self._slot.cells[SYNC_FAILURES] += 1
        log.error(
            "a sync in %s failed: %s. Its segment is sealed and a new one is begun; a power cut may take what was in it and "
            "not yet flushed. Look at the disk.", queue.folder, error,
        )  # fmt: skip


class _GroupCommit:
    """Policy `always`: the requests that wait are staged together, synced together, then published and answered.

    A request whose queues have no room until the group is published waits for the next group.
    """

    def __init__(self, owner: QueueSet, queues: list[EventQueue], syncer: ThreadPoolExecutor) -> None:
        self._owner, self._queues, self._syncer = owner, queues, syncer
        self._waiting: list[tuple[Mapping[int, bytes], asyncio.Future[None], list[bytes] | None]] = []
        self._task: asyncio.Task[None] | None = None

    async def record(self, blobs: Mapping[int, bytes], places: list[bytes] | None) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._owner.make_room(blobs)
        self._waiting.append((blobs, done, places))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        await done

    async def drain(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group, self._waiting = [entry for entry in self._waiting if not entry[1].done()], []
            touched: set[int] = set()
            staged = []
            for blobs, done, places in group:
                if all(self._fits(p, len(lines), p in touched) for p, lines in blobs.items()):
                    for partition, lines in blobs.items():
                        fitted = self._queues[partition].stage(lines)
                        assert fitted, "it was just found to fit"
                        if places is not None:
                            places.append(self._queues[partition].place(len(lines)))
                    touched.update(blobs)
                    staged.append((blobs, done))
                else:
                    self._waiting.append((blobs, done, places))
            if not group:
                return
            if not staged:  # others used up the room that the first of them found
                blobs, done, _ = self._waiting[0]
                try:
                    await self._owner.make_room(blobs)
                except Refused as refused:
                    del self._waiting[0]
                    if not done.done():
                        done.set_exception(refused)
                continue
            failed = await loop.run_in_executor(self._syncer, self._sync, touched)
            for partition in touched:
                if partition in failed:
                    self._queues[partition].abandon()
                else:
                    self._queues[partition].publish()
            for blobs, done in staged:
                self._finish(blobs, done, failed)

    def _fits(self, partition: int, size: int, touched: bool) -> bool:
        queue = self._queues[partition]
        return queue.room_now(size) if touched else queue.room(size)

    def _sync(self, partitions: set[int]) -> set[int]:
        failed = set()
        started = time.monotonic_ns()
        for partition in partitions:
            try:
                self._queues[partition].sync_staged()
            except OSError as error:
                self._owner.sync_failed(self._queues[partition], error)
                failed.add(partition)
        SYNC_TIME.observe(self._owner._slot.cells, time.monotonic_ns() - started)
        return failed

    def _finish(self, blobs: Mapping[int, bytes], done: asyncio.Future[None], failed: set[int]) -> None:
        if done.done():
            return
        if failed.isdisjoint(blobs):
            done.set_result(None)
            self._owner._slot.cells[APPENDED_BYTES] += sum(map(len, blobs.values()))
        else:
            done.set_exception(Refused("sync", "an fdatasync failed: the events may have been recorded and may count"))
