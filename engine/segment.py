"""One segment of an event queue: a preallocated file of event lines, written once, front to back.

byte  size  field       meaning                                                                  (little-endian)
   0     8  magic       b"catchq01"
   8     4  header      4096, the size of this header page
  12     4  partition   the partition whose names it holds
  16     8  payload     payload size in bytes
  24    16  boot        the kernel's boot id of the writer
  40    16  host        the host id of the data folder
  56     4  crc         crc32 of bytes 0-55
  64     8  published   payload bytes that readers may take; only grows; always ends a line
  72     8  sealed      0 while open, else final length + 1; written once, after the last `published`
 128    16  mark A      offset (8), crc32 of the payload up to it (4), crc32 of these 12 bytes (4)
 192    16  mark B      the same; the two are used in turn, so a torn one leaves the other
4096     -  payload     lines (engine/lines.py), then zero bytes

Protocol    The writer copies lines, then stores `published`; a reader loads `sealed`, then `published`, and takes what is
            below. Neither takes a lock, makes a system call or waits. `published` and `sealed` are written as one aligned
            8-byte store each: never by struct.pack_into, which clears the bytes first, so that another process reads zero.
Invariants  1 bytes below `published` never change    2 a line never spans two segments    3 one writer; one reader
Crash       The death of any process loses nothing below `published`: the page cache outlives it. After a power cut
            `published` proves nothing; the payload is good up to its first NUL, cut back to the last newline, and a mark
            that was synced proves the bytes below its offset.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from typing import NamedTuple

MAGIC = b"catchq01"
HEADER_SIZE = 4096
_HEADER = struct.Struct("<8sIIQ16s16s")
_CRC_AT = 56
PUBLISHED, SEALED = 64 // 8, 72 // 8  # as indexes of 8-byte words
_MARK_AT = (128, 192)
_MARK = struct.Struct("<QI")
assert _HEADER.size == _CRC_AT
assert _CRC_AT + 4 <= 64, "published and sealed sit alone on aligned words"
assert mmap.PAGESIZE <= HEADER_SIZE


class BadSegment(Exception):
    """A file that is no segment of this data folder. Nothing of it is counted; it is set aside as `*.corrupt`."""


class Header(NamedTuple):
    partition: int
    payload_size: int
    boot_id: bytes  # 16
    host_id: bytes  # 16


class Mark(NamedTuple):
    offset: int  # payload bytes that were synced
    crc: int  # crc32 of them


def pack_header(header: Header) -> bytes:
    """The first 60 bytes of a segment; all that follows is zero in a new one."""
    head = _HEADER.pack(MAGIC, HEADER_SIZE, header.partition, header.payload_size, header.boot_id, header.host_id)
    return head + zlib.crc32(head).to_bytes(4, "little")


def parse_header(data: bytes | mmap.mmap | memoryview, file_size: int) -> Header:
    """Raises BadSegment, saying what is wrong."""
    head = bytes(data[: _CRC_AT + 4])
    if len(head) < _CRC_AT + 4 or file_size < HEADER_SIZE:
        raise BadSegment(f"{file_size} bytes are too short for a header")
    magic, header_size, partition, payload_size, boot_id, host_id = _HEADER.unpack_from(head)
    if magic != MAGIC or header_size != HEADER_SIZE:
        raise BadSegment(f"starts with {magic!r} and header size {header_size}, not {MAGIC!r} and {HEADER_SIZE}")
    if zlib.crc32(head[:_CRC_AT]) != int.from_bytes(head[_CRC_AT:], "little"):
        raise BadSegment("the header's crc does not match")
    if file_size < HEADER_SIZE + payload_size:
        raise BadSegment(f"has {file_size} bytes where its header says {HEADER_SIZE + payload_size}")
    return Header(partition, payload_size, boot_id, host_id)


def store_mark(data: mmap.mmap, turn: int, mark: Mark) -> None:
    at = _MARK_AT[turn % 2]
    packed = _MARK.pack(*mark)
    data[at : at + 16] = packed + zlib.crc32(packed).to_bytes(4, "little")


def newest_mark(data: bytes | mmap.mmap | memoryview) -> Mark | None:
    """The mark with the greatest offset among those that are whole, or None."""
    found = []
    for at in _MARK_AT:
        packed, check = bytes(data[at : at + _MARK.size]), bytes(data[at + _MARK.size : at + 16])
        if zlib.crc32(packed).to_bytes(4, "little") == check:
            found.append(Mark(*_MARK.unpack(packed)))
    return max(found, default=None)


def end_after_power_cut(payload: bytes | mmap.mmap, start: int, stop: int) -> int:
    """Where whole lines end in payload[start:stop]: before the first NUL, after the last newline. At least `start`."""
    nul = payload.find(b"\0", start, stop)
    return max(start, payload.rfind(b"\n", start, stop if nul < 0 else nul) + 1)
