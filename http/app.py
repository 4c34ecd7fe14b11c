"""The ASGI app of an HTTP worker: routes, the two hot paths, start and stop. No framework.

    PUT, POST  /events/<domain>/delivered|bounced     events.py
    POST       /events                                events.py
    GET        /domains/<domain>   /domains/stats     domains.py
    GET        /metrics            metrics.py         /healthz  /readyz   health.py

Hot paths   A PUT or GET whose raw path is in a table: one look-up stands for splitting, decoding, lower-casing, checking and
            routing. A PUT is answered without asking for its body (the server drains what there is), which would cost a
            quarter of all throughput. One in 16 is timed.
Raw paths   are split before they are percent-decoded, so %2F is part of a name (and then no good one), never a separator.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from multiprocessing import parent_process
from pathlib import Path
from time import perf_counter_ns
from typing import Any
from urllib.parse import unquote_to_bytes

from catchall.engine import logs, metric_names
from catchall.engine.process import RUN_VARIABLE, die_with_parent, read_runtime
from catchall.http.body import ClientGone, Receive, header
from catchall.http.domains import VERDICT_START, Domains, Read, verdict
from catchall.http.events import NOTHING, OK_EMPTY, SIGNS, Events, Write
from catchall.http.health import HEALTHY, readyz
from catchall.http.idempotency import HEADER as IDEMPOTENCY_KEY
from catchall.http.metrics import DURATION, Metrics
from catchall.http.problems import Response, problem
from catchall.http.shard_client import ShardUnavailable
from catchall.http.worker import Worker

log = logging.getLogger("catchall.http")

Send = Callable[[dict[str, Any]], Awaitable[None]]

WRITE_METHODS = frozenset({"PUT", "POST"})
SAMPLE = 16  # one request in so many is timed, on the hot paths
SAMPLE_MASK = SAMPLE - 1
LATENCY = {route: metric_names.Histogram(DURATION, route) for route in metric_names.ROUTES}
REQUESTS = {
    (route, code): metric_names.request_cell(route, code) for route in metric_names.ROUTES for code in metric_names.CODES
}
WRITE_ROUTE = {REQUESTS[kind, 200]: kind for kind in SIGNS}
DOMAIN_200 = REQUESTS["domain", 200]
OK_START, OK_BODY = OK_EMPTY


class NotFound(Exception):
    pass


class App:
    """What is not on a hot path: routing, every other answer, start and stop.

    writes, gets  the young generations of the tables of parsed paths, which the hot paths look into
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self.writes: dict[bytes, Write] = {}
        self.gets: dict[bytes, Read] = {}

    async def any(self, scope: dict[str, Any], receive: Receive, send: Send, method: str, path: bytes) -> None:
        """Every request that is not on a hot path: routed, answered, counted and timed."""
        started = perf_counter_ns()
        route = "other"
        try:
            segments = path.split(b"/")[1:]
            route = route_of(segments)
            response = await self._answer(route, segments, scope, receive, method, path)
        except ClientGone:  # or its chunks are malformed; the server does not tell which, so it is answered all the same
            response = problem(400, f"The body ended before it was complete, or its chunks are malformed. {NOTHING}",
                               code="bad_body", close=True)  # fmt: skip
        except NotFound:
            response = problem(404, f"There is nothing at this path. {NOTHING} Events go to PUT /events/<domain>/delivered or "
                               "/bounced and to POST /events; verdicts are at GET /domains/<domain>.")  # fmt: skip
        except Exception:
            log.exception("a request to route %s failed", route)
            response = problem(500, "An error inside the service; its log has the details. What was recorded is not known.")
        cells = self._cells
        cells[REQUESTS[route, response.start["status"]]] += 1
        if method == "HEAD":
            response = Response(response.start, {"type": "http.response.body", "body": b""})
        await send(response.start)
        await send(response.body)
        LATENCY[route].observe(cells, perf_counter_ns() - started)

    async def _answer(
        self, route: str, segments: list[bytes], scope: dict[str, Any], receive: Receive, method: str, path: bytes
    ) -> Response:
        allowed = ALLOWED[route]
        if method not in allowed:
            return problem(405, f"{method[:20]} is not allowed here; {' and '.join(allowed)} are. {NOTHING}",
                           allow=", ".join(allowed))  # fmt: skip
        match route:
            case "delivered" | "bounced":
                domain = decoded(segments[1])
                if isinstance(domain, Response):
                    return domain
                return await self._events.one(path, domain, route, scope["headers"])
            case "bulk":
                return await self._events.bulk(scope, receive)
            case "domain":
                domain = decoded(segments[1])
                return domain if isinstance(domain, Response) else await self.domains.one(path, domain)
            case "stats":
                return await self.domains.stats()
            case "metrics":
                if not self._settings.metrics.enabled:
                    raise NotFound
                return self._metrics.answer(header(scope["headers"], b"accept") or b"")
            case "readyz":
                return await readyz(self._here)
            case _:
                return HEALTHY

    @property
    def _here(self) -> Worker:
        assert self._worker is not None, "requests come after start-up"
        return self._worker

    # ---- start and stop

    async def lifespan(self, receive: Receive, send: Send, started: Callable[[Worker], None]) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    started(self._start())
                except Exception as error:
                    log.exception("this HTTP worker cannot start")
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._worker is not None:
                    await self._worker.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _start(self) -> Worker:
        parent = parent_process()
        assert parent is not None
        assert parent.pid is not None
        die_with_parent(signal.SIGKILL, parent.pid)
        runtime = read_runtime(Path(os.environ[RUN_VARIABLE]))
        self._worker = worker = Worker.start(runtime)
        logs.setup(f"http-{worker.slot.index}", runtime.settings.log)
        self._settings, self._cells = runtime.settings, worker.slot.cells
        self._events = Events(worker, self.writes)
        self.domains = Domains(worker, self.gets)
        self._metrics = Metrics(runtime.page)
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        return worker


def make_app() -> Callable[[dict[str, Any], Receive, Send], Awaitable[None]]:
    """The ASGI callable. A closure, because its names are read faster than attributes: 200 ns of a PUT's microsecond."""
    rest = App()
    writes, gets = rest.writes, rest.gets
    cells = memoryview(b"")
    threshold = 0

    def started(worker: Worker) -> None:
        nonlocal cells, threshold
        cells, threshold = worker.slot.cells, worker.settings.rules.threshold

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            method, path = scope["method"], scope["raw_path"]
        except KeyError:
            await rest.lifespan(receive, send, started)
            return
        if method in WRITE_METHODS:
            write = writes.get(path)
            for name, _ in scope["headers"]:
                if name == IDEMPOTENCY_KEY:
                    write = None
            if write is not None:
                append, line, cell = write
                count = cells[cell]
                begun = 0 if count & SAMPLE_MASK else perf_counter_ns()
                if append(line):
                    cells[cell] = count + 1
                    await send(OK_START)
                    await send(OK_BODY)
                    if begun:
                        LATENCY[WRITE_ROUTE[cell]].observe(cells, perf_counter_ns() - begun, SAMPLE)
                    return
        elif method == "GET":
            read = gets.get(path)
            if read is not None:
                name, shard = read
                count = cells[DOMAIN_200]
                begun = 0 if count & SAMPLE_MASK else perf_counter_ns()
                try:
                    delivered, bounced = await shard.counts(name)
                except ShardUnavailable as away:
                    response = rest.domains.away(away)
                    cells[REQUESTS["domain", 503]] += 1
                    await send(response.start)
                    await send(response.body)
                    return
                cells[DOMAIN_200] += 1
                await send(VERDICT_START)
                await send(verdict(name, delivered, bounced, threshold))
                if begun:
                    LATENCY["domain"].observe(cells, perf_counter_ns() - begun, SAMPLE)
                return
        await rest.any(scope, receive, send, method, path)

    return app


ALLOWED = {
    "delivered": ("PUT", "POST"),
    "bounced": ("PUT", "POST"),
    "bulk": ("POST",),
    **dict.fromkeys(("domain", "stats", "metrics", "healthz", "readyz"), ("GET", "HEAD")),
}


def route_of(segments: list[bytes]) -> str:
    """The name of the route, as in the metrics. Raises NotFound."""
    match segments:
        case [b"events", _, b"delivered"]:
            return "delivered"
        case [b"events", _, b"bounced"]:
            return "bounced"
        case [b"events"]:
            return "bulk"
        case [b"domains", b"stats"]:
            return "stats"
        case [b"domains", _]:
            return "domain"
        case [b"metrics"]:
            return "metrics"
        case [b"healthz"]:
            return "healthz"
        case [b"readyz"]:
            return "readyz"
    raise NotFound


def decoded(segment: bytes) -> str | Response:
    """A path segment percent-decoded, or the answer to one that is not UTF-8."""
    try:
        return unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        return problem(400, f"The name in the path is not UTF-8. {NOTHING}", code="bad_domain")


app = make_app()
