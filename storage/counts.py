"""The counts of one domain, packed into one int, so that a dict of millions of them is plain and cheap to collect. Pure.

    packed = delivered | bounced << 64

Adding packed counts adds both; 0 is a domain that was never seen.
"""

from __future__ import annotations

DELIVERED_MASK = (1 << 64) - 1
ONE_BOUNCED = 1 << 64

# One domain's row as the ledger and MongoDB take it: name, delivered, bounced, first_at, last_delivered_at, last_bounced_at.
# Counts are absolute; times are unix seconds, 0 for never, and merge with min and max.
Row = tuple[str, int, int, int, int, int]


def pack(delivered: int, bounced: int) -> int:
    return delivered | bounced << 64


def unpack(packed: int) -> tuple[int, int]:
    return packed & DELIVERED_MASK, packed >> 64
