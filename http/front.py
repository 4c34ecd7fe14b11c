"""The HTTP front: Granian's parent process, which binds the port and starts the HTTP workers that run app.py.

    python -m catchall.http.front RUN_FOLDER PARENT_PID        started by the supervisor, stopped by SIGTERM

Workers are spawned, never forked. Granian starts a worker that died again, and gives up when the same one dies twice within
5.5 s: the supervisor then starts all of this again.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from pathlib import Path

from granian import Granian
from granian.constants import HTTPModes, Interfaces, Loops, TaskImpl
from granian.http import HTTP1Settings
from granian.log import LogLevels

from catchall.engine import logs
from catchall.engine.process import die_with_parent, read_runtime

# What the server logs itself, the access log included, goes through our own handlers.
LOGGING = {
    "handlers": {},
    "loggers": {name: {"level": "INFO", "propagate": True, "handlers": []} for name in ("_granian", "granian.access")},
}


def main() -> None:
    die_with_parent(signal.SIGKILL, int(sys.argv[2]))  # requests under way would wait for shards that are gone, too
    runtime = read_runtime(Path(sys.argv[1]))
    server = runtime.settings.server
    logs.setup("http", runtime.settings.log)
    multiprocessing.set_start_method("spawn")
    Granian(
        "catchall.http.app:app",
        address=server.host,
        port=server.port,
        interface=Interfaces.ASGI,
        workers=server.http_workers,
        loop=Loops.uvloop,
        task_impl=TaskImpl(server.task_impl),
        http=HTTPModes.http1,
        websockets=False,
        backlog=server.backlog,
        backpressure=server.backpressure,
        http1_settings=HTTP1Settings(header_read_timeout=round(server.idle_timeout * 1000)),
        log_level=LogLevels.warning,
        log_dictconfig=LOGGING,
        log_access=server.access_log,
        respawn_failed_workers=True,
        workers_kill_timeout=max(1, round(server.shutdown_timeout)),
        metrics_enabled=False,
    ).serve()


if __name__ == "__main__":
    main()
