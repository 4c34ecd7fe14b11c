"""Every error answer: application/problem+json (RFC 9457), ready to be sent. Pure, no I/O.

    {"type": "urn:catchall:problem:bad_domain", "title": "Bad domain", "status": 400, "detail": "...",
     "errors": [{"index": 4, "code": "bad_domain", "detail": "..."}], "rejected": 1, "errors_truncated": false}

type      about:blank when the status says it all, else a name that stays the same for as long as the error means the same.
detail    for people: what was wrong, what was recorded (of a request that failed: nothing), what to do. It quotes little of the
          input and no credentials; whatever the caller passes is cut to DETAIL_MAX characters.
errors    only for a request of many events: the first ERRORS_MAX that were wrong. rejected is how many there were.
"""

from collections.abc import Sequence
from http import HTTPStatus  # the standard library's: this folder is no package of that name, see README
from typing import Any, Final, NamedTuple

import msgspec

from catchall.http.bulk import ERRORS_MAX, EventError

DETAIL_MAX: Final = 1000
TYPE_PREFIX: Final = "urn:catchall:problem:"
_CONTENT_TYPE = (b"content-type", b"application/problem+json")


class Response(NamedTuple):
    """The two messages of an ASGI answer: await send(response.start), then await send(response.body)."""

    start: dict[str, Any]
    body: dict[str, Any]


def problem(
    status: int,
    detail: str,
    *,
    code: str | None = None,
    retry_after: int | None = None,
    allow: str | None = None,
    errors: Sequence[EventError] = (),
    rejected: int | None = None,
    close: bool = False,
) -> Response:
    """The answer to a request that failed.

    status        400 to 599, one that HTTP defines.           detail     what was wrong, what was recorded, what to do.
    code          snake_case; becomes the type and the title.   retry_after   seconds.   allow   methods, as "GET, HEAD".
    errors        what was wrong with single events.            rejected   how many were wrong, if more than errors tells.
    close         the connection is of no use any more, as after a body that was not read to its end.
    """
    fields: dict[str, object] = {
        "type": "about:blank" if code is None else TYPE_PREFIX + code,
        "title": HTTPStatus(status).phrase if code is None else code.replace("_", " ").capitalize(),
        "status": status,
        "detail": _sendable(detail),
    }
    if errors:
        told = errors[:ERRORS_MAX]
        wrong = len(errors) if rejected is None else rejected
        fields["errors"] = [{"index": e.index, "code": e.code, "detail": _sendable(e.detail)} for e in told]
        fields["rejected"] = wrong
        fields["errors_truncated"] = wrong > len(told)
    body = msgspec.json.encode(fields)
    headers = [_CONTENT_TYPE, (b"content-length", b"%d" % len(body))]
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % retry_after))
    if allow is not None:
        headers.append((b"allow", allow.encode("ascii")))
    if close:
        headers.append((b"connection", b"close"))
    return Response(
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def _sendable(text: str) -> str:
    """The text cut to DETAIL_MAX; a lone surrogate, which UTF-8 cannot say, is written as an escape."""
    text = text if len(text) <= DETAIL_MAX else text[: DETAIL_MAX - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()
