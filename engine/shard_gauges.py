"""What a shard says of itself in its slot of the metrics page: gauges, and what is damaged in its partitions."""

from __future__ import annotations

from collections.abc import Sequence

from catchall.engine import metric_names
from catchall.engine.ids import window_held
from catchall.engine.partition import Partition
from catchall.engine.process import Runtime
from catchall.storage.ledger_rows import Tallies

BACKLOG = metric_names.cell("catchall_queue_backlog_bytes")
PENDING_NAMES = metric_names.cell("catchall_pending_names")
CACHED_NAMES = metric_names.cell("catchall_cached_names")
DOMAINS = tuple(metric_names.cell("catchall_domains", s) for s in ("catch-all", "not-catch-all", "unknown"))
IDS_HELD = metric_names.cell("catchall_ids_held")
IDS_WINDOW = metric_names.cell("catchall_ids_window_seconds")
UNVERIFIED = metric_names.cell("catchall_queue_unverified_bytes_total")
CORRUPT_FILES = metric_names.cell("catchall_corrupt_files_total")
CORRUPT_PRESENT = metric_names.cell("catchall_set_aside_files")
CORRUPT_ROWS = metric_names.cell("catchall_corrupt_rows_total")


class Gauges:
    def __init__(self, runtime: Runtime, number: int, partitions: Sequence[Partition]) -> None:
        self._cells = runtime.page.slot("shard", number).cells
        self._settings, self._root, self._first = runtime.settings, runtime.root, number == 0
        self._partitions = partitions
        self._damage_noted = (0, 0, 0)

    def note_backlog(self) -> None:
        """HTTP workers slow bulk requests down by it, so it is kept fresh while there is one."""
        self._cells[BACKLOG] = sum(partition.reader.backlog for partition in self._partitions)

    def set(self) -> None:
        cells, partitions, limits = self._cells, self._partitions, self._settings.ids
        ids = [partition.ids for partition in partitions]
        self.note_backlog()
        cells[PENDING_NAMES] = sum(partition.pending.names for partition in partitions)
        cells[IDS_HELD] = sum(map(len, ids))
        cells[IDS_WINDOW] = int(window_held(ids, limits.max, limits.window))
        cells[CACHED_NAMES] = sum(len(partition.cache) for partition in partitions)
        total = sum((partition.ledger.meta.tallies for partition in partitions), Tallies())
        for at, value in zip(DOMAINS, (total.catch_all, total.not_catch_all, total.unknown), strict=True):
            cells[at] = value

    def note_damage(self) -> bool:
        """Whether the shard is degraded: by what has its traces in the folder, or was found in rows.

        Counters go on from where the last process of this place left them.
        """
        cells, partitions = self._cells, self._partitions
        found = (
            sum(partition.reader.unverified_bytes for partition in partitions),
            sum(partition.set_aside for partition in partitions),
            sum(partition.ledger.damaged_rows for partition in partitions),
        )
        for at, now, before in zip((UNVERIFIED, CORRUPT_FILES, CORRUPT_ROWS), found, self._damage_noted, strict=True):
            cells[at] += now - before
        self._damage_noted = found
        present = sum(partition.corrupt_files() for partition in partitions)
        if self._first:
            present += len(list(self._root.glob("*.corrupt")))
        cells[CORRUPT_PRESENT] = present
        return bool(present or found[2])
