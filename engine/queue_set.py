"""All event queues of one HTTP worker: where a request's lines go, and where it waits if it must.

record      all or nothing: first every queue the request needs has room, then the lines of all are published in one block
            without an await. Under `always` they are staged, synced and then published, many requests at a time.
Making      segments are made in a thread, the next one when the current is half full. One that cannot be made because the
            backlog is too large, or the disk too full, is tried again for `hold` seconds; then the request is refused.
Hanging     a disk that does not answer holds a request for `write_timeout_s`, then it is refused, and others at once, until the
            call comes back. Under `always` lines whose sync hangs may count later, and their queue stays out of use till then.
Syncing     under `interval` one thread syncs the dirty queues every fsync_interval. A queue whose sync failed is abandoned
            and goes on in a new segment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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

    reason  backlog, no_space, disk, stopping or sync, as in the metric catchall_http_refused_total. Only after `sync` may its
            events count.
    """

    def __init__(self, reason: str, message: str, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.reason, self.retry_after_s = reason, retry_after_s


@dataclass(slots=True)
class _Making:
    """A segment that is being made."""

    task: asyncio.Task[None]
    since: float = field(default_factory=time.monotonic)


class QueueSet:
    """write_timeout_s  how long a request waits for a call of the disk"""

    def __init__(
        self,
        root: Path,
        *,
        partitions: int,
        host_id: bytes,
        boot_id: bytes,
        data: Data,
        slot: Slot,
        write_timeout_s: float = 10.0,
        disk: Disk = DISK,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._root, self._data, self._slot, self.write_timeout_s = root, data, slot, write_timeout_s
        self.closed = False
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
        self._making: dict[int, _Making] = {}
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
        self.closed = True
        making = [one.task for one in self._making.values()]
        await asyncio.gather(*making, return_exceptions=True)  # cancelled, they would lose what a thread made
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

    async def record(self, blobs: Mapping[int, bytes]) -> None:
        """Record event lines, given as {partition: lines}. On return they survive the death of any process.

        Waits   for room, at most `hold` seconds; under `always` also for one fdatasync shared by all who wait.
        Raises  Refused: nothing was recorded, except after reason `sync`.
        """
        if self._commit is not None:
            await self._commit.record(blobs)
            return
        await self.make_room(blobs)
        for partition, lines in blobs.items():
            appended = self._queues[partition].append(lines)
            assert appended, "room was made, and nothing ran in between"
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
            if self.closed:
                raise stopping()
            making = self._making.get(queue.partition) or self._begin_making(queue, size)
            patience = max(0.0, making.since + self.write_timeout_s - time.monotonic())
            done, _ = await asyncio.wait([making.task], timeout=patience)
            if not done:
                raise Refused("disk", f"a new segment in {queue.folder} is not made after {self.write_timeout_s:g} s")
            try:
                making.task.result()
            except Refused:
                if time.monotonic() + RETRY_S > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
            if queue.room(size):
                return

    def _begin_making(self, queue: EventQueue, size: int) -> _Making:
        making = self._making[queue.partition] = _Making(asyncio.create_task(self._make_one(queue, size)))
        making.task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asked may be gone
        return making

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
            reason = "no_space" if error.errno in NO_SPACE else "disk"
            raise Refused(reason, f"a new segment in {queue.folder} failed: {error}") from error

    def allocated_bytes(self) -> int:
        """Bytes that the segments of all queues of this data folder take, those of other workers included."""
        total = 0
        for queue in self._queues:
            with os.scandir(queue.folder) as entries:
                for entry in entries:
                    if entry.name.endswith((".seg", ".tmp")):  # what was set aside is nobody's backlog
                        with contextlib.suppress(FileNotFoundError):  # retired by its reader since
                            total += entry.stat().st_size
        return total

    def _make_ahead(self, queue: EventQueue) -> None:
        if queue.partition not in self._making:
            self._begin_making(queue, 0)  # refused: an append will ask again

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
            try:
                failed = await loop.run_in_executor(self._syncer, self._sync_all)
            except Exception:  # whatever it was, the next round must come
                log.exception("a round of syncs failed; the next one is due in %g s", self._data.fsync_interval)
                continue
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


def stopping() -> Refused:
    return Refused("stopping", "this process is about to end", 1)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for its sync."""

    blobs: Mapping[int, bytes]
    done: asyncio.Future[None]
    staged: bool = False

    def refuse(self, why: str) -> None:
        if self.done.done():
            return
        if self.staged:
            self.done.set_exception(Refused("sync", f"{why}: the events may have been recorded and may count"))
        else:
            self.done.set_exception(Refused("disk", why))


class _GroupCommit:
    """Policy `always`: the requests that wait are staged together, synced together, then published and answered.

    A request whose queues have no room until the group is published waits for the next group.
    """

    def __init__(self, owner: QueueSet, queues: list[EventQueue], syncer: ThreadPoolExecutor) -> None:
        self._owner, self._queues, self._syncer = owner, queues, syncer
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._sync_since: float | None = None

    async def record(self, blobs: Mapping[int, bytes]) -> None:
        patience = self._owner.write_timeout_s
        slow = f"a sync has not come back after {patience:g} s"
        if self._sync_since is not None and time.monotonic() > self._sync_since + patience:
            raise Refused("disk", slow)
        await self._owner.make_room(blobs)
        if self._owner.closed:
            raise stopping()
        entry = _Waiting(blobs, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        timer = asyncio.get_running_loop().call_later(patience, entry.refuse, slow)
        try:
            await entry.done
        finally:
            timer.cancel()
            if entry in self._waiting:  # refused or given up, while a sync hangs
                self._waiting.remove(entry)

    async def drain(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        group: list[_Waiting] = []
        try:
            while self._waiting:
                group, self._waiting = [entry for entry in self._waiting if not entry.done.done()], []
                await self._commit(group)
        except Exception as error:  # nobody may be left waiting
            log.exception("a group commit failed")
            for queue in self._queues:
                if queue.staged:
                    queue.abandon()
            left, self._waiting = [*group, *self._waiting], []
            for entry in left:
                entry.refuse(f"recording failed: {error!r}")

    async def _commit(self, group: list[_Waiting]) -> None:
        """Stage, sync, publish and answer as many of the group as have room; the rest waits for the next."""
        touched: set[int] = set()
        for entry in group:
            if all(self._fits(p, len(lines), p in touched) for p, lines in entry.blobs.items()):
                entry.staged = True
                for partition, lines in entry.blobs.items():
                    fitted = self._queues[partition].stage(lines)
                    assert fitted, "it was just found to fit"
                touched.update(entry.blobs)
            else:
                self._waiting.append(entry)
        if not any(entry.staged for entry in group):
            if group:  # others used up the room that the first of them found
                await self._make_room_again(group[0])
            return
        self._sync_since = time.monotonic()
        try:
            failed = await asyncio.get_running_loop().run_in_executor(self._syncer, self._sync, touched)
        finally:
            self._sync_since = None
        for partition in touched:
            if partition in failed:
                self._queues[partition].abandon()
            else:
                self._queues[partition].publish()
        for entry in group:
            if entry.staged:
                self._finish(entry, failed)

    async def _make_room_again(self, first: _Waiting) -> None:
        try:
            await self._owner.make_room(first.blobs)
        except Refused as refused:
            self._waiting.remove(first)
            if not first.done.done():
                first.done.set_exception(refused)

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

    def _finish(self, entry: _Waiting, failed: set[int]) -> None:
        if not failed.isdisjoint(entry.blobs):
            entry.refuse("an fdatasync failed")
            return
        self._owner._slot.cells[APPENDED_BYTES] += sum(map(len, entry.blobs.values()))
        if not entry.done.done():
            entry.done.set_result(None)
