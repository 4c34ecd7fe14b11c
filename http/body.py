"""Reading a request's body within its limits: bytes held, time without progress, time in all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]

TOTAL_FACTOR = 6  # a whole body may take this many times read_timeout, however steadily it drips


class BodyTooLarge(Exception):
    pass


class BodyStalled(Exception):
    pass


class ClientGone(Exception):
    """The body ended before it was complete: the connection was closed, or its chunks are malformed."""


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; names come in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return None


async def read_body(receive: Receive, declared: int | None, bytes_max: int, timeout_s: float) -> bytes:
    """The whole body. Holds at most `bytes_max` bytes and one chunk more.

    declared  the content length, if the client told it
    Raises    BodyTooLarge, BodyStalled, ClientGone.
    """
    if declared is not None and declared > bytes_max:
        raise BodyTooLarge
    chunks: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    whole = loop.time() + TOTAL_FACTOR * timeout_s
    while True:
        patience = min(timeout_s, whole - loop.time())
        try:
            message = await asyncio.wait_for(receive(), patience)
        except TimeoutError:
            raise BodyStalled from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > bytes_max:
            raise BodyTooLarge
        if not message.get("more_body"):
            return b"".join(chunks) + chunk if chunks else chunk
        chunks.append(chunk)
