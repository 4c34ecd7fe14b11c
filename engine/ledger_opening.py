"""How a partition comes to its ledger when it is opened: the one that is there, or, in place of one that is over, a new one.

A ledger is lost when it is damaged, gone, emptied, of another folder or partition, condemned by the process that had it open,
or, with a copy in MongoDB, behind what its trace says. It is set aside with its -wal, and so is what its segments held, because
only it knew how much of that was counted. The new one has a new component: MongoDB keeps what the old one had counted.

Set aside   1 the segments: those of dead writers renamed, of living ones copied, to be read on from where they are now
            2 the -wal, then the ledger   3 a new ledger that holds these positions   4 its trace
Superseded  MongoDB knows a later state of the ledger than the ledger itself: the folder is a copy or an old backup. But it is
            whole: the new one goes on from its positions and with its ids, and nothing is set aside but the ledger itself.
            Its mark names the component that is over, so a death anywhere leaves all of it to do, or nothing but the mark.
Died?       Before the ledger's own rename all of it is done again. After it there is a trace and no ledger, or one that was
            never finished: a lost ledger again.
Behind      Without a copy in MongoDB a ledger that lost its last commits is used: its counts and positions went back together.
            Only events whose segments were retired since are missing, and the log says of which flushes.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from catchall.engine.disk import DISK, NO_SPACE, try_lock
from catchall.storage import ledger_trace
from catchall.storage.ledger import Ledger
from catchall.storage.ledger_failures import LedgerDamaged, LedgerFull
from catchall.storage.ledger_rows import HeldId, IdChanges, Position
from catchall.storage.ledger_trace import Noted, Trace

log = logging.getLogger("catchall.partition")

_MARK = "ledger.condemned"
_OVER = "ledger.superseded"


class Opened(NamedTuple):
    ledger: Ledger
    ids: list[HeldId]  # oldest first
    set_aside: int  # files that were set aside for it, or notes of what is missing


def condemn(folder: Path, why: str) -> None:
    """Have the next opening set the partition's ledger aside. The process must exit now."""
    try:
        (folder / _MARK).write_text(why + "\n")
    except OSError as error:  # on a full disk the name alone is there, and says enough
        log.error("%s/%s could not be written: %s", folder, _MARK, error)


def supersede(folder: Path, component: str, why: str) -> None:
    """Have the next opening begin a new ledger where this one is. The process must exit now. Raises OSError."""
    (folder / _OVER).write_text(f"{component}\n{why}\n")


def open_ledger(folder: Path, lock_fd: int, host: str, copied: bool, make: Callable[..., Ledger]) -> Opened:
    """lock_fd  the partition's open `lock`    copied  whether MongoDB holds a copy
    make      Ledger with all arguments that do not depend on its state
    Raises    LedgerFull: open it again when there is room.
    """
    try:
        return _open(folder, lock_fd, host, copied, make)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise LedgerFull(f"{folder}: {error}") from error
        raise


def _open(folder: Path, lock_fd: int, host: str, copied: bool, make: Callable[..., Ledger]) -> Opened:
    path, mark = folder / "ledger.db", folder / _MARK
    noted = ledger_trace.read(lock_fd)
    wal = path.with_name("ledger.db-wal")
    # SQLite writes the first page of a file before its -wal, so that a -wal alone was left behind.
    had_one = noted is not None or any(folder.glob("ledger-*.corrupt")) or (wal.exists() and wal.stat().st_size > 0)
    set_aside = 0
    try:
        if not path.exists():
            mark.unlink(missing_ok=True)  # it was set aside, and a death came before the end of that
            if had_one:
                raise LedgerDamaged(path, "it is gone")
        elif mark.exists():
            raise LedgerDamaged(path, mark.read_text(errors="replace").strip())
        ledger = make(path, component=host, must_exist=had_one)
        if (folder / _OVER).exists():
            ledger = _succeed(folder, ledger, host, make)
            set_aside += 1
        else:
            set_aside += _compare(ledger, noted, copied)
        ids, notes = _ids(ledger)
        set_aside += notes
    except LedgerDamaged as damage:
        set_aside, living = _set_aside(folder, path, damage)
        mark.unlink(missing_ok=True)
        ledger, ids = make(path, component=f"{host}-{secrets.token_hex(4)}", begin=living), []
    try:
        trace = Trace(lock_fd, ledger.meta.uuid)
        trace.begin(ledger.meta.flush)
    except BaseException:
        ledger.close()
        raise
    ledger.trace = trace
    return Opened(ledger, ids, set_aside)


def _ids(ledger: Ledger) -> tuple[list[HeldId], int]:
    """(the ids that it holds, how many notes were left about them). Raises LedgerDamaged, with the ledger closed."""
    try:
        ids, intact = ledger.ids()
    except LedgerDamaged:
        ledger.close()
        raise
    if intact:
        return ids, 0
    what = f"{ledger.path}: some of its ids are damaged; a resend of what has such an id may count twice"
    log.error("%s", what)
    leave_note(ledger.path.parent, "ids", what)
    return ids, 1


def _succeed(folder: Path, ledger: Ledger, host: str, make: Callable[..., Ledger]) -> Ledger:
    """A new ledger in place of one that is superseded, which is kept. Raises LedgerDamaged, LedgerFull."""
    mark, path = folder / _OVER, ledger.path
    component, _, why = mark.read_text(errors="replace").partition("\n")
    if ledger.meta.component != component:  # it was done, and a death came before the mark was gone
        mark.unlink()
        return ledger
    (ids, _), positions, seconds = _ids(ledger), ledger.positions(), ledger.meta.service_seconds
    _close_whole(ledger)
    fresh = folder / "ledger.new"
    for left_over in folder.glob("ledger.new*"):
        left_over.unlink()
    successor = make(fresh, component=f"{host}-{secrets.token_hex(4)}", begin=positions)
    successor.write([], {}, [], successor.meta.tallies, IdChanges(ids, (), seconds))
    _close_whole(successor)
    aside = folder / f"ledger-{time.time_ns()}.superseded"
    os.link(path, aside)
    log.error("%s: %s. It is kept as %s; the counts of partition %s begin anew beside what MongoDB has",
              path, why.strip(), aside.name, folder.name)  # fmt: skip
    fresh.rename(path)
    DISK.sync_folder(str(folder))
    mark.unlink()
    return make(path, component=host, must_exist=True)


def _close_whole(ledger: Ledger) -> None:
    """Close a ledger that is to be renamed: its -wal would stay behind. Raises LedgerFull if there is one left."""
    ledger.close()
    if ledger.path.with_name(f"{ledger.path.name}-wal").exists():  # half of it may have been moved: without it, that is damage
        raise LedgerFull(f"{ledger.path}: what was written beside it could not be moved into it")


def _compare(ledger: Ledger, noted: Noted | None, copied: bool) -> int:
    """The ledger with its trace. Returns how many notes were left; raises LedgerDamaged, with the ledger closed."""
    meta = ledger.meta
    if noted is None and not ledger.is_new:
        log.warning("%s has no trace in the partition's lock, so if it lost its end nobody can tell; it is used", ledger.path)
    elif noted is not None and noted.uuid != meta.uuid:
        log.warning("%s is not the ledger that was here last, as far as its trace can be read; it is used", ledger.path)
    if noted is None or noted.uuid != meta.uuid:
        return 0
    if noted.flush <= meta.flush:
        return 0
    what = f"it is at flush {meta.flush}, and had committed flush {noted.flush}: its end is lost"
    if copied:  # what it would commit from now on, MongoDB would take for what it has already
        ledger.close()
        raise LedgerDamaged(ledger.path, what)
    what += ". Its counts and positions went back together; events whose queue files were removed since are missing"
    log.error("%s: %s", ledger.path, what)
    leave_note(ledger.path.parent, "behind", what)
    return 1


def leave_note(folder: Path, about: str, text: str) -> None:
    """Say in a file that something is missing, so that the service stays degraded until a person has seen it."""
    note = folder / f"{about}-{time.time_ns()}.corrupt"
    try:
        note.write_text(text + "\n")
    except OSError as error:
        log.error("%s could not be written: %s", note, error)


def _set_aside(folder: Path, path: Path, damage: LedgerDamaged) -> tuple[int, dict[str, Position]]:
    """(files set aside, where to go on in the segments whose writers live)"""
    aside = folder / f"ledger-{time.time_ns()}.corrupt"
    log.error("%s. It is set aside as %s; the counts of partition %s begin anew", damage, aside.name, folder.name)
    living: dict[str, Position] = {}
    files = 0
    for segment in (folder / "q").glob("*.seg"):
        log.error("%s (%d bytes): its position is not known, so it is set aside", segment, segment.stat().st_size)
        files += 1
        fd = os.open(segment, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if try_lock(fd):
                segment.rename(segment.with_suffix(".corrupt"))
            else:
                content = segment.read_bytes()
                segment.with_suffix(".corrupt").write_bytes(content)
                published = int.from_bytes(content[64:72], "little")
                living[segment.stem] = Position(min(published, len(content)), 0)
        finally:
            os.close(fd)
    if not path.exists():
        leave_note(folder, "ledger-gone", str(damage))
    for suffix in ("-wal", ""):  # its own name goes last
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(aside.with_name(f"{aside.name}{suffix}"))
    return files + 1, living
