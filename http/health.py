"""GET /healthz and /readyz.

healthz  200 while this worker's loop turns; depends on nothing else
readyz   200 when every shard has recovered and answers ("ready", or "degraded" when something damaged was set aside), else 503
"""

from __future__ import annotations

import asyncio

import msgspec

from catchall.http.domains import json_answer
from catchall.http.problems import Response
from catchall.http.shard_client import ShardClient, ShardUnavailable
from catchall.http.worker import Worker

PING_TIMEOUT_S = 1.0
HEALTHY = json_answer(b'{"status":"ok"}')


async def readyz(worker: Worker) -> Response:
    shards = await asyncio.gather(*(_state(shard) for shard in worker.shards))
    status = "not ready" if "away" in shards else "degraded" if "degraded" in shards else "ready"
    return json_answer(msgspec.json.encode({"status": status, "shards": shards}), 503 if status == "not ready" else 200)


async def _state(shard: ShardClient) -> str:
    try:
        answer = await asyncio.wait_for(shard.ping(), PING_TIMEOUT_S)
    except (TimeoutError, ShardUnavailable):
        return "away"
    return "degraded" if answer == b"\2" else "ready"
