"""What an HTTP worker and a shard say to each other over the shard's Unix socket. Pure.

    request   length (4), id (4), kind (1), payload             length counts what follows it; little-endian
    answer    length (4), id (4), payload

    COUNTS    names, a newline between them          delivered, bounced (8 + 8) for each, in the same order
    STATS     nothing                                STATS_ANSWER
    PING      nothing                                one byte: 1 ready, 2 ready but degraded
    KEY       KEY_QUESTION                           the digest for which the key was first used; nothing if it is not held
    REPEATS   PLACE for each partition               how many events there were repeats (8), in all; UNKNOWN if that is not
                                                     known any more

Requests may be pipelined; answers come in any order. The requests of one turn of a worker's loop travel as one COUNTS. The
socket lies in the data folder, whose path may be longer than a socket's address can hold, so both ends reach it through
/proc/self/fd.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

COUNTS, STATS, PING, KEY, REPEATS = 1, 2, 3, 4, 5
REQUEST = struct.Struct("<IIB")
ANSWER = struct.Struct("<II")
COUNT_PAIR = struct.Struct("<QQ")
KEY_QUESTION = struct.Struct("<H16s")  # partition, key
PLACE = struct.Struct("<H8sQQ")  # partition, name of a segment, start and end of lines in its payload
REPEATS_ANSWER = struct.Struct("<Q")
UNKNOWN = (1 << 64) - 1
FRAME_MAX = 16 << 20  # bytes; more is no request of ours

# catch_all, not_catch_all, unknown, as of (unix ns); then 1 and the same four for all hosts, when several share one MongoDB
STATS_ANSWER = struct.Struct("<QQQQQQQQQ")


def request(number: int, kind: int, payload: bytes = b"") -> bytes:
    return REQUEST.pack(len(payload) + 5, number, kind) + payload


def answer(number: int, payload: bytes) -> bytes:
    return ANSWER.pack(len(payload) + 4, number) + payload


class SocketAddress:
    """A short address for a socket in a folder of any depth. Holds the folder open."""

    def __init__(self, run_folder: Path, shard: int) -> None:
        self._fd = os.open(run_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}/shard-{shard}.sock"

    def close(self) -> None:
        os.close(self._fd)
