"""`catchall check-data DIR`: examine a data folder that no service uses, and change nothing in it.

Looked at   manifest; for each partition its ledger (SQLite's own check, every row's check, tallies against a count of the rows,
            ids, reading positions, host and partition, the trace in `lock`), its segments (header, newest mark, published
            length, reading position, every unread line); what was set aside before
Exit codes  0 good   1 could not examine: no such folder, in use, no room for a copy   2 wrong use   3 damage found

Ledgers are examined in a copy, one at a time, in the folder for temporary files (TMPDIR): opening one in place would change it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import sqlite3
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from catchall.engine import segment
from catchall.engine.data_folder import FolderError, Manifest, partition_folder, queue_folder, read_manifest
from catchall.engine.disk import boot_id, try_lock
from catchall.engine.ids import Ids, Repeats
from catchall.engine.pending import Pending
from catchall.engine.segment import HEADER_SIZE, PUBLISHED, SEALED, BadSegment
from catchall.storage import ledger_trace
from catchall.storage.ledger import Ledger, meta_row
from catchall.storage.ledger_copy import copied
from catchall.storage.ledger_failures import LedgerDamaged
from catchall.storage.ledger_rows import HeldId, Position, Tallies

GOOD, FAILED, DAMAGED = 0, 1, 3
ROWS_PER_PIECE = 5000
SLICE = 1 << 20
FOR_EVER = float("inf")


@dataclass
class PartitionReport:
    partition: int
    domains: int = 0
    flush: int = 0
    segments: int = 0
    unread_bytes: int = 0  # recorded in the segments and not yet counted
    unread_events: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    folder: str
    host: str = ""
    partitions: list[PartitionReport] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of the folder itself

    @property
    def damaged(self) -> bool:
        return bool(self.set_aside or self.problems or any(partition.problems for partition in self.partitions))


class CannotExamine(Exception):
    pass


def examine(data_dir: Path) -> Report:
    """Raises CannotExamine, OSError."""
    if not data_dir.is_dir():
        raise CannotExamine(f"{data_dir} is no folder")
    with contextlib.ExitStack() as held:
        for path in [data_dir / "lock", *sorted(data_dir.glob("[0-9]*/lock"))]:
            held.enter_context(_held(path))
        report = Report(str(data_dir))
        manifest = _manifest(data_dir, report)
        if manifest is not None:
            report.host = manifest.host_id
            report.partitions = [_partition(data_dir, number, manifest) for number in range(manifest.partitions)]
        report.set_aside = sorted(str(path.relative_to(data_dir)) for path in data_dir.rglob("*.corrupt"))
        return report


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock, so that no service starts meanwhile. Raises CannotExamine if one runs."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        if not try_lock(fd):
            raise CannotExamine(f"{path} is held by a running service; stop it first, or examine a copy of the folder")
        yield
    finally:
        os.close(fd)


def _manifest(data_dir: Path, report: Report) -> Manifest | None:
    try:
        manifest = read_manifest(data_dir)
    except FolderError as error:
        report.problems.append(str(error))
        return None
    if manifest is None:
        if not any(data_dir.glob("[0-9]*/ledger.db")):
            raise CannotExamine(f"{data_dir} holds no data: there is neither a manifest nor a ledger")
        report.problems.append("the manifest is gone; the next start makes it again from the ledgers")
    return manifest


# ---- ledgers


def _partition(data_dir: Path, number: int, manifest: Manifest) -> PartitionReport:
    report = PartitionReport(number)
    folder = partition_folder(data_dir, number)
    noted = None
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            noted = ledger_trace.read(fd)
        finally:
            os.close(fd)
    positions: dict[str, Position] | None = {}
    ids = Ids([], 0, window_s=FOR_EVER)
    path = folder / "ledger.db"
    if path.exists():
        try:
            positions, held = _ledger(path, manifest, report, noted)
            ids = Ids(held, 0, window_s=FOR_EVER)
        except (LedgerDamaged, sqlite3.Error) as damage:
            report.problems.append(str(damage))
            positions = None
    elif noted is not None:
        report.problems.append(f"{path} is gone")
        positions = None
    for segment_path in sorted(queue_folder(data_dir, number).glob("*.seg")):
        report.segments += 1
        try:
            _segment(segment_path, number, manifest, positions, ids, report)
        except (OSError, BadSegment) as bad:
            report.problems.append(f"{segment_path}: {bad}")
    return report


def _ledger(
    path: Path, manifest: Manifest, report: PartitionReport, noted: ledger_trace.Noted | None
) -> tuple[dict[str, Position], list[HeldId]]:
    """Returns its reading positions and ids. Raises LedgerDamaged if a start would set it aside."""
    with copied(path) as copy:
        with contextlib.closing(sqlite3.connect(copy)) as db:
            for (line,) in db.execute("pragma integrity_check(20)"):
                if line != "ok":
                    report.problems.append(f"{path}: {line}")
            threshold = meta_row(db, path)[8]
        ledger = Ledger(
            copy, host=manifest.host_id, component="", partition=report.partition, partitions=manifest.partitions,
            threshold=threshold, synchronous="OFF", must_exist=True,
        )  # fmt: skip
        with contextlib.closing(ledger):
            _rows(path, ledger, report)
            report.flush = ledger.meta.flush
            if noted is not None and noted.uuid == ledger.meta.uuid and noted.flush > ledger.meta.flush:
                report.problems.append(f"{path}: its end is lost: it is at flush {ledger.meta.flush} of {noted.flush}")
            held, intact = ledger.ids()
            if not intact:
                report.problems.append(f"{path}: some of its ids are damaged")
            return ledger.positions(), held


def _rows(path: Path, ledger: Ledger, report: PartitionReport) -> None:
    name: str | None = ""
    while name is not None:
        rows, name = ledger.verify(name, ROWS_PER_PIECE)
        report.domains += rows
    if ledger.damaged_rows:
        kept = ledger.path.with_name("rows.corrupt").read_bytes().splitlines()
        names = [msgspec.json.decode(line)["name"] for line in kept[:5]]
        report.problems.append(f"{path}: {ledger.damaged_rows} rows do not match their check: {', '.join(names)}, …")
    counted: Tallies = ledger.count_tallies()
    if counted != ledger.meta.tallies:
        report.problems.append(f"{path}: its tallies say {ledger.meta.tallies}, and its rows are {counted}")


# ---- segments


def _segment(
    path: Path,
    number: int,
    manifest: Manifest,
    positions: dict[str, Position] | None,
    ids: Ids,
    report: PartitionReport,
) -> None:
    """Raises BadSegment, OSError."""
    with open(path, "rb") as file:
        header = segment.parse_header(file.read(64), os.fstat(file.fileno()).st_size)
        if header.partition != number or header.host_id.hex() != manifest.host_id:
            raise BadSegment(f"belongs to partition {header.partition} of host {header.host_id.hex()}")
        with mmap.mmap(file.fileno(), HEADER_SIZE + header.payload_size, prot=mmap.PROT_READ) as data:
            at = positions.get(path.stem, Position(0, 0)) if positions is not None else Position(0, 0)
            _payload(data, header, at.consumed, ids, report)


def _payload(data: mmap.mmap, header: segment.Header, consumed: int, ids: Ids, report: PartitionReport) -> None:
    with memoryview(data)[:HEADER_SIZE] as view, view.cast("Q") as words:
        published, sealed = words[PUBLISHED], words[SEALED]
    end = published
    if header.boot_id != boot_id():
        end = segment.end_after_power_cut(data, HEADER_SIZE + min(consumed, header.payload_size), len(data)) - HEADER_SIZE
    elif published > header.payload_size or sealed not in (0, published + 1):
        raise BadSegment(f"published {published}, sealed {sealed} of {header.payload_size} contradict each other")
    if consumed > end:
        raise BadSegment(f"the ledger counted {consumed} bytes, and it has {end}")
    mark = segment.newest_mark(data)
    if mark is not None and mark.offset <= max(end, published):
        with memoryview(data) as view:
            if zlib.crc32(view[HEADER_SIZE : HEADER_SIZE + mark.offset]) != mark.crc:
                raise BadSegment(f"the crc of its first {mark.offset} bytes does not match its mark")
    report.unread_bytes += end - consumed
    pending = Pending()
    at, clock = HEADER_SIZE + consumed, 0
    while at < HEADER_SIZE + end:
        stop = min(HEADER_SIZE + end, at + SLICE)
        stop = data.rfind(b"\n", at, stop) + 1 or stop
        clock = pending.count(ids.count(data[at:stop], 0, Repeats(0)), clock)
        at = stop
    deltas, bad = pending.fold()
    report.unread_events += sum(delta.delivered + delta.bounced for delta in deltas.values())
    if bad + pending.bad_lines:
        raise BadSegment(f"{bad + pending.bad_lines} of its unread lines are no events")


# ---- the command


def text_of(report: Report) -> str:
    lines = [f"{report.folder}: host {report.host or 'not known'}, {len(report.partitions)} partitions"]
    for partition in report.partitions:
        lines.append(
            f"  {partition.partition:02d}  {partition.domains} domains at flush {partition.flush}; "
            f"{partition.segments} segments, {partition.unread_events} events in {partition.unread_bytes} bytes to be counted"
        )
        lines += [f"      DAMAGED {problem}" for problem in partition.problems]
    lines += [f"  DAMAGED {problem}" for problem in report.problems]
    lines += [f"  set aside before: {name}" for name in report.set_aside]
    lines.append("damage was found" if report.damaged else "no damage was found")
    return "\n".join(lines)


def check_data(data_dir: Path, as_json: bool) -> int:
    """Print what is found; returns the exit code."""
    logging.getLogger("catchall").addHandler(logging.NullHandler())  # what would be logged is in the report
    try:
        report = examine(data_dir)
    except (CannotExamine, OSError) as error:
        print(f"catchall: {error}", file=sys.stderr)
        return FAILED
    print(msgspec.json.encode(report).decode() if as_json else text_of(report))
    return DAMAGED if report.damaged else GOOD
