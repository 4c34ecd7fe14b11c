"""A client for drills and tests, which tells a request that was not sent from one whose answer did not come."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from catchall.tools.polling import eventually

NDJSON = {"content-type": "application/x-ndjson"}
LOOPBACK = "127.0.0.1"
KINDS = ("delivered", "bounced")


class NotSent(Exception):
    """No connection could be made, so nothing of the request went out."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One keep-alive connection, made when it is needed. Never sends anything twice. For one thread.

    Raises  NotSent; OSError when the connection broke before the answer was complete: the request is then ambiguous.
    """

    def __init__(self, port: int, timeout_s: float = 30.0, host: str = LOOPBACK) -> None:
        self.host, self.port, self._timeout_s = host, port, timeout_s
        self._socket: socket.socket | None = None
        self._inbox = b""

    def request(
        self, method: str, path: str | bytes, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        target = path if isinstance(path, bytes) else path.encode()
        head = b"%b %b HTTP/1.1\r\nhost: test\r\n" % (method.encode(), target)
        if body is not None:
            head += b"content-length: %d\r\n" % len(body)
        head += b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in (headers or {}).items())
        self.send(head + b"\r\n" + (body or b""))
        return self.answer(without_body=method == "HEAD")

    def send(self, data: bytes) -> None:
        """Put bytes on the connection as they are."""
        if self._socket is None:
            try:
                self._socket = socket.create_connection((self.host, self.port), timeout=self._timeout_s)
            except OSError as error:
                raise NotSent(str(error)) from error
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._closed_on_error():
            self._socket.sendall(data)

    def answer(self, without_body: bool = False) -> Answer:
        """Read the next answer."""
        with self._closed_on_error():
            while (end := self._inbox.find(b"\r\n\r\n")) < 0:
                self._receive()
            lines = self._inbox[:end].decode("latin-1").split("\r\n")
            fields = (line.partition(":") for line in lines[1:])
            headers = {name.lower(): value.strip() for name, _, value in fields}
            end += 4
            stop = end + (0 if without_body else int(headers.get("content-length", "0")))
            while len(self._inbox) < stop:
                self._receive()
            body, self._inbox = self._inbox[end:stop], self._inbox[stop:]
            found = Answer(int(lines[0].split(" ")[1]), headers, body)
        if headers.get("connection") == "close":
            self.close()
        return found

    def ends(self) -> bool:
        """Whether the server closes the connection, having sent nothing more."""
        if self._socket is None:
            return True
        try:
            return not self._inbox and self._socket.recv(1) == b""
        except ConnectionError:
            return True

    def _receive(self) -> None:
        assert self._socket is not None, "the connection was closed"
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection before its answer was complete")
        self._inbox += data

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._inbox = None, b""

    @property
    def local_port(self) -> int:
        self.request("GET", "/healthz")
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    # ---- what is asked for most

    def put(self, domain: str, kind: str = "delivered") -> int:
        return self.request("PUT", f"/events/{domain}/{kind}").status

    def bulk(self, *events: Mapping[str, object]) -> Answer:
        body = b"".join(json.dumps(event).encode() + b"\n" for event in events)
        return self.request("POST", "/events", body, NDJSON)

    def count(self, domain: str, delivered: int = 0, bounced: int = 0) -> None:
        """Have so many events recorded."""
        counts = {"delivered": delivered, "bounced": bounced}
        found = self.bulk(*({"domain": domain, "type": kind, "count": n} for kind, n in counts.items() if n))
        assert (found.status, found.headers["catchall-counted"]) == (200, str(delivered + bounced))

    def domain(self, domain: str) -> dict[str, Any]:
        found = self.request("GET", f"/domains/{domain}")
        assert found.status == 200, found
        answer: dict[str, Any] = found.json
        return answer

    def read(self, path: str) -> Any:
        """What a GET answers, asked again until it is 200: unlike a write, a read may be. Raises TimeoutError."""

        def answered() -> Answer | None:
            answer = self.request("GET", path)
            return answer if answer.status == 200 else None

        answer = eventually(f"{path} is answered", answered, errors=(NotSent, OSError))
        assert answer is not None
        return answer.json

    def counts(self, domain: str) -> tuple[int, int]:
        found = self.domain(domain)
        return found["delivered"], found["bounced"]

    def stats(self) -> dict[str, int]:
        found = self.request("GET", "/domains/stats")
        assert found.status == 200, found
        return {key: value for key, value in found.json.items() if key != "timestamp"}
