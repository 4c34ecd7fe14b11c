"""Every setting of the service: its name, type, bounds and default, as one immutable value.

Shape       Settings holds one struct a section, each field of which is a setting named "section.key". Durations are float
            seconds and sizes are int bytes here; people write "250ms" and "4MiB" (settings_values.py reads those).
Flow        settings_sources.load lays flags over the environment over a file over the defaults below, and resolves what is
            "auto". The supervisor hands the result to its children as JSON: to_json and from_json.
Invariants  1 a loaded Settings passed every bound below and every row of AT_MOST
            2 a loaded Settings has no 0 left in shards.workers, server.http_workers and data.backlog_max (a bare one has)
            3 a value is never printed with a password in it: see masked
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Struct, field

from catchall.engine.settings_values import MAX_INT, count, mask, seconds, size, text

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HOUR = 3600.0
SEGMENTS_A_QUEUE = 4  # that data.backlog_max has room for, unless it was given
SEGMENTS_A_QUEUE_MIN = 2  # an open one and the next; idle queues hold theirs, and with less room others would wait for ever

PathText = Annotated[str, text("a path")]
Port = Annotated[int, count(1, 65535)]
# Where 0 has a meaning of its own ("do not wait", "never serve from memory"), the bound says so; elsewhere 1 ms is the least.
Wait = Annotated[float, seconds(0.0, HOUR)]
Interval = Annotated[float, seconds(0.001, HOUR)]
Bytes = Annotated[int, size(0, MAX_INT)]

URI = Annotated[str, text("a URI that starts with mongodb:// or mongodb+srv://", r"^mongodb(\+srv)?://.")]
DatabaseName = Annotated[
    str, text('1 to 63 characters, none of them / \\ . " $ or a space', r'^[^/\\. "$\x00-\x1f]{1,63}\Z')
]
CollectionName = Annotated[
    str, text('1 to 120 characters, no $ among them, not starting with "system."', r"^(?!system\.)[^$\x00-\x1f]{1,120}\Z")
]


class Server(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP front door."""

    host: Annotated[str, text("a host name or an address")] = "127.0.0.1"
    port: Port = 8081
    http_workers: Annotated[int, count(0, 1024)] = 0
    read_timeout: Interval = 10.0
    write_timeout: Interval = 10.0
    idle_timeout: Annotated[float, seconds(1.0, 60.0)] = 60.0  # the server library takes no more
    shutdown_timeout: Interval = 30.0
    backlog: Annotated[int, count(1, 65535)] = 4096
    backpressure: Annotated[int, count(1, 1_000_000)] = 4096
    access_log: bool = False
    task_impl: Literal["asyncio", "rust"] = "asyncio"


class Shards(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The counting processes."""

    workers: Annotated[int, count(0, 256)] = 0


class Data(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The folder with the event queues and the ledger."""

    dir: PathText = "./catchall-data"
    partitions: Annotated[int, count(1, 256)] = 16
    segment_size: Annotated[int, size(64 * KIB, GIB)] = 4 * MIB
    fsync: Literal["interval", "always", "never"] = "interval"
    fsync_interval: Interval = 1.0
    backlog_max: Bytes = 0
    min_free_space: Bytes = 256 * MIB
    hold: Wait = 1.0
    reserve: Bytes = 64 * MIB


class Storage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where totals live, and how often they go there."""

    kind: Literal["sqlite", "memory", "mongodb"] = "sqlite"
    flush_interval: Interval = 1.0
    flush_rows: Annotated[int, count(1, 100_000_000)] = 200_000
    ledger_cache: Annotated[int, size(MIB, MAX_INT)] = 256 * MIB
    memory_dir: PathText = "/dev/shm"


class MongoDB(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The copy that several hosts share; used when storage.kind is "mongodb"."""

    uri: URI = "mongodb://127.0.0.1:27017"
    database: DatabaseName = "catchall"
    collection: CollectionName = "domains"
    connect_timeout: Interval = 5.0
    server_selection_timeout: Interval = 5.0
    socket_timeout: Interval = 30.0
    pool_size: Annotated[int, count(1, 1000)] = 2
    batch_rows: Annotated[int, count(1, 50_000)] = 5000
    push_interval: Interval = 1.0
    backoff_min: Interval = 0.1
    backoff_max: Interval = 10.0
    stats_interval: Interval = 60.0

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in msgspec.structs.asdict(self).items() if k != "uri")
        return f"MongoDB(uri={mask(self.uri)!r}, {shown})"


class Rules(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a domain is a catch-all."""

    threshold: Annotated[int, count(0, MAX_INT)] = 1000


class Cache(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept in memory, of what was read or parsed before."""

    enabled: bool = True
    ttl: Annotated[float, seconds(0.0, 24 * HOUR)] = 300.0
    names: Annotated[int, count(0, 1_000_000_000)] = 1_000_000
    paths: Annotated[int, count(0, 100_000_000)] = 100_000


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may ask for."""

    body: Annotated[int, size(KIB, GIB)] = 8 * MIB
    events: Annotated[int, count(1, 10_000_000)] = 10_000
    pause_backlog: Bytes = 8 * MIB


class Metrics(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The counters behind GET /metrics."""

    enabled: bool = True
    interval: Interval = 1.0


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes to stderr."""

    format: Literal["auto", "text", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one host. Settings() is the defaults, with the sizes from the CPU count still unresolved (0)."""

    server: Server = field(default_factory=Server)
    shards: Shards = field(default_factory=Shards)
    data: Data = field(default_factory=Data)
    storage: Storage = field(default_factory=Storage)
    mongodb: MongoDB = field(default_factory=MongoDB)
    rules: Rules = field(default_factory=Rules)
    cache: Cache = field(default_factory=Cache)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    log: Log = field(default_factory=Log)


# Settings that bound each other: the first may be at most the second, because of the third.
AT_MOST = (
    ("shards.workers", "data.partitions", "a shard without a partition would have nothing to do"),
    ("data.segment_size", "data.backlog_max", "not even one segment would fit"),
    ("mongodb.backoff_min", "mongodb.backoff_max", "the wait grows from the one to the other"),
)


def resolve(settings: Settings, cpus: int) -> Settings:
    """The same settings with concrete sizes, for `cpus` CPUs that this service may use.

    Half of the CPUs count (never more shards than partitions), the rest answer HTTP; at least one of each. A number that was
    given stays as it is. Event queues may take 2 GiB, or room for a few segments each where there are many of them.
    """
    shards = settings.shards.workers or max(1, min(cpus // 2, settings.data.partitions))
    http = settings.server.http_workers or max(1, cpus - shards)
    data = settings.data
    backlog_max = data.backlog_max or max(2 * GIB, SEGMENTS_A_QUEUE * http * data.partitions * data.segment_size)
    return msgspec.structs.replace(
        settings,
        server=msgspec.structs.replace(settings.server, http_workers=http),
        shards=msgspec.structs.replace(settings.shards, workers=shards),
        data=msgspec.structs.replace(data, backlog_max=backlog_max),
    )


def backlog_least(settings: Settings, partitions: int) -> int:
    """The least data.backlog_max that cannot refuse writes although everything is counted."""
    return SEGMENTS_A_QUEUE_MIN * settings.server.http_workers * partitions * settings.data.segment_size


def masked(settings: Settings) -> Settings:
    """The same settings, fit to be printed: the password in mongodb.uri is stars."""
    return msgspec.structs.replace(
        settings, mongodb=msgspec.structs.replace(settings.mongodb, uri=mask(settings.mongodb.uri))
    )


def to_json(settings: Settings) -> bytes:
    """For a child process: passwords included, so the file that holds it must be private to its owner."""
    return msgspec.json.encode(settings)


def from_json(document: bytes) -> Settings:
    """The inverse of to_json. Raises msgspec.ValidationError for an unknown key or a value out of bounds."""
    return msgspec.json.decode(document, type=Settings)
