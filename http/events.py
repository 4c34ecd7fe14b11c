"""PUT and POST /events: parse, record, answer.

The answer 200 means that the events survive the death of any process; what a power cut may take is data.fsync's choice. Every
other answer means that nothing was recorded, except a 503 that says so, and no answer at all: those may have counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from catchall.engine import lines, metric_names
from catchall.engine.lines import with_id
from catchall.engine.queue_set import Refused
from catchall.engine.rules import BadName, normalise, partition_of
from catchall.http.body import BodyStalled, BodyTooLarge, Receive, header, read_body
from catchall.http.bulk import BadEvents, Parsed, TooManyEvents, parse_ndjson
from catchall.http.idempotency import BadKey, Key, KeyReused, claim, key_of, repeats
from catchall.http.paths import PathTable
from catchall.http.problems import Response, problem
from catchall.http.shard_client import ShardUnavailable
from catchall.http.worker import Worker

Headers = Sequence[tuple[bytes, bytes]]
SIGNS = {"delivered": lines.DELIVERED, "bounced": lines.BOUNCED}
NDJSON_TYPES = frozenset({b"application/x-ndjson", b"application/ndjson", b"application/jsonl", b"application/x-jsonlines"})
NOTHING = "Nothing was recorded."

OK_EMPTY = Response(
    {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]},
    {"type": "http.response.body", "body": b""},
)
BULK_EVENTS = {kind: metric_names.cell("catchall_bulk_events_total", kind) for kind in SIGNS}
RECORDED = {kind: metric_names.request_cell(kind, 200) for kind in SIGNS}
BULK_REJECTED = metric_names.cell("catchall_bulk_rejected_events_total")
BODY_BYTES = metric_names.cell("catchall_http_request_body_bytes_total")
REFUSED = {
    reason: metric_names.cell("catchall_http_refused_total", reason)
    for reason in ("backlog", "no_space", "disk", "sync", "stopping", "shard")
}


class Write(NamedTuple):
    """What a PUT path that was parsed before stands for: the whole of its work."""

    append: Callable[[bytes], bool]
    line: bytes
    cell: int  # counts its requests answered 200


class Events:
    def __init__(self, worker: Worker, young: dict[bytes, Write]) -> None:
        self._worker = worker
        self._partitions = worker.runtime.manifest.partitions
        self._limits = worker.settings.limits
        self._read_timeout = worker.settings.server.read_timeout
        self.table: PathTable[Write] = PathTable(worker.settings.cache.paths if worker.queues.hot else 0, young)

    async def one(self, raw_path: bytes, domain: str, kind: str, headers: Headers) -> Response:
        """PUT /events/<domain>/<kind> with a key, or for a path not in the young table, or whose queue had no room."""
        write = self.table.get(raw_path)
        if write is None:
            try:
                write = self._parsed(domain, kind)
            except BadName as bad:
                return problem(400, f"{bad.detail}. {NOTHING}", code=bad.code)
            self.table.put(raw_path, write)
        partition = partition_of(write.line[1:-1], self._partitions)
        try:
            given = key_of(headers)
            if given is None:
                await self._worker.queues.record({partition: write.line})
                return OK_EMPTY
            key = Key(given, b"event\n" + write.line)
            await claim(self._worker, key)
            return await self._record_with_ids({partition: with_id(write.line, key.id_of(0))}, 1)
        except (BadKey, KeyReused, Refused, ShardUnavailable) as failure:
            return self._failed(failure)

    async def _record_with_ids(self, blobs: Mapping[int, bytes], events: int) -> Response:
        """Record lines that have ids. Raises Refused."""
        places: list[bytes] = []
        await self._worker.queues.record(blobs, places)
        duplicates = await repeats(self._worker, places)
        return OK_EMPTY if duplicates is None else _with_counts(OK_EMPTY, events - duplicates, duplicates, 0)

    def _parsed(self, domain: str, kind: str) -> Write:
        """Raises BadName."""
        name = normalise(domain)
        append = self._worker.queues.appenders[partition_of(name, self._partitions)]
        return Write(append, lines.encode(SIGNS[kind], name), RECORDED[kind])

    async def bulk(self, scope: dict[str, Any], receive: Receive) -> Response:
        """POST /events: all of its events, or none. Raises ClientGone."""
        wrong = self._wrong_headers(scope)
        if wrong is not None:
            return wrong
        try:
            given = key_of(scope["headers"])
        except BadKey as bad:
            return self._failed(bad, close=True)
        length = header(scope["headers"], b"content-length")
        declared = int(length) if length is not None and length.isdigit() else None
        try:
            body = await read_body(receive, declared, self._limits.body, self._read_timeout)
        except BodyTooLarge:
            return problem(413, f"The body is larger than {self._limits.body} bytes (limits.body). {NOTHING} Send it in parts.",
                           code="body_too_large", close=True)  # fmt: skip
        except BodyStalled:
            return problem(408, f"The body stalled for {self._read_timeout:g} s (server.read_timeout). {NOTHING}",
                           code="body_stalled", close=True)  # fmt: skip
        cells = self._worker.slot.cells
        cells[BODY_BYTES] += len(body)
        key = None if given is None else Key(given, b"events\n" + body)
        try:
            parsed = parse_ndjson(body, self._partitions, self._limits.events, None if key is None else key.id_of)
        except TooManyEvents as many:
            return problem(413, f"{many} (limits.events). {NOTHING} Send them in parts.", code="too_many_events")
        except BadEvents as bad:
            cells[BULK_REJECTED] += bad.rejected
            response = problem(422, f"{bad}. {NOTHING}", code="bad_events", errors=bad.errors, rejected=bad.rejected)
            return _with_counts(response, 0, 0, bad.rejected)
        try:
            return await self._record(parsed, key)
        except (KeyReused, Refused, ShardUnavailable) as failure:
            return self._failed(failure)

    async def _record(self, parsed: Parsed, key: Key | None) -> Response:
        """Raises KeyReused, Refused, ShardUnavailable."""
        worker = self._worker
        events = parsed.delivered + parsed.bounced
        if key is not None:
            await claim(worker, key)
        if parsed.with_ids:
            response = await self._record_with_ids(parsed.blobs, events)
        else:
            await worker.queues.record(parsed.blobs)
            response = _with_counts(OK_EMPTY, events, 0, 0)
        cells = worker.slot.cells
        cells[BULK_EVENTS["delivered"]] += parsed.delivered
        cells[BULK_EVENTS["bounced"]] += parsed.bounced
        await worker.pause_for_backlog()
        return response

    def _wrong_headers(self, scope: dict[str, Any]) -> Response | None:
        headers = scope["headers"]
        content_type = (header(headers, b"content-type") or b"").split(b";")[0].strip().lower()
        if content_type not in NDJSON_TYPES:
            told = f"Content-Type is {content_type.decode('latin-1')!r}" if content_type else "Content-Type is missing"
            return problem(415, f"{told}; POST /events takes application/x-ndjson. {NOTHING}", code="unsupported_media_type",
                           close=True)  # fmt: skip
        encoding = (header(headers, b"content-encoding") or b"identity").strip().lower()
        if encoding != b"identity":
            told = encoding.decode("latin-1")
            response = problem(415, f"Content-Encoding is {told!r}; POST /events takes identity. {NOTHING}",
                               code="unsupported_content_encoding", close=True)  # fmt: skip
            response.start["headers"].append((b"accept-encoding", b"identity"))
            return response
        return None

    def _failed(self, failure: Exception, *, close: bool = False) -> Response:
        """The answer to a request of which nothing was counted, or, after a failed sync, perhaps something."""
        if isinstance(failure, BadKey):
            return problem(400, f"{failure}. {NOTHING}", code="bad_idempotency_key", close=close)
        if isinstance(failure, KeyReused):
            return problem(422, f"This Idempotency-Key was used before, for another request. {NOTHING} Use a new key for each "
                           "request, and the same one only to send the same request again.",
                           code="idempotency_key_reused")  # fmt: skip
        reason, wait = (failure.reason, failure.retry_after_s) if isinstance(failure, Refused) else ("shard", 1)
        self._worker.slot.cells[REFUSED[reason]] += 1
        recorded = "" if reason == "sync" else f" {NOTHING}"
        return problem(503, f"{failure}.{recorded} Send it again.", code=reason, retry_after=wait)


def _with_counts(response: Response, counted: int, duplicate: int, rejected: int) -> Response:
    """The same answer, saying how many events were counted, had been counted before, and were wrong."""
    counts = [
        (b"catchall-counted", b"%d" % counted),
        (b"catchall-duplicate", b"%d" % duplicate),
        (b"catchall-rejected", b"%d" % rejected),
    ]
    return Response(response.start | {"headers": [*response.start["headers"], *counts]}, response.body)
