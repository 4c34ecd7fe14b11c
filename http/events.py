"""PUT and POST /events: parse, record, answer.

The answer 200 means that the events survive the death of any process; what a power cut may take is data.fsync's choice. Every
other answer means that nothing was recorded, except a 503 that says so, and no answer at all: those may have counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from catchall.engine import lines, metric_names
from catchall.engine.queue_set import Refused
from catchall.engine.rules import BadName, normalise, partition_of
from catchall.http.body import BodyStalled, BodyTooLarge, Receive, header, read_body
from catchall.http.bulk import BadEvents, Parsed, TooManyEvents, parse_ndjson
from catchall.http.paths import PathTable
from catchall.http.problems import Response, problem
from catchall.http.worker import Worker

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

    async def one(self, raw_path: bytes, domain: str, kind: str) -> Response:
        """PUT /events/<domain>/<kind> for a path that was not in the young table, or whose queue had no room."""
        write = self.table.get(raw_path)
        if write is None:
            try:
                write = self._parsed(domain, kind)
            except BadName as bad:
                return problem(400, f"{bad.detail}. {NOTHING}", code=bad.code)
            self.table.put(raw_path, write)
        try:
            await self._worker.queues.record({partition_of(write.line[1:-1], self._partitions): write.line})
        except Refused as refused:
            return self._refused(refused)
        return OK_EMPTY

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
        try:
            parsed = parse_ndjson(body, self._partitions, self._limits.events)
        except TooManyEvents as many:
            return problem(413, f"{many} (limits.events). {NOTHING} Send them in parts.", code="too_many_events")
        except BadEvents as bad:
            cells[BULK_REJECTED] += bad.rejected
            return _with_counts(
                problem(422, f"{bad}. {NOTHING}", code="bad_events", errors=bad.errors, rejected=bad.rejected), 0, bad.rejected
            )
        return await self._record(parsed)

    async def _record(self, parsed: Parsed) -> Response:
        worker = self._worker
        try:
            await worker.queues.record(parsed.blobs)
        except Refused as refused:
            return self._refused(refused)
        cells = worker.slot.cells
        cells[BULK_EVENTS["delivered"]] += parsed.delivered
        cells[BULK_EVENTS["bounced"]] += parsed.bounced
        await worker.pause_for_backlog()
        return _with_counts(OK_EMPTY, parsed.delivered + parsed.bounced, 0)

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

    def _refused(self, refused: Refused) -> Response:
        self._worker.slot.cells[REFUSED[refused.reason]] += 1
        recorded = "" if refused.reason == "sync" else f" {NOTHING}"
        return problem(503, f"{refused}.{recorded} Send it again.", code=refused.reason, retry_after=refused.retry_after_s)


def _with_counts(response: Response, counted: int, rejected: int) -> Response:
    """The same answer, saying how many events were recorded and how many were wrong."""
    counts = [(b"catchall-counted", b"%d" % counted), (b"catchall-duplicate", b"0"), (b"catchall-rejected", b"%d" % rejected)]
    return Response(response.start | {"headers": [*response.start["headers"], *counts]}, response.body)


