"""What the supervisor promises when a stop comes early, the kernel has no room, or a former service has not quite ended."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faults import HOST
from service import SMALL, eventually

from catchall.engine import supervisor
from catchall.engine.data_folder import Manifest
from catchall.engine.metrics_page import HEARTBEAT, MetricsPage
from catchall.engine.process import RuntimeFile, http_places, write_runtime
from catchall.engine.settings import Server, Settings
from catchall.engine.supervisor import ORPHANS_END_S, Child, Supervisor, seconds_until_orphans_end


def test_a_stop_while_the_port_is_waited_for_is_a_clean_end(tmp_path: Path) -> None:
    (tmp_path / "data" / "run").mkdir(parents=True)  # as if a supervisor had been killed
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        command = [sys.executable, "-m", "catchall.tools.cli", "serve", "--port", str(holder.getsockname()[1]), *SMALL]
        process = subprocess.Popen([*command, "--data-dir", str(tmp_path / "data")], stderr=subprocess.PIPE)
        lock = tmp_path / "data" / "lock"
        eventually("it has the folder", lambda: lock.exists() and lock.read_text() == f"{process.pid}\n")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert b"Traceback" not in said


def test_the_port_is_waited_for_as_long_as_the_workers_of_the_killed_service_may_take(tmp_path: Path) -> None:
    assert seconds_until_orphans_end(tmp_path / "none") == 0
    assert seconds_until_orphans_end(tmp_path) == ORPHANS_END_S
    settings = Settings(server=Server(shutdown_timeout=77.0))
    write_runtime(tmp_path, RuntimeFile(settings=settings, manifest=Manifest(HOST, 1, 0), boot_id="", root=str(tmp_path)))
    assert seconds_until_orphans_end(tmp_path) == 77.0 + ORPHANS_END_S


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOMEM])
def test_a_child_that_the_kernel_has_no_room_for_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    settings = Settings()
    page = MetricsPage(tmp_path, shards=1, http_places=http_places(settings), create=True)
    child = Child("shard-0", "shard", [sys.executable, "-c", ""])
    watching = Supervisor(settings, tmp_path, Manifest(HOST, 1, 0), page, [child])

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(supervisor.subprocess, "Popen", no_room)
        watching._start(child)
    assert not child.alive
    wait = watching._seconds_to_next_start()
    assert wait is not None
    assert 0 < wait <= child.pause
    assert child.start_at > time.monotonic() - child.pause
    watching._start(child)
    assert child.process is not None
    assert child.process.wait(60) == 0
    os.close(child.pidfd)


def test_heartbeats_and_looks_for_dead_writers_do_not_wait_for_the_metrics(serve: Any) -> None:
    service = serve("--set", "metrics.interval=1h")
    assert service.client().put("a.example") == 200
    page = MetricsPage(service.data_dir / "run", shards=1, http_places=4)
    slots = [page.slot("shard", 0), page.slot("http", 0)]
    for slot in slots * 2:
        before = slot.cells[HEARTBEAT]
        eventually("it has beaten", lambda slot=slot, before=before: slot.cells[HEARTBEAT] > before)
    service.kill("http")
    eventually("the dead writer's segments are retired", lambda: not list(service.data_dir.glob("*/q/*.seg")))
    service.wait_until_ready()
    assert service.client().counts("a.example") == (1, 0)
    service.stop()
