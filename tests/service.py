"""What tests use the real service with (catchall.tools.drill_service): the shared one's limits, raw requests, single events."""

from __future__ import annotations

import json

from catchall.tools.drill_client import KINDS, NDJSON, Answer, Client, NotSent
from catchall.tools.drill_service import SMALL, Service, ServiceFailed, at_rest
from catchall.tools.polling import POLL_S, WITHIN_S, eventually

__all__ = ["BODY_MAX", "CHUNKED", "EVENTS_MAX", "HTTP_LIMITS", "KINDS", "NDJSON", "POLL_S", "SMALL", "WITHIN_S", "WITH_LENGTH",
           "Answer", "Client", "NotSent", "Service", "ServiceFailed", "at_rest", "chunks", "event", "eventually"]  # fmt: skip

BODY_MAX, EVENTS_MAX = 64 << 10, 500  # of the service that tests share
HTTP_LIMITS = ("--set", "limits.body=64KiB", "--set", f"limits.events={EVENTS_MAX}", "--set", "server.read_timeout=500ms")
CHUNKED = b"POST /events HTTP/1.1\r\nhost: t\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n"
WITH_LENGTH = CHUNKED.replace(b"transfer-encoding: chunked", b"content-length: %d")


def event(domain: str, kind: str = "delivered", **more: object) -> bytes:
    """One line of a bulk request."""
    return json.dumps({"domain": domain, "type": kind, **more}).encode() + b"\n"


def chunks(*parts: bytes, end: bool = True) -> bytes:
    """The parts in the framing of a chunked body; the last chunk too, if it ends here."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, *([b""] if end else [])))
