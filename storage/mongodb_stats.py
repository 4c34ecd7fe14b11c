"""What MongoDB works out from the documents of all hosts: the view `domain_status`, and the numbers of each status.

The status of a domain needs the sum over the components of all hosts, which no ledger knows, so the rule is written here
once more in the server's language: any bounce makes a domain `not-catch-all`; otherwise more than `threshold` deliveries
make it a `catch-all`; exactly the threshold is still `unknown`.

Statistics   One document a threshold in `<collection>_meta`, which is also the lease:
             {_id: "stats/<threshold>", holder, until, catch_all, not_catch_all, unknown, total, timestamp}
             Whoever takes the lease scans the collection once, as of one snapshot, and stores the result in the same
             document, if the lease is still its own. A holder that dies is followed when `until` has passed. Clocks of
             hosts may differ: a lease that ends later than any taken now could end is no lease.
The functions let pymongo's exceptions through; `mongodb.MongoCopy` turns them into its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pymongo
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError, OperationFailure

VIEW = "domain_status"
NAMESPACE_EXISTS = 48
NO_SNAPSHOTS = frozenset({72, 123})  # InvalidOptions (before 5.0), NotAReplicaSet (standalone)

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredStats:
    """How many domains have each status, over all hosts, at `timestamp`."""

    catch_all: int
    not_catch_all: int
    unknown: int
    total: int
    timestamp: int  # unix seconds: everything MongoDB held then is in the numbers
    threshold: int


def summed(field: str) -> Document:
    """Return an expression for the sum over all components; 0 for a document without the field."""
    return {"$sum": {"$map": {"input": {"$objectToArray": f"${field}"}, "in": "$$this.v"}}}


def status(threshold: int, delivered: str, bounced: str) -> Document:
    """Return an expression for the status, given expressions for both sums."""
    rules = [
        {"case": {"$gt": [bounced, 0]}, "then": "not-catch-all"},
        {"case": {"$gt": [delivered, threshold]}, "then": "catch-all"},
    ]
    return {"$switch": {"branches": rules, "default": "unknown"}}


def view_pipeline(threshold: int) -> list[Document]:
    """Return the pipeline behind the view: one document a domain, readable as it is.

    Fields that are kept stay where they were and fields that are made come behind them in the order given. So all of them
    are made, from others with short names: then people see the domain first and the times last. A search of the view by
    _id or by domain still uses the index of _id, since the server follows the new names back.
    """
    times = {"first": "$first_at", "last_delivered": "$last_delivered_at", "last_bounced": "$last_bounced_at"}
    sums = {"delivered": summed("delivered"), "bounced": summed("bounced")}
    return [
        {"$project": {"sum": sums, **times}},
        {
            "$project": {
                "domain": "$_id",
                "delivered": "$sum.delivered",
                "bounced": "$sum.bounced",
                "status": status(threshold, "$sum.delivered", "$sum.bounced"),
                "first_at": "$first",
                "last_delivered_at": "$last_delivered",
                "last_bounced_at": "$last_bounced",
            }
        },
    ]


def ensure_view(database: Database[Document], collection: str, threshold: int) -> None:
    """Make the view, or give the one that is there this pipeline. Readers never see it missing."""
    pipeline = view_pipeline(threshold)
    try:
        database.command("create", VIEW, viewOn=collection, pipeline=pipeline)
    except OperationFailure as failure:
        if failure.code != NAMESPACE_EXISTS:
            raise
        database.command("collMod", VIEW, viewOn=collection, pipeline=pipeline)


def stats_pipeline(threshold: int) -> list[Document]:
    """Return the pipeline that counts the domains of each status in one pass."""
    return [
        {"$project": {"_id": 0, "delivered": summed("delivered"), "bounced": summed("bounced")}},
        {"$group": {"_id": status(threshold, "$delivered", "$bounced"), "domains": {"$sum": 1}}},
    ]


def take_lease(meta: Collection[Document], key: str, now: float, holder: str, lease_s: float) -> bool:
    """Take or renew the lease in one atomic step; False when another holds it."""
    until = now + lease_s
    free = [{"holder": holder}, {"until": None}, {"until": {"$lte": now}}, {"until": {"$gt": until}}]
    try:
        meta.update_one({"_id": key, "$or": free}, {"$set": {"holder": holder, "until": until}}, upsert=True)
    except DuplicateKeyError:  # the document is there and did not match: another's lease
        return False
    return True


def count_statuses(database: Database[Document], collection: str, threshold: int, now: float) -> StoredStats:
    """Scan the collection once, as of one instant where the server can, and return the numbers."""
    command: Document = {"aggregate": collection, "pipeline": stats_pipeline(threshold), "cursor": {}}
    try:
        answer = database.command({**command, "readConcern": {"level": "snapshot"}})
    except OperationFailure as failure:
        if failure.code not in NO_SNAPSHOTS:
            raise
        answer = database.command({**command, "readConcern": {"level": "majority"}})
    cursor = answer["cursor"]
    domains = {group["_id"]: int(group["domains"]) for group in cursor["firstBatch"]}
    taken = cursor.get("atClusterTime")
    return StoredStats(
        catch_all=domains.get("catch-all", 0),
        not_catch_all=domains.get("not-catch-all", 0),
        unknown=domains.get("unknown", 0),
        total=sum(domains.values()),
        timestamp=taken.time if taken is not None else int(now),
        threshold=threshold,
    )


def refresh(
    database: Database[Document], collection: str, meta: Collection[Document],
    threshold: int, now: float, holder: str, lease_s: float,
) -> bool:  # fmt: skip
    """See `MongoCopy.refresh_stats`."""
    key = f"stats/{threshold}"
    if not take_lease(meta, key, now, holder, lease_s):
        return False
    with pymongo.timeout(lease_s):  # the scan of a large collection may outlast the socket's time-out, never the lease
        found = count_statuses(database, collection, threshold, now)
    numbers = {
        "catch_all": found.catch_all,
        "not_catch_all": found.not_catch_all,
        "unknown": found.unknown,
        "total": found.total,
        "timestamp": datetime.fromtimestamp(found.timestamp, UTC),
        "threshold": threshold,
    }
    return meta.update_one({"_id": key, "holder": holder}, {"$set": numbers}).matched_count == 1


def stored(meta: Collection[Document], threshold: int) -> StoredStats | None:
    """See `MongoCopy.stored_stats`."""
    found: Mapping[str, Any] | None = meta.find_one({"_id": f"stats/{threshold}", "total": {"$exists": True}})
    if found is None:
        return None
    return StoredStats(
        catch_all=found["catch_all"],
        not_catch_all=found["not_catch_all"],
        unknown=found["unknown"],
        total=found["total"],
        timestamp=int(found["timestamp"].replace(tzinfo=UTC).timestamp()),
        threshold=threshold,
    )
