"""The shard's end of its Unix socket: connections of HTTP workers, frames in, answers out. Never blocks."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from pathlib import Path
from typing import NamedTuple

from catchall.engine import shard_protocol
from catchall.engine.shard_protocol import FRAME_MAX, REQUEST, SocketAddress

log = logging.getLogger("catchall.shard")

_READ_BYTES = 1 << 18
ACCEPT_PAUSE_S = 0.5


class Request(NamedTuple):
    connection: Connection
    number: int
    kind: int
    payload: bytes

    def answer(self, payload: bytes) -> None:
        self.connection.out += shard_protocol.answer(self.number, payload)


class Connection:
    """One HTTP worker's. What is put into `out` goes out with the next `send_all`."""

    __slots__ = ("fd", "inbox", "out", "sock", "waits_for_room")

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.fd = sock, sock.fileno()
        self.inbox, self.out = bytearray(), bytearray()
        self.waits_for_room = False


class Sockets:
    def __init__(self, run_folder: Path, shard: int, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._address = SocketAddress(run_folder, shard)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if os.path.exists(self._address.path):
            os.unlink(self._address.path)  # of a shard that was killed
        self._listener.bind(self._address.path)
        os.chmod(self._address.path, 0o600)
        self._listener.listen(256)
        epoll.register(self._listener, select.EPOLLIN)
        self._accept_again = 0.0  # when to listen again, after descriptors ran out; 0: listening
        self._connections: dict[int, Connection] = {}
        self._requests: list[Request] = []

    def handle(self, fd: int, event: int) -> None:
        """React to one epoll event of a socket."""
        if fd == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(fd)
        if connection is None:
            return
        if event & select.EPOLLOUT:
            connection.waits_for_room = False
            self._epoll.modify(fd, select.EPOLLIN)
        if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self._receive(connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptor or memory left: whoever knocks waits until segments were retired
            log.error("a connection of an HTTP worker has to wait: %s", error)
            self._epoll.modify(self._listener, 0)
            self._accept_again = time.monotonic() + ACCEPT_PAUSE_S
            return
        sock.setblocking(False)
        self._connections[sock.fileno()] = Connection(sock)
        self._epoll.register(sock, select.EPOLLIN)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        inbox = connection.inbox
        inbox += data
        at = 0
        while len(inbox) - at >= REQUEST.size:
            length, number, kind = REQUEST.unpack_from(inbox, at)
            if not 5 <= length <= FRAME_MAX:
                log.error("a request of %d bytes came in on the shard's socket; its connection is closed", length)
                self._close(connection)
                return
            end = at + 4 + length
            if len(inbox) < end:
                break
            self._requests.append(Request(connection, number, kind, bytes(inbox[at + REQUEST.size : end])))
            at = end
        del inbox[:at]

    def requests(self) -> list[Request]:
        """What came in since the last call."""
        if self._accept_again and time.monotonic() >= self._accept_again:
            self._accept_again = 0.0
            self._epoll.modify(self._listener, select.EPOLLIN)
        requests, self._requests = self._requests, []
        return requests

    def send_all(self) -> None:
        """One write for each connection that has answers."""
        for connection in list(self._connections.values()):
            if connection.out and not connection.waits_for_room:
                try:
                    sent = connection.sock.send(connection.out)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    self._close(connection)
                    continue
                del connection.out[:sent]
                if connection.out:
                    connection.waits_for_room = True
                    self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT)

    def _close(self, connection: Connection) -> None:
        if self._connections.pop(connection.fd, None) is not None:
            self._epoll.unregister(connection.fd)
            connection.sock.close()

    def close(self) -> None:
        for connection in list(self._connections.values()):
            self._close(connection)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):  # a new supervisor has made the folder anew
            os.unlink(self._address.path)
        self._address.close()
