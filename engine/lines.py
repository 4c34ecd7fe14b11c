"""Event lines: the text that queues are made of. Pure.

    +example.com\n                  one message to example.com was delivered
    -example.com 12\n               twelve bounced
    +example.com #ID\n              one was delivered, unless an event with this id was counted before
    +example.com 12 #ID\n           the same for twelve
    =KEY DIGEST\n                   an Idempotency-Key was used for a request with this digest
    @1790000000\n                   the clock, in unix seconds, for the lines that follow in this segment

A name is in its normal form (rules.normalise). A count is 1 to rules.COUNT_MAX. ID, KEY and DIGEST are 32 hex digits each
(engine/ids.py). No line holds a NUL, so the first NUL in a preallocated segment is the end of what was written.
"""

from __future__ import annotations

from catchall.engine.rules import COUNT_MAX, is_normal

DELIVERED, BOUNCED, CLOCK = b"+", b"-", b"@"
KEY, ID = b"=", b"#"
ID_DIGITS = 32
LINE_MAX = 1 + 253 + 1 + 7 + 2 + ID_DIGITS + 1
_HEX = frozenset(b"0123456789abcdef")


def encode(sign: bytes, name: bytes, count: int = 1) -> bytes:
    return b"%b%b\n" % (sign, name) if count == 1 else b"%b%b %d\n" % (sign, name, count)


def with_id(line: bytes, digits: bytes) -> bytes:
    """The line of an event (with its newline) that counts once however often it is recorded."""
    return b"%b #%b\n" % (line[:-1], digits)


def key_line(key: bytes, digest: bytes) -> bytes:
    """The line that claims a key for the request with this digest; both in hex digits."""
    return b"=%b %b\n" % (key, digest)


def clock_line(now_s: int) -> bytes:
    return b"@%d\n" % now_s


def clock_of(line: bytes) -> int | None:
    """The second that an `@` line (without its newline) tells, or None if it is no such line."""
    return int(line[1:]) if line[:1] == CLOCK and line[1:].isdigit() and len(line) <= 14 else None


def id_of(digits: bytes) -> bytes | None:
    """The 16 bytes that 32 hex digits stand for; None if they are something else."""
    return bytes.fromhex(digits.decode()) if len(digits) == ID_DIGITS and _HEX.issuperset(digits) else None


def parse(line: bytes) -> tuple[bytes, int] | None:
    """(`sign + name`, count) of an event line without its newline and its id; None if it is not one, whatever the bytes."""
    sign_and_name, space, count = line.partition(b" ")
    if sign_and_name[:1] not in (DELIVERED, BOUNCED) or not is_normal(sign_and_name[1:]):
        return None
    if not space:
        return sign_and_name, 1
    if not count.isdigit() or len(count) > 7 or not 1 <= int(count) <= COUNT_MAX:
        return None
    return sign_and_name, int(count)
