"""Writes that count once however often they are sent: the Idempotency-Key of a request, and ids of events.

Order       The shard of the key is asked which request it was used for. If for none, the key is recorded, with a digest of the
            request, and the shard is asked again. Another one than this: 422, and nothing was counted. Only then are the
            events recorded, each with an id made of key, digest and index, so that a repeat after whatever failure counts
            what is missing and nothing else.
Answer      A repeat is answered like the first request. What was counted now and what had been counted before is told in
            headers: Catchall-Counted, Catchall-Duplicate. They are left out when the shard could not be asked in time or had
            died in between: the events are recorded all the same.
            They tell what was decided and perhaps not yet flushed: a shard that dies decides anew, perhaps in another order.
Window      [ids] in the settings. Beyond it a repeat is a new request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from catchall.engine import lines
from catchall.engine.ids import ids_of_request, key_id, request_digest
from catchall.engine.rules import shard_of
from catchall.engine.shard_protocol import PLACE
from catchall.http.bulk import IdOf
from catchall.http.shard_client import ShardUnavailable
from catchall.http.worker import Worker

HEADER = b"idempotency-key"
KEY_BYTES_MAX = 255
OUTCOME_WAIT_S = 1.0  # an answer waits no longer for the numbers in its headers


class BadKey(ValueError):
    """The header cannot be used."""


class KeyReused(Exception):
    """The key was used before, for another request."""


class Key:
    """An Idempotency-Key and what tells its request from any other."""

    def __init__(self, given: bytes, content: bytes) -> None:
        self.hash, self.digest = key_id(given), request_digest(content)
        self.id_of: IdOf = ids_of_request(self.hash, self.digest)

    @property
    def line(self) -> bytes:
        return lines.key_line(self.hash, self.digest)


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The value of the header, None without one. Raises BadKey."""
    found = [value for name, value in headers if name == HEADER]
    if not found:
        return None
    if len(found) > 1:
        raise BadKey("Idempotency-Key is given more than once")
    if not 1 <= len(found[0]) <= KEY_BYTES_MAX:
        raise BadKey(f"Idempotency-Key has {len(found[0])} bytes; it must have 1 to {KEY_BYTES_MAX}")
    return found[0]


async def claim(worker: Worker, key: Key) -> None:
    """Record the key. On return the request with this digest is the one it stands for.

    Raises  KeyReused, Refused, ShardUnavailable; nothing was counted then.
    """
    partition = int(key.hash, 16) % worker.runtime.manifest.partitions
    shard = worker.shards[shard_of(partition, len(worker.shards))]
    given = bytes.fromhex(key.hash.decode())
    # Asked first, so that no line is recorded of a request that is refused: a shard that dies before it has committed the
    # first line may be followed by one that reads the two in the other order.
    held = await shard.digest_of(partition, given)
    if not held:
        await worker.queues.record({partition: key.line})
        held = await shard.digest_of(partition, given)
    if held and held.hex().encode() != key.digest:
        raise KeyReused


async def repeats(worker: Worker, places: Sequence[bytes]) -> int | None:
    """How many of the events recorded at `places` were repeats; None if that cannot be told."""
    of_shard: dict[int, list[bytes]] = {}
    for place in places:
        of_shard.setdefault(shard_of(PLACE.unpack(place)[0], len(worker.shards)), []).append(place)
    asked = (worker.shards[shard].repeats(some) for shard, some in of_shard.items())
    try:
        found = await asyncio.wait_for(asyncio.gather(*asked), OUTCOME_WAIT_S)
    except (TimeoutError, ShardUnavailable):
        return None
    known = [number for number in found if number is not None]
    return sum(known) if len(known) == len(found) else None
