"""A TCP proxy on 127.0.0.1 that spoils connections on demand: slow, cut after so many bytes, or refusing.

    with Proxy(port) as proxy:            # forwards what comes to proxy.port
        proxy.delay_s = 0.2               # before every piece that is passed on, in either direction
        proxy.cut("answer", 100)          # after 100 more bytes from the server every connection is reset, in the middle
        proxy.refuses = True              # new connections are reset; proxy.reset() resets those that there are

It runs in a thread of its own; all of this may be called from any other.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from catchall.tools.drill_process import free_port

PIECE = 1 << 14


class Proxy:
    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.delay_s = 0.0
        self.refuses = False
        self.cuts = 0  # how often a cut came to pass
        self._target = target
        self._left: dict[str, int | None] = {"request": None, "answer": None}  # bytes until the cut
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, direction: str, after: int) -> None:
        """direction  "request" or "answer"     after  bytes, 1 or more"""
        self._left[direction] = after

    def reset(self) -> None:
        """Reset every connection."""
        self._loop.call_soon_threadsafe(self._reset)

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._reset()
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks)
        await asyncio.sleep(0)  # aborted connections close in the next turn

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, server_writer}
        self._writers |= both
        try:
            with suppress(OSError):  # either side has gone: so does the other
                requests = asyncio.create_task(self._pass_on("request", reader, server_writer))
                answers = asyncio.create_task(self._pass_on("answer", server_reader, writer))
                done, left = await asyncio.wait((requests, answers), return_when=asyncio.FIRST_COMPLETED)
                for task in left:
                    task.cancel()
                await asyncio.gather(*done, *left, return_exceptions=True)
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _pass_on(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(PIECE):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            left = self._left[direction]
            if left is not None and left <= len(data):
                self._left[direction] = None
                writer.write(data[:left])
                await writer.drain()
                self._reset()
                self.cuts += 1
                return
            if left is not None:
                self._left[direction] = left - len(data)
            writer.write(data)
            await writer.drain()
