"""Every metric: name, type, meaning, unit and what to do about it, and the cells that hold it in a process's slot.

Declared here once. Writers address cells by the constants at the end; http/metrics.py reads the table to expose them. No label
ever holds a domain or a raw path.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Literal

from catchall.engine.metrics_page import FIRST_CELL, SLOT_WORDS

NS = 1e-9
ROUTES = ("delivered", "bounced", "bulk", "domain", "stats", "metrics", "healthz", "readyz", "other")
CODES = (200, 400, 404, 405, 408, 413, 415, 422, 500, 503)
LATENCY_BUCKETS_S = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 0.5, 1.0, 5.0)
FLUSH_BUCKETS_S = (1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family.

    series   the label values of each series, in the order of their cells; ((),) for a metric without labels
    scale    what a cell is multiplied by to get the metric's unit
    merge    how the slots of a role become one value: "sum", "max" or "each" (a label named after the role)
    buckets  upper bounds of a histogram in its unit; its cells per series are the buckets, +Inf and the sum
    """

    role: Literal["http", "shard", "supervisor"]
    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ((),)
    scale: float = 1
    merge: Literal["sum", "max", "each"] = "sum"
    buckets: tuple[float, ...] = ()

    @property
    def cells_per_series(self) -> int:
        return len(self.buckets) + 2 if self.kind == "histogram" else 1

    @property
    def size(self) -> int:
        return len(self.series) * self.cells_per_series


def _labelled(*values: str) -> tuple[tuple[str, ...], ...]:
    return tuple((value,) for value in values)


HTTP = (
    Metric(
        "http",
        "counter",
        "catchall_http_requests_total",
        "Requests answered. 503 growing: see catchall_http_refused_total for the reason.",
        ("route", "code"),
        tuple((route, str(code)) for route, code in product(ROUTES, CODES)),
    ),
    Metric(
        "http",
        "histogram",
        "catchall_http_request_duration_seconds",
        "Time from a request's head to its answer. On the routes delivered, bounced and domain one request in 16 is timed "
        "and counts as 16.",
        ("route",),
        _labelled(*ROUTES),
        NS,
        "sum",
        LATENCY_BUCKETS_S,
    ),
    Metric(
        "http",
        "counter",
        "catchall_bulk_events_total",
        "Events recorded by POST /events, counts included. Single events: catchall_http_requests_total, code 200.",
        ("type",),
        _labelled("delivered", "bounced"),
    ),
    Metric("http", "counter", "catchall_bulk_rejected_events_total", "Events of POST /events that were wrong; their request "
           "recorded nothing."),
    Metric("http", "counter", "catchall_http_request_body_bytes_total", "Bytes of bodies read by POST /events."),
    Metric(
        "http",
        "counter",
        "catchall_http_refused_total",
        "Requests refused with 503. backlog: shards are slower than intake or down. no_space: free disk space below "
        "data.min_free_space. disk: a segment could not be made. sync: an fdatasync failed or hangs; both: look for a dying "
        "disk. stopping: the process was about to end. shard: a shard did not answer in time.",
        ("reason",),
        _labelled("backlog", "no_space", "disk", "sync", "stopping", "shard"),
    ),
    Metric("http", "counter", "catchall_queue_appended_bytes_total", "Bytes of event lines published in event queues."),
    Metric("http", "counter", "catchall_queue_segments_made_total", "Segment files made."),
    Metric(
        "http",
        "histogram",
        "catchall_queue_sync_duration_seconds",
        "Time of one round of fdatasync over the dirty queues of a worker.",
        scale=NS,
        buckets=FLUSH_BUCKETS_S,
    ),
    Metric("http", "counter", "catchall_queue_sync_failures_total", "Segments given up because an fdatasync failed. Above 0: "
           "replace the disk."),
)
SHARD = (
    Metric("shard", "counter", "catchall_events_counted_total", "Events counted by shards, after they were recorded.",
           ("type",), _labelled("delivered", "bounced")),
    Metric("shard", "gauge", "catchall_queue_backlog_bytes", "Recorded and not yet counted. Growing: intake is faster than "
           "this shard.", merge="each"),
    Metric("shard", "gauge", "catchall_pending_names", "Names with counts that are not yet in the ledger.", merge="each"),
    Metric("shard", "gauge", "catchall_cached_names", "Names whose counts a shard holds in memory, at most cache.names in all.",
           merge="each"),
    Metric(
        "shard",
        "gauge",
        "catchall_domains",
        "Domains in this host's ledger by status, as of each shard's last commit.",
        ("status",),
        _labelled("catch-all", "not-catch-all", "unknown"),
    ),
    Metric("shard", "histogram", "catchall_flush_duration_seconds", "Time to flush one partition into the ledger.",
           scale=NS, buckets=FLUSH_BUCKETS_S),
    Metric("shard", "counter", "catchall_flush_rows_total", "Rows written by flushes."),
    Metric("shard", "counter", "catchall_flush_failures_total", "Flushes rolled back. They are tried again; the log has the "
           "cause."),
    Metric("shard", "gauge", "catchall_flush_last_success_timestamp_seconds", "When a flush last committed, or a shard last "
           "had nothing to flush.", scale=NS, merge="each"),
    Metric("shard", "counter", "catchall_queue_bad_lines_total", "Lines in event queues that are no events; each was skipped."),
    Metric("shard", "counter", "catchall_queue_unverified_bytes_total",
           "Bytes that were counted after a power cut and no mark covers."),
    Metric("shard", "counter", "catchall_corrupt_files_total", "Files set aside as *.corrupt. Above 0: see the log, "
           "and README, \"Damage\"."),
    Metric("shard", "counter", "catchall_corrupt_rows_total", "Ledger rows whose check did not match. Above 0: see the log."),
    Metric("shard", "gauge", "catchall_mongodb_up", "1 when the last push or read reached MongoDB.", merge="each"),
    Metric("shard", "counter", "catchall_mongodb_pushed_rows_total", "Rows sent to MongoDB."),
    Metric("shard", "counter", "catchall_mongodb_push_failures_total", "Pushes that failed; they are tried again with "
           "back-off, nothing is lost meanwhile."),
    Metric("shard", "gauge", "catchall_mongodb_lag_flushes", "Flushes that MongoDB does not have yet, over all partitions.",
           merge="each"),
)
SUPERVISOR = (
    Metric("supervisor", "counter", "catchall_restarts_total", "Child processes started again after they died.",
           ("child",), _labelled("shard", "http")),
)


def _places(metrics: tuple[Metric, ...]) -> dict[str, int]:
    ends = list(accumulate((metric.size for metric in metrics), initial=FIRST_CELL))
    assert ends[-1] <= SLOT_WORDS, "a slot is too small for its metrics"
    return dict(zip((metric.name for metric in metrics), ends, strict=False))


TABLE: dict[Metric, int] = {m: _places(group)[m.name] for group in (HTTP, SHARD, SUPERVISOR) for m in group}
_AT = {metric.name: at for metric, at in TABLE.items()}


def cell(name: str, *labels: str) -> int:
    """The index of a counter's or gauge's word in a slot. Raises StopIteration for what is not declared."""
    metric = next(m for m in TABLE if m.name == name)
    return _AT[name] + metric.series.index(labels)


class Histogram:
    """Where one series of a histogram lives; `observe` adds to the buckets of a slot."""

    __slots__ = ("_at", "_bounds_ns")

    def __init__(self, name: str, *labels: str) -> None:
        metric = next(m for m in TABLE if m.name == name)
        self._at = _AT[name] + metric.series.index(labels) * metric.cells_per_series
        self._bounds_ns = [round(bound / NS) for bound in metric.buckets]

    def observe(self, cells: memoryview, duration_ns: int, weight: int = 1) -> None:
        cells[self._at + bisect_left(self._bounds_ns, duration_ns)] += weight
        cells[self._at + len(self._bounds_ns) + 1] += duration_ns * weight


def request_cell(route: str, code: int) -> int:
    return cell("catchall_http_requests_total", route, str(code))
