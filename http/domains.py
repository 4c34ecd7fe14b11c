"""GET /domains: one domain's verdict, and the number of domains of each status."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from catchall.engine import metric_names
from catchall.engine.rules import BadName, normalise, partition_of, shard_of, status
from catchall.http.paths import PathTable
from catchall.http.problems import Response, problem
from catchall.http.shard_client import ShardClient, ShardUnavailable
from catchall.http.worker import Worker

JSON_TYPE = (b"content-type", b"application/json")
SHARD_AWAY = metric_names.cell("catchall_http_refused_total", "shard")


# The server adds the content length.
VERDICT_START = {"type": "http.response.start", "status": 200, "headers": [JSON_TYPE]}


class Read(NamedTuple):
    """What a GET path that was parsed before asks for."""

    name: bytes
    shard: ShardClient


def json_answer(body: bytes, status_code: int = 200) -> Response:
    headers = [JSON_TYPE, (b"content-length", b"%d" % len(body))]
    return Response(
        {"type": "http.response.start", "status": status_code, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def verdict(name: bytes, delivered: int, bounced: int, threshold: int) -> dict[str, Any]:
    """The body of the answer about one domain. A name in normal form needs no escapes."""
    told = status(delivered, bounced, threshold).encode()
    body = b'{"domain":"%b","status":"%b","delivered":%d,"bounced":%d}' % (name, told, delivered, bounced)
    return {"type": "http.response.body", "body": body}


class Domains:
    def __init__(self, worker: Worker, young: dict[bytes, Read]) -> None:
        self._worker = worker
        self._partitions = worker.runtime.manifest.partitions
        self._threshold = worker.settings.rules.threshold
        self.table: PathTable[Read] = PathTable(worker.settings.cache.paths, young)

    async def one(self, raw_path: bytes, domain: str) -> Response:
        """GET /domains/<domain> for a path that was not in the young table."""
        read = self.table.get(raw_path)
        if read is None:
            try:
                name = normalise(domain)
            except BadName as bad:
                return problem(400, f"{bad.detail}.", code=bad.code)
            shards = self._worker.shards
            read = Read(name, shards[shard_of(partition_of(name, self._partitions), len(shards))])
            self.table.put(raw_path, read)
        try:
            delivered, bounced = await read.shard.counts(read.name)
        except ShardUnavailable as away:
            return self.away(away)
        return Response(VERDICT_START, verdict(read.name, delivered, bounced, self._threshold))

    async def stats(self) -> Response:
        """Domains by status, over all shards; over all hosts when several share one MongoDB."""
        try:
            answers = await asyncio.gather(*(shard.stats() for shard in self._worker.shards))
        except ShardUnavailable as away:
            return self.away(away)
        shared = next((answer[5:] for answer in answers if answer[4]), None)
        if shared is None:
            catch_all, not_catch_all, unknown = (sum(answer[i] for answer in answers) for i in range(3))
            as_of = min(answer[3] for answer in answers)
        else:
            catch_all, not_catch_all, unknown, as_of = shared
        told = {
            "catch_all": catch_all,
            "not_catch_all": not_catch_all,
            "unknown": unknown,
            "total": catch_all + not_catch_all + unknown,
            "timestamp": datetime.fromtimestamp(as_of / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }
        return json_answer(msgspec.json.encode(told))

    def away(self, away: ShardUnavailable) -> Response:
        self._worker.slot.cells[SHARD_AWAY] += 1
        return problem(503, f"{away}. Ask again.", code="shard_unavailable", retry_after=1)
