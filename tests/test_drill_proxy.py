"""The proxy of the drills passes everything on, and spoils exactly what it was told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from catchall.tools.drill_proxy import Proxy


class Echo:
    """A server that returns what it gets, and remembers it."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.got = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                try:
                    while data := connection.recv(1 << 16):
                        if data == b"end":
                            return
                        self.got += data
                        connection.sendall(data)
                except ConnectionError:
                    continue

    def end(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as last:
            last.sendall(b"end")
            self._thread.join()
        self.listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.end()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as running:
        yield running


def through(proxy: Proxy, data: bytes) -> bytes:
    """Send data, and return what comes back until all of it did or the connection was reset."""
    back = b""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
        try:
            connection.sendall(data)
            while len(back) < len(data) and (more := connection.recv(1 << 16)):
                back += more
        except ConnectionError:
            pass
    return back


def test_everything_is_passed_on_slow_or_not(proxy: Proxy) -> None:
    data = bytes(range(256)) * 1000
    assert through(proxy, data) == data
    proxy.delay_s = 0.001
    assert through(proxy, data) == data


@pytest.mark.parametrize("after", [1, 100, 70_000])
def test_a_cut_request_reaches_the_server_up_to_there_and_no_further(proxy: Proxy, echo: Echo, after: int) -> None:
    proxy.cut("request", after)
    assert len(through(proxy, b"x" * 100_000)) < 100_000
    assert proxy.cuts == 1
    assert through(proxy, b"later") == b"later"  # the server has ended the connection before it by then
    assert len(echo.got) <= after + len(b"later")


@pytest.mark.parametrize("after", [1, 100, 70_000])
def test_a_cut_answer_comes_up_to_there_and_no_further(proxy: Proxy, after: int) -> None:
    proxy.cut("answer", after)
    assert len(through(proxy, b"x" * 100_000)) <= after
    assert proxy.cuts == 1
    assert through(proxy, b"later") == b"later"


def test_refused_connections_reach_no_server_and_new_ones_do_again(proxy: Proxy, echo: Echo) -> None:
    proxy.refuses = True
    assert through(proxy, b"refused") == b""
    proxy.refuses = False
    assert through(proxy, b"taken") == b"taken"
    assert echo.got == b"taken"
