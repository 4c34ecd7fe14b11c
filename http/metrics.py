"""GET /metrics: the metrics page of all processes as Prometheus text, or as JSON when the client asks for it.

Any worker can answer, from shared memory alone. A slot whose process died keeps its totals: sums never fall while the service
runs. What each metric means stands in engine/metric_names.py.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

import msgspec
import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from catchall.engine.metric_names import CODES, LATENCY_BUCKETS_S, ROUTES, TABLE, cell
from catchall.engine.metric_names import Metric as Declared
from catchall.engine.metrics_page import READY, STARTED, MetricsPage, Slot
from catchall.http.domains import json_answer
from catchall.http.problems import Response

DURATION = "catchall_http_request_duration_seconds"


class Page(Collector):
    """All metrics of a running service, read from its page at each scrape."""

    def __init__(self, page: MetricsPage) -> None:
        self._page = page

    def collect(self) -> Iterator[Metric]:
        for metric, at in TABLE.items():
            yield _family(metric, at, [slot for slot in self._page.of(metric.role) if slot.pid])
        yield from _processes(self._page)
        yield InfoMetricFamily(
            "catchall_build",
            "Versions of what runs here.",
            {"version": version("catchall"), "python": platform.python_version(), "granian": version("granian")},
        )


def _family(metric: Declared, at: int, slots: Sequence[Slot]) -> Metric:
    labels = [*metric.labels, metric.role] if metric.merge == "each" else list(metric.labels)
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=labels)
        for i, series in enumerate(metric.series):
            first = at + i * metric.cells_per_series
            cells = [sum(slot.cells[first + n] for slot in slots) for n in range(metric.cells_per_series)]
            total = 0
            buckets = []
            for bound, count in zip([*map(str, metric.buckets), "+Inf"], cells, strict=False):
                total += count
                buckets.append((bound, float(total)))
            histogram.add_metric(series, buckets, cells[-1] * metric.scale)
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=labels)
    for i, series in enumerate(metric.series):
        values = [slot.cells[at + i] * metric.scale for slot in slots]
        if metric.merge == "each":
            for slot, value in zip(slots, values, strict=True):
                family.add_metric([*series, str(slot.index)], value)
        else:
            family.add_metric(series, sum(values) if metric.merge == "sum" else max(values, default=0))
    return family


def _processes(page: MetricsPage) -> Iterator[Metric]:
    """CPU and memory of the processes that live now, and how many of each kind are ready."""
    cpu = CounterMetricFamily("catchall_process_cpu_seconds", "CPU time, user and system.", labels=["process"])
    rss = GaugeMetricFamily(
        "catchall_process_resident_memory_bytes", "Resident memory, mapped files included.", labels=["process"]
    )
    ready = GaugeMetricFamily("catchall_processes_ready", "Processes that are up and serve.", labels=["role"])
    started = GaugeMetricFamily("catchall_start_time_seconds", "When the supervisor started, unix time.")
    counts = {"shard": 0, "http": 0}
    for slot in page.slots:
        if not slot.pid:
            continue
        try:
            process = psutil.Process(slot.pid)
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
        except psutil.Error:
            continue
        name = slot.role if slot.role == "supervisor" else f"{slot.role}-{slot.index}"
        cpu.add_metric([name], times.user + times.system)
        rss.add_metric([name], memory.rss)
        if slot.role in counts and slot.state == READY:
            counts[slot.role] += 1
    for role, count in counts.items():
        ready.add_metric([role], count)
    started.add_metric([], page.slot("supervisor", 0).cells[STARTED] / 1e9)
    yield from (cpu, rss, ready, started)


class Metrics:
    def __init__(self, page: MetricsPage) -> None:
        self._page = page
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Page(page))

    def answer(self, accept: bytes) -> Response:
        if _wants_json(accept):
            return json_answer(msgspec.json.encode(self.summary()))
        body = generate_latest(self._registry)
        headers = [(b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode()), (b"content-length", b"%d" % len(body))]
        return Response(
            {"type": "http.response.start", "status": 200, "headers": headers}, {"type": "http.response.body", "body": body}
        )

    def summary(self) -> dict[str, object]:
        """The figures that people ask for first, as one flat object. Durations are milliseconds."""
        http = list(self._page.of("http"))
        shards = list(self._page.of("shard"))

        def total(slots: Iterable[Slot], name: str, *labels: str) -> int:
            return sum(slot.cells[cell(name, *labels)] for slot in slots)

        requests = {r: sum(total(http, "catchall_http_requests_total", r, str(c)) for c in CODES) for r in ROUTES}
        failed = sum(total(http, "catchall_http_requests_total", r, str(c)) for r in ROUTES for c in CODES if c >= 500)
        single = {k: total(http, "catchall_http_requests_total", k, "200") for k in ("delivered", "bounced")}
        bulk = {k: total(http, "catchall_bulk_events_total", k) for k in ("delivered", "bounced")}
        buckets, seconds = self._durations(http)
        flushes, flush_seconds = self._flushes(shards)
        flush_rows = total(shards, "catchall_flush_rows_total")
        return {
            "uptime_seconds": round(time.time() - self._page.slot("supervisor", 0).cells[STARTED] / 1e9, 3),
            "requests": sum(requests.values()),
            "requests_by_route": requests,
            "requests_failed": failed,
            "events": sum(single.values()) + sum(bulk.values()),
            "events_delivered": single["delivered"] + bulk["delivered"],
            "events_bounced": single["bounced"] + bulk["bounced"],
            "events_counted": sum(total(shards, "catchall_events_counted_total", k) for k in ("delivered", "bounced")),
            "events_duplicate": total(shards, "catchall_events_duplicate_total"),
            "response_time_avg_ms": round(seconds / max(1, sum(buckets)) * 1e3, 3),
            "response_time_p95_ms": round(quantile(buckets, 0.95) * 1e3, 3),
            "bulk_requests": requests["bulk"],
            "bulk_events_per_request_avg": round(sum(bulk.values()) / max(1, total(http, "catchall_http_requests_total", "bulk",
                                                                                  "200")), 1),
            "batches_flushed": flushes,
            "batch_rows": flush_rows,
            "batch_rows_avg": round(flush_rows / max(1, flushes), 1),
            "batch_time_avg_ms": round(flush_seconds / max(1, flushes) * 1e3, 3),
            "batches_failed": total(shards, "catchall_flush_failures_total"),
            "backlog_bytes": total(shards, "catchall_queue_backlog_bytes"),
        }  # fmt: skip

    @staticmethod
    def _durations(slots: Sequence[Slot]) -> tuple[list[int], float]:
        """(requests by latency bucket, their time in seconds), over all routes."""
        metric, at = next((metric, at) for metric, at in TABLE.items() if metric.name == DURATION)
        width = metric.cells_per_series
        buckets = [
            sum(slot.cells[at + i * width + n] for slot in slots for i in range(len(metric.series))) for n in range(width)
        ]
        return buckets[:-1], buckets[-1] * metric.scale

    @staticmethod
    def _flushes(slots: Sequence[Slot]) -> tuple[int, float]:
        metric, at = next((m, at) for m, at in TABLE.items() if m.name == "catchall_flush_duration_seconds")
        cells = [sum(slot.cells[at + n] for slot in slots) for n in range(metric.cells_per_series)]
        return sum(cells[:-1]), cells[-1] * metric.scale


def quantile(buckets: Sequence[int], q: float) -> float:
    """The q-quantile in seconds of a latency histogram, linear within its bucket, as Prometheus estimates it."""
    rank = q * sum(buckets)
    below = 0.0
    bounds = [0.0, *LATENCY_BUCKETS_S]
    for i, count in enumerate(buckets):
        if count and below + count >= rank:
            if i >= len(LATENCY_BUCKETS_S):
                return LATENCY_BUCKETS_S[-1]
            return bounds[i] + (bounds[i + 1] - bounds[i]) * (rank - below) / count
        below += count
    return 0.0


def _wants_json(accept: bytes) -> bool:
    return any(part.split(b";")[0].strip() == b"application/json" for part in accept.lower().split(b","))
