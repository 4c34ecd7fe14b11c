"""The copy of the ledgers that hosts share: one MongoDB document a domain, absolute counts a component.

Documents    <collection>         {_id: name, delivered: {component: n}, bounced: {component: n},
                                   first_at, last_delivered_at, last_bounced_at}          a field that would be 0 is absent
             <collection>_fences  {_id: "component/PP", component, flush, claim, seen_at} how far partition PP was pushed
             <collection>_meta    the statistics and their lease: mongodb_stats.py
             domain_status        a view for people: sums, status, times

A *component* is the share of one ledger in every sum: the id of its host in hex, with "-2", "-3" behind it after a
ledger had to be started anew, and a few random digits more where a copy of the folder may have done the same. It is a
field name, so it holds no dot and no dollar.

Invariants   1 each component of a document is written by one ledger and never falls: counts and last times merge with $max,
               first_at with $min
             2 so a row may be sent twice, late, in any order, by a process that has died since: the sum stays exact
             3 `flush` of a fence says that every row up to that flush is acknowledged by a majority; it never falls
             4 only the writer whose claim is in the fence moves `flush`
Crash        between `send` and `advance` leaves rows that are newer than the fence: the next push sends them again.
Failures     Every method raises MongoError or returns. An answer that leaves durability unproven counts as a failure.
             Nothing is retried here: the caller backs off and sends the same rows again, which is what 2 is for.
"""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import pymongo
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from pymongo import MongoClient, ReadPreference
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern
from pymongo.uri_parser import parse_uri

from catchall.storage import mongodb_stats
from catchall.storage.mongodb_stats import Document, StoredStats

# name, delivered, bounced, first_at, last_delivered_at, last_bounced_at.
# Counts are absolute for one component; times are unix seconds; 0 = never.
Row = tuple[str, int, int, int, int, int]

Build = Callable[[Row, str, dict[int, DatetimeMS]], Document]  # row, component, dates by second -> operation

DUPLICATE_KEY = 11000
BATCH_ROWS_MAX = 50_000  # a message may have 48 MB, and a row up to about 700 bytes
CLOSE_S = 1.0
NAMES_MAX = 10_000  # names one find asks for
DETAIL_CHARS_MAX = 200  # of any text of the server or the driver that goes into an error
DETAILS_MAX = 3  # errors of one answer that are told in words; the others are counted


class MongoError(Exception):
    """What was asked of MongoDB did not happen, or may not have. Asking again is safe. Never holds credentials."""


class MongoUnavailable(MongoError):
    """No usable answer: no primary found in time, the connection was lost, or the answer took too long."""


class MongoRefused(MongoError):
    """MongoDB answered with an error: no permission, an option it does not know, durability not reached."""


class PushFailed(MongoRefused):
    """Some rows were refused, or their durability is unproven. None of them may be taken for saved: send all again."""


class BadMongoURI(ValueError):
    """The URI can never work. The text says why and holds nothing of its user, password and other secrets."""


class Fence(NamedTuple):
    """flush  None: no push has ended, or there is no fence.    claim  None: there is no fence"""

    flush: int | None
    claim: str | None


@dataclass(frozen=True, slots=True)
class MongoOptions:
    """Where the copy is and how long to wait for it. All times are seconds."""

    uri: str = field(repr=False)  # may hold a password
    database: str = "catchall"
    collection: str = "domains"
    connect_timeout: float = 5.0
    server_selection_timeout: float = 5.0  # how long a call waits for a primary
    socket_timeout: float = 30.0  # how long a call waits for one answer
    pool_size: int = 8  # connections, over all threads; who finds none free waits as long as for a primary
    batch_rows: int = 5_000  # rows in one write command, which are encoded in one go: about 1 us a row without other threads

    def __post_init__(self) -> None:
        if not 1 <= self.batch_rows <= BATCH_ROWS_MAX:
            raise ValueError(f"batch_rows is {self.batch_rows}, expected 1 to {BATCH_ROWS_MAX}")


class MongoCopy:
    """This host's side of the shared copy. Make it in the process that uses it; threads may share it.

    Making it connects to nothing and starts no thread; the first call does. Raises BadMongoURI for a URI that can never work.
    """

    def __init__(self, options: MongoOptions) -> None:
        self._client = _client(options)
        self._batch_rows = options.batch_rows
        self._collection = options.collection
        self._database = self._client.get_database(
            options.database, read_concern=ReadConcern("majority"), read_preference=ReadPreference.PRIMARY
        )
        self._documents = self._database[options.collection]
        self._fences = self._database[f"{options.collection}_fences"]
        self._meta = self._database[f"{options.collection}_meta"]

    def claim(self, component: str, partition: int, claim: str) -> Fence:
        """Write `claim` into the fence and return what it held. Raises MongoError."""
        key = _fence_key(component, partition)
        change: Document = {"$set": {"claim": claim, "component": component}, "$currentDate": {"seen_at": True}}
        with _asking(f"claim of {key}"):
            try:
                before = self._fences.find_one_and_update({"_id": key}, change, upsert=True)
            except DuplicateKeyError:  # two made the fence at once: now it is there
                before = self._fences.find_one_and_update({"_id": key}, change, upsert=True)
        return Fence(None, None) if before is None else Fence(before.get("flush"), before.get("claim"))

    def send(self, rows: Sequence[Row], component: str, new_names: Container[str] = frozenset()) -> None:
        """Merge `rows` into the copy; on return all of them are on the disks of a majority.

        rows       absolute counts of `component`. Sorted by name costs least; otherwise they are sorted here, which holds
                   the interpreter for about 0.4 us a row. A row without counts says nothing and is left out.
        new_names  names that MongoDB is thought not to have: inserted, 3 times as fast. A wrong guess only costs time.
        Raises     PushFailed, MongoUnavailable: some rows may be there, send all again.
        """
        _check_field_name(component)
        told = sorted((row for row in rows if row[1] or row[2]), key=itemgetter(0))
        fresh = [row for row in told if row[0] in new_names]
        known = [row for row in told if row[0] not in new_names] if fresh else told
        with _asking(f"push of {len(told)} rows", PushFailed):
            already_there = self._write("insert", "documents", fresh, _document, component)
            known = sorted(known + already_there, key=itemgetter(0))
            raced = self._write("update", "updates", known, _update, component)  # two upserts of a new name met: again
            lost = self._write("update", "updates", raced, _update, component)
        if lost:
            raise PushFailed(f"push of {len(told)} rows: {len(lost)} names neither there nor to be made, {lost[0][0]!r} first")

    def advance(self, component: str, partition: int, claim: str, flush: int) -> bool:
        """Record in the fence that every row up to `flush` is there. False: another writer has claimed it since.

        Call it only after `send` returned for all of them. Raises MongoError.
        """
        key = _fence_key(component, partition)
        change: Document = {"$max": {"flush": flush}, "$currentDate": {"seen_at": True}}
        with _asking(f"advance of {key}"):
            return self._fences.update_one({"_id": key, "claim": claim}, change).matched_count == 1

    def others(self, names: Sequence[str], component_of: Callable[[str], str]) -> dict[str, tuple[int, int]]:
        """Return what all other components hold: {name: (delivered, bounced)}.

        component_of  name -> the component whose share is left out, the caller's own for that name.
        A name that MongoDB does not have is absent; one that only the own component has is (0, 0).
        Reads what a majority has, from the primary. Raises MongoError.
        """
        held: dict[str, tuple[int, int]] = {}
        with _asking(f"read of {len(names)} names"):
            for start in range(0, len(names), NAMES_MAX):
                asked = list(names[start : start + NAMES_MAX])
                wanted = {"delivered": True, "bounced": True}
                for document in self._documents.find({"_id": {"$in": asked}}, wanted, batch_size=len(asked) + 1):
                    name: str = document["_id"]
                    own = component_of(name)
                    held[name] = (_without(own, document.get("delivered")), _without(own, document.get("bounced")))
        return held

    def fences(self) -> dict[tuple[str, int], int]:
        """Return the `flush` of every fence there is, of all hosts, by (component, partition); 0 where no push has ended.

        One small document for each partition of each host, so this is cheap at any number of domains. Raises MongoError.
        """
        found: dict[tuple[str, int], int] = {}
        with _asking("read of the fences"):
            for fence in self._fences.find({}, {"flush": True}):
                component, _, partition = str(fence["_id"]).rpartition("/")
                if partition.isdecimal():
                    found[component, int(partition)] = fence.get("flush", 0)
        return found

    def ensure_view(self, threshold: int) -> None:
        """Make the view `domain_status`, or move it to `threshold`.

        Raises MongoRefused (say, no permission, or a collection of that name) and MongoUnavailable. Nothing else depends
        on the view, so the caller logs it and goes on.
        """
        with _asking(f"making the view {mongodb_stats.VIEW}"):
            mongodb_stats.ensure_view(self._database, self._collection, threshold)

    def refresh_stats(self, threshold: int, now: float, holder: str, lease_s: float) -> bool:
        """Count the domains of each status and store the numbers, if no other holder has the lease. True: stored.

        now      unix seconds.    holder  any text that no other caller uses.
        lease_s  seconds for which others keep away; also the longest the scan may take. Call again before it ends to stay
                 the holder.
        Raises   MongoError; the lease then simply runs out.
        """
        with _asking("statistics"):
            return mongodb_stats.refresh(self._database, self._collection, self._meta, threshold, now, holder, lease_s)

    def stored_stats(self, threshold: int) -> StoredStats | None:
        """Return the numbers last stored for this threshold by any host; None before the first. Raises MongoError."""
        with _asking("read of the statistics"):
            return mongodb_stats.stored(self._meta, threshold)

    def close(self) -> None:
        """Close all connections, waiting at most a second for a server that is away. The object cannot be used afterwards."""
        with pymongo.timeout(CLOSE_S):  # closing says good-bye to the server, and looks for a primary to do so
            self._client.close()

    def _write(self, verb: str, operand: str, rows: list[Row], build: Build, component: str) -> list[Row]:
        """Write rows in batches; return those whose names were there already. Any other fault raises PushFailed.

        The plain command instead of bulk_write: about 15 % more rows a second for two thirds of the client's time, no
        exception that grows with the batch, and both kinds of error of an answer are looked at in one place.
        """
        already_there: list[Row] = []
        for start in range(0, len(rows), self._batch_rows):
            batch = rows[start : start + self._batch_rows]
            dates = _Dates()
            command: Document = {verb: self._collection, "ordered": False, "writeConcern": self._client.write_concern.document}
            command[operand] = [build(row, component, dates) for row in batch]
            answer = self._database.command(command)
            faults = answer.get("writeErrors", [])
            duplicates = [batch[fault["index"]] for fault in faults if fault.get("code") == DUPLICATE_KEY]
            if len(duplicates) != len(faults) or "writeConcernError" in answer or answer.get("n") != len(batch) - len(faults):
                raise PushFailed(_told(verb, len(batch), answer))
            already_there += duplicates
        return already_there


class _Dates(dict[int, DatetimeMS]):
    """Unix seconds -> BSON date. Rows of one flush share few seconds, so most dates are made once."""

    def __missing__(self, second: int) -> DatetimeMS:
        date = self[second] = DatetimeMS(second * 1000)
        return date


def _document(row: Row, component: str, dates: dict[int, DatetimeMS]) -> Document:
    """Return the document of a name that is new."""
    name, delivered, bounced, first_at, last_delivered_at, last_bounced_at = row
    document: Document = {"_id": name}
    if delivered:
        document["delivered"] = {component: delivered}
    if bounced:
        document["bounced"] = {component: bounced}
    if first_at:
        document["first_at"] = dates[first_at]
    if last_delivered_at:
        document["last_delivered_at"] = dates[last_delivered_at]
    if last_bounced_at:
        document["last_bounced_at"] = dates[last_bounced_at]
    return document


def _update(row: Row, component: str, dates: dict[int, DatetimeMS]) -> Document:
    """Return the update that merges a row with whatever is there, or makes the document."""
    name, delivered, bounced, first_at, last_delivered_at, last_bounced_at = row
    highest: Document = {}
    if delivered:
        highest[f"delivered.{component}"] = delivered
    if bounced:
        highest[f"bounced.{component}"] = bounced
    if last_delivered_at:
        highest["last_delivered_at"] = dates[last_delivered_at]
    if last_bounced_at:
        highest["last_bounced_at"] = dates[last_bounced_at]
    change: Document = {"$max": highest}
    if first_at:
        change["$min"] = {"first_at": dates[first_at]}
    return {"q": {"_id": name}, "u": change, "upsert": True}


def _without(own: str, shares: Mapping[str, int] | None) -> int:
    return sum(count for component, count in shares.items() if component != own) if shares else 0


def _check_field_name(component: str) -> None:
    if not re.fullmatch(r"[0-9A-Za-z_-]+", component):
        raise ValueError(f"component {component!r}: expected letters, digits, '-' and '_', since it is a field name in MongoDB")


def _fence_key(component: str, partition: int) -> str:
    _check_field_name(component)
    return f"{component}/{partition:02d}"


def _cut(text: object) -> str:
    return str(text)[:DETAIL_CHARS_MAX]


def _told(verb: str, row_count: int, answer: Mapping[str, Any]) -> str:
    """Say what is wrong with the answer to a write, in a few hundred characters however many rows it has."""
    faults = answer.get("writeErrors", [])
    parts = [f"{verb} of {row_count} rows: {len(faults)} refused, {answer.get('n')} accepted"]
    if concern := answer.get("writeConcernError"):
        parts.append(f"durability unproven (code {concern.get('code')}: {_cut(concern.get('errmsg'))})")
    if faults:
        codes = Counter(fault.get("code") for fault in faults).most_common(5)
        parts.append("codes " + ", ".join(f"{code} x {count}" for code, count in codes))
        parts += [_cut(fault.get("errmsg")) for fault in faults[:DETAILS_MAX]]
    return "; ".join(parts)


@contextmanager
def _asking(what: str, refused: type[MongoRefused] = MongoRefused) -> Iterator[None]:
    """Turn the exceptions of the driver into ours. Their causes are dropped: they repeat whole batches and topologies."""
    try:
        yield
    except PyMongoError as failure:
        details = failure.details if isinstance(failure, OperationFailure) else None
        if details is None or failure.timeout:
            raise MongoUnavailable(f"{what}: {type(failure).__name__}: {_cut(failure)}") from None
        kind = details.get("codeName", type(failure).__name__)
        raise refused(f"{what}: code {details.get('code')} {kind}: {_cut(details.get('errmsg'))}") from None
    except (BSONError, OverflowError, UnicodeError) as failure:
        raise refused(f"{what}: a value that BSON cannot hold: {type(failure).__name__}: {_cut(failure)}") from None


def check_uri(uri: str) -> None:
    """Raises BadMongoURI for one that can never work. Connects to nothing."""
    _client(MongoOptions(uri=uri)).close()


def _client(options: MongoOptions) -> MongoClient[Document]:
    """Make the client, connecting to nothing. Raises BadMongoURI."""
    try:
        return _connectable(options, options.uri)
    except (PyMongoError, ValueError, TypeError) as failure:
        reason = str(failure)
    # The driver quotes what it stumbled over, which may be a part of the password. So it is asked again about the same
    # URI with harmless secrets: a fault that stays lies elsewhere and may be quoted.
    scheme, _, rest = options.uri.partition("://")
    userinfo, _, hosts = rest.rpartition("@")
    harmless = f"{scheme}://{'user:password@' if userinfo else ''}{hosts}"
    harmless = re.sub(r"(?i)(password|properties)=[^&;]*", r"\1=***", harmless)
    if harmless != options.uri:
        try:
            _connectable(options, harmless).close()
            reason = "the fault is in its user, password or another secret; these must be percent-encoded"
        except (PyMongoError, ValueError, TypeError) as failure:
            reason = str(failure)
    raise BadMongoURI(
        f"the URI of MongoDB cannot be used: {_cut(reason)}. Expected mongodb://[user:password@]host[:port][,...][/?options]"
    )


def _connectable(options: MongoOptions, uri: str) -> MongoClient[Document]:
    if not uri.startswith("mongodb+srv://"):  # that form needs DNS, so it is looked at only when connecting
        parse_uri(uri, warn=False)  # strict: an unknown option is an error
    return MongoClient(
        uri,
        connect=False,
        appname="catchall",
        connectTimeoutMS=int(options.connect_timeout * 1000),
        serverSelectionTimeoutMS=int(options.server_selection_timeout * 1000),
        waitQueueTimeoutMS=int(options.server_selection_timeout * 1000),
        socketTimeoutMS=int(options.socket_timeout * 1000),
        maxPoolSize=options.pool_size,
        retryWrites=False,  # half the rate, and the caller sends again anyway
        w="majority",
        journal=True,
        wTimeoutMS=max(1, int(options.socket_timeout * 800)),  # the server gives up first, and the connection stays usable
    )
