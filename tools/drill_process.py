"""Programs that a drill runs: on ports of their own, and killed by the kernel when the drill dies, however it dies."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

PORTS = range(20_000, 32_000)  # below the ports the kernel hands out, so that a stopped server finds its port free again

# Asks the kernel for SIGKILL when the parent dies, checks that it has not died before that, and becomes the program.
DIE_WITH_PARENT = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])"""


def free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def own_address() -> str:
    """A loopback address that nobody else is likely to use: all of 127.0.0.0/8 is this host."""
    return f"127.{random.randint(1, 254)}.{random.randint(0, 255)}.{random.randint(1, 254)}"


def start_tied(
    command: Sequence[str], output: IO[bytes] | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own that ends with this one. To be called by the main thread: the kernel ties it
    to the thread.

    output       where its stdout and stderr go; None: nowhere
    environment  instead of ours
    """
    return subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if output is None else output,
        stderr=subprocess.DEVNULL if output is None else output,
        start_new_session=True,
    )
