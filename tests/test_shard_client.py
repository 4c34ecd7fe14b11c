"""What an HTTP worker keeps for a shard that has stopped reading: little, and not for long."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from catchall.engine.shard_protocol import COUNT_PAIR, REQUEST, answer
from catchall.http import shard_client
from catchall.http.shard_client import ShardClient, ShardUnavailable

NAME = b"n" * 200 + b".example"
PATIENCE_S = 60.0


@contextlib.asynccontextmanager
async def connected(folder: Path, timeout_s: float) -> AsyncIterator[tuple[ShardClient, socket.socket]]:
    """A client, and the other end of its connection, which nobody reads."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "shard-0.sock"))
        listener.listen()
        listener.setblocking(False)
        client = ShardClient(folder, 0, timeout_s)
        peer, _ = await loop.sock_accept(listener)
        peer.setblocking(False)
        with peer:
            while client._transport is None:
                await asyncio.sleep(0)
            yield client, peer
            client.close()


async def ask_until_refused(client: ShardClient) -> list[asyncio.Future[tuple[int, int]]]:
    asked = []
    while True:
        asked.append(client.counts(NAME))
        await asyncio.sleep(0)
        if asked[-1].done():
            return asked
        assert len(asked) < 10 * shard_client._OPEN_BYTES_MAX // len(NAME)


async def answer_all(peer: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    inbox = b""
    while True:
        inbox += await loop.sock_recv(peer, 1 << 20)
        out = b""
        at = 0
        while len(inbox) - at >= REQUEST.size:
            length, number, _ = REQUEST.unpack_from(inbox, at)
            if len(inbox) - at < 4 + length:
                break
            names = inbox[at + REQUEST.size : at + 4 + length].split(b"\n")
            out += answer(number, COUNT_PAIR.pack(7, 1) * len(names))
            at += 4 + length
        inbox = inbox[at:]
        await loop.sock_sendall(peer, out)


def test_questions_to_a_shard_that_does_not_read_fail_at_once_past_a_limit_and_go_on_when_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_client, "_OPEN_BYTES_MAX", 1 << 20)

    async def main() -> None:
        async with connected(tmp_path, PATIENCE_S) as (client, peer):
            *held, refused = await ask_until_refused(client)
            with pytest.raises(ShardUnavailable, match="bytes of questions"):
                await refused
            assert client._transport is not None
            assert client._transport.get_write_buffer_size() < 1 << 17, "the rest waits unsent"
            answering = asyncio.create_task(answer_all(peer))
            assert set(await asyncio.wait_for(asyncio.gather(*held), PATIENCE_S)) == {(7, 1)}
            assert await asyncio.wait_for(client.counts(NAME), PATIENCE_S) == (7, 1)
            assert client._open_bytes == 0
            answering.cancel()

    asyncio.run(main())


def test_what_timed_out_takes_no_memory_however_long_a_shard_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_client, "_OPEN_BYTES_MAX", 1 << 18)

    async def main() -> None:
        async with connected(tmp_path, 0.01) as (client, _):
            for _ in range(5):
                asked = await ask_until_refused(client)
                answers = await asyncio.gather(*asked, return_exceptions=True)
                assert {type(answer) for answer in answers} == {ShardUnavailable}
                assert client._open_bytes == 0
                assert client._transport is not None
                assert client._transport.get_write_buffer_size() < 1 << 17

    asyncio.run(main())
