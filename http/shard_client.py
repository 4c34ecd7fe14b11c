"""The HTTP worker's end of a shard's socket: asks for counts, statistics, keys, repeats and readiness.

All names asked for in one turn of the event loop travel in one frame. While a shard is away its questions wait: they are sent
again when it is back, which is harmless, since reading changes nothing. A question older than `timeout_s` fails, and one fails
at once while a shard that has stopped reading has _OPEN_BYTES_MAX of them before it: nothing piles up here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from catchall.engine.shard_protocol import (
    ANSWER,
    COUNT_PAIR,
    COUNTS,
    KEY,
    KEY_QUESTION,
    PING,
    REPEATS,
    REPEATS_ANSWER,
    STATS,
    STATS_ANSWER,
    UNKNOWN,
    SocketAddress,
    request,
)

log = logging.getLogger("catchall.reads")

_CONNECT_AGAIN_S = 0.05
_LOOK_AGAIN_S = 0.25
_OPEN_BYTES_MAX = 8 << 20  # of questions without an answer
NAMES_PER_FRAME = 10_000


class ShardUnavailable(Exception):
    """The shard did not answer in time. It is being started again, or overloaded: ask again."""


class _Asked:
    """A frame that was sent or waits to be."""

    __slots__ = ("deadline", "fail", "frame", "sent", "take")

    def __init__(self, frame: bytes, deadline: float, take: Callable[[bytes], None], fail: Callable[[Exception], None]) -> None:
        self.frame, self.deadline, self.take, self.fail = frame, deadline, take, fail
        self.sent = False


class ShardClient(asyncio.Protocol):
    def __init__(self, run_folder: Path, shard: int, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = SocketAddress(run_folder, shard)
        self._shard, self._timeout_s = shard, timeout_s
        self._transport: asyncio.WriteTransport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._looking = False
        self._closed = False
        self._inbox = bytearray()
        self._asked: dict[int, _Asked] = {}
        self._open_bytes = 0  # of their frames
        self._writable = False  # there is a connection, and it is not full
        self._number = 0
        self._names: list[bytes] = []
        self._futures: list[asyncio.Future[tuple[int, int]]] = []
        self._connect_soon()

    # ---- questions

    def counts(self, name: bytes) -> asyncio.Future[tuple[int, int]]:
        """(delivered, bounced) of a normalised name. Raises ShardUnavailable."""
        if not self._names:
            self._loop.call_soon(self._send_names)
        future: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        self._names.append(name)
        self._futures.append(future)
        return future

    def _send_names(self) -> None:
        names, futures = self._names, self._futures
        self._names, self._futures = [], []
        for at in range(0, len(names), NAMES_PER_FRAME):
            some = futures[at : at + NAMES_PER_FRAME]
            self._ask(COUNTS, b"\n".join(names[at : at + NAMES_PER_FRAME]), partial(_take_counts, some), some)

    def stats(self) -> asyncio.Future[tuple[int, ...]]:
        """The fields of STATS_ANSWER. Raises ShardUnavailable."""
        return self._ask_one(STATS, STATS_ANSWER.unpack)

    def ping(self) -> asyncio.Future[bytes]:
        """One byte, as in shard_protocol. Raises ShardUnavailable."""
        return self._ask_one(PING, bytes)

    def digest_of(self, partition: int, key: bytes) -> asyncio.Future[bytes]:
        """The digest for which a key was first used, empty if it is not held. Raises ShardUnavailable."""
        return self._ask_one(KEY, bytes, KEY_QUESTION.pack(partition, key))

    def repeats(self, places: Sequence[bytes]) -> asyncio.Future[int | None]:
        """How many events recorded at these places were repeats; None if that is not known. Raises ShardUnavailable."""
        return self._ask_one(REPEATS, _known_repeats, b"".join(places))

    def _ask_one(self, kind: int, parse: Callable[[bytes], Any], payload: bytes = b"") -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()

        def take(answer: bytes) -> None:
            if not future.done():
                future.set_result(parse(answer))

        self._ask(kind, payload, take, [future])
        return future

    def _ask(
        self, kind: int, payload: bytes, take: Callable[[bytes], None], futures: list[asyncio.Future[Any]]
    ) -> None:
        self._number = (self._number + 1) & 0xFFFFFFFF
        frame = request(self._number, kind, payload)

        def fail(error: Exception) -> None:
            for future in futures:
                if not future.done():
                    future.set_exception(error)

        if self._open_bytes + len(frame) > _OPEN_BYTES_MAX:
            fail(ShardUnavailable(f"shard {self._shard} has {self._open_bytes} bytes of questions to answer before this one"))
            return
        self._open_bytes += len(frame)
        asked = self._asked[self._number] = _Asked(frame, time.monotonic() + self._timeout_s, take, fail)
        if self._writable:
            assert self._transport is not None
            self._transport.write(frame)
            asked.sent = True
        if not self._looking:
            self._looking = True
            self._loop.call_later(_LOOK_AGAIN_S, self._look)

    def _send_waiting(self) -> None:
        """The connection takes questions (again): write those that were not sent. Some of them may have timed out here."""
        assert self._transport is not None
        self._writable = True
        unsent = [asked for asked in self._asked.values() if not asked.sent]
        for asked in unsent:
            asked.sent = True
        self._transport.write(b"".join([asked.frame for asked in unsent]))

    def _forget(self, number: int) -> _Asked | None:
        asked = self._asked.pop(number, None)
        if asked is not None:
            self._open_bytes -= len(asked.frame)
        return asked

    def _look(self) -> None:
        """Fail what waited too long."""
        now = time.monotonic()
        for number in [number for number, asked in self._asked.items() if asked.deadline < now]:
            if (asked := self._forget(number)) is not None:
                asked.fail(ShardUnavailable(f"shard {self._shard} did not answer within {self._timeout_s:g} s"))
        self._looking = bool(self._asked)
        if self._looking:
            self._loop.call_later(_LOOK_AGAIN_S, self._look)

    # ---- connection

    def _connect_soon(self) -> None:
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        while not self._closed:
            try:
                await self._loop.create_unix_connection(lambda: self, self._address.path)
            except OSError:
                await asyncio.sleep(_CONNECT_AGAIN_S)
            else:
                return

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by inheritance
        self._inbox.clear()
        for asked in self._asked.values():
            asked.sent = False
        self._send_waiting()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._send_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self._writable = None, False
        if not self._closed:
            log.warning("shard %d closed its connection; reads of its domains wait for it", self._shard)
            self._connect_soon()

    def data_received(self, data: bytes) -> None:
        inbox = self._inbox
        inbox += data
        at = 0
        while len(inbox) - at >= ANSWER.size:
            length, number = ANSWER.unpack_from(inbox, at)
            end = at + 4 + length
            if len(inbox) < end:
                break
            asked = self._forget(number)
            if asked is not None:
                asked.take(bytes(inbox[at + ANSWER.size : end]))
            at = end
        del inbox[:at]

    def close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._transport is not None:
            self._transport.close()
        self._address.close()


def _known_repeats(answer: bytes) -> int | None:
    repeats: int = REPEATS_ANSWER.unpack(answer)[0]
    return None if repeats == UNKNOWN else repeats


def _take_counts(futures: list[asyncio.Future[tuple[int, int]]], answer: bytes) -> None:
    for future, counts in zip(futures, COUNT_PAIR.iter_unpack(answer), strict=True):
        if not future.done():
            future.set_result(counts)
