"""A proxy that stands between a client and the service, as in every large installation, and loses answers on purpose."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import TracebackType

from service import eventually


class Resender:
    """A TCP proxy for one request a connection.

    lose       how many answers are lost: read from the service and not passed on
    resends    it sends the request again itself, as proxies do with a PUT; else it closes the client's connection
    meanwhile  called when an answer was lost, before anything is sent again
    seen       how often a request was sent to the service
    """

    def __init__(self, port: int, *, lose: int, resends: bool, meanwhile: Callable[[], object]) -> None:
        self._upstream, self._lose, self._resends, self._meanwhile = port, lose, resends, meanwhile
        self.seen = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Resender:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(30)
                request = _whole(client)
                answer = self._ask(request)
                while self._lose:
                    self._lose -= 1
                    self._meanwhile()
                    if not self._resends:
                        answer = b""
                        break
                    answer = self._ask(request)
                client.sendall(answer)

    def _ask(self, request: bytes) -> bytes:
        """The answer, however often the request has to be sent for it."""

        def answered() -> bytes:
            try:
                with socket.create_connection(("127.0.0.1", self._upstream), timeout=30) as service:
                    service.sendall(request)
                    self.seen += 1
                    return _whole(service)
            except OSError:
                return b""

        answer: bytes = eventually("the service answers", answered)
        return answer


def _whole(sock: socket.socket) -> bytes:
    """One HTTP message with a content length, or without a body."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += _some(sock)
    head = data[:end].lower()
    at = head.find(b"content-length:")
    size = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
    while len(data) < end + 4 + size:
        data += _some(sock)
    return data


def _some(sock: socket.socket) -> bytes:
    data = sock.recv(1 << 16)
    if not data:
        raise ConnectionError("closed in the middle of a message")
    return data
