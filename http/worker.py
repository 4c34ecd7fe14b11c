"""What one HTTP worker holds while it serves: settings, its slot in the metrics page, its event queues, its shard clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass

from catchall.engine import metric_names
from catchall.engine.metrics_page import READY, Slot
from catchall.engine.process import Runtime
from catchall.engine.queue_set import QueueSet
from catchall.engine.settings import Settings
from catchall.http.shard_client import ShardClient

BACKLOG = metric_names.cell("catchall_queue_backlog_bytes")
PAUSE_STEP_S = 0.005
BEAT_S = 1.0  # between two heartbeats
SHARD_ALIVE_S = 3.0  # a shard whose heartbeat is older is not waited for


@dataclass(slots=True)
class Worker:
    runtime: Runtime
    slot: Slot
    place_fd: int
    queues: QueueSet
    shards: list[ShardClient]
    beating: asyncio.Task[None] | None = None

    @property
    def settings(self) -> Settings:
        return self.runtime.settings

    @classmethod
    def start(cls, runtime: Runtime) -> Worker:
        """Needs a running event loop. Raises OSError."""
        slot, place_fd = runtime.page.take_http_place()
        config, manifest = runtime.settings, runtime.manifest
        queues = QueueSet(
            runtime.root,
            partitions=manifest.partitions,
            host_id=bytes.fromhex(manifest.host_id),
            boot_id=runtime.boot_id,
            data=config.data,
            slot=slot,
            write_timeout_s=config.server.write_timeout,
        )
        queues.start()
        shards = [
            ShardClient(runtime.run_folder, number, config.server.write_timeout) for number in range(config.shards.workers)
        ]
        worker = cls(runtime, slot, place_fd, queues, shards)
        worker.beating = asyncio.create_task(worker._beat())
        slot.set_state(READY)
        return worker

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self.slot.beat()

    async def pause_for_backlog(self) -> None:
        """Hold a bulk request's answer while a living shard is far behind, so that reads, which drain first, stay quick."""
        limit = self.settings.limits.pause_backlog
        deadline = time.monotonic() + self.settings.data.hold
        while any(self._is_behind(slot, limit) for slot in self.runtime.page.of("shard")) and time.monotonic() < deadline:
            await asyncio.sleep(PAUSE_STEP_S)

    @staticmethod
    def _is_behind(slot: Slot, limit: int) -> bool:
        return slot.cells[BACKLOG] > limit and slot.alive_within(SHARD_ALIVE_S)

    async def stop(self) -> None:
        if self.beating is not None:
            self.beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.beating
        await self.queues.close()
        for shard in self.shards:
            shard.close()
        self.slot.set_state(0)
        os.close(self.place_fd)
