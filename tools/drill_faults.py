"""Faults of the service's own processes.

The clock is not among them: it cannot be stepped on a host that others share. Tests step it in the engine instead.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

from catchall.tools.drill_plan import Kind, Params, Setup
from catchall.tools.drill_process import free_port, start_tied
from catchall.tools.drill_service import ServiceFailed, clean_environment, serve_command
from catchall.tools.drill_stage import Stage
from catchall.tools.polling import WITHIN_S, eventually

DURABLE = frozenset({"durable"})
HUPS_MAX = 40
STOP_S_MIN = 0.2
AGAIN_SHARE, AGAIN_MS_MAX = 0.3, 800  # a start takes about that long
OTHER_WORKERS_SHARE, WORKERS_MAX = 0.3, 4
REFUSED = {"folder": "is in use by the service", "port": "something else listens"}  # what a second instance has to say


def nothing(chance: random.Random, setup: Setup) -> Params:
    return {}


# ---- SIGKILL


def a_shard(chance: random.Random, setup: Setup) -> Params:
    return {"shard": chance.randrange(setup.workers)}


def an_http_worker(chance: random.Random, setup: Setup) -> Params:
    return {"worker": chance.randrange(setup.http_workers)}


def maybe_other_workers(chance: random.Random, setup: Setup) -> Params:
    return {"workers": chance.randint(1, WORKERS_MAX)} if chance.random() < OTHER_WORKERS_SHARE else {}


def how_to_kill_all(chance: random.Random, setup: Setup) -> Params:
    again: Params = {"again_ms": chance.randint(0, AGAIN_MS_MAX)} if chance.random() < AGAIN_SHARE else {}
    return maybe_other_workers(chance, setup) | again


def a_shard_and_an_http_worker(chance: random.Random, setup: Setup) -> Params:
    return a_shard(chance, setup) | an_http_worker(chance, setup)


def kill_shard(stage: Stage, params: Params) -> None:
    stage.service.kill("shard", int(params["shard"]))


def kill_http(stage: Stage, params: Params) -> None:
    stage.service.kill("http", which=int(params["worker"]))


def kill_front(stage: Stage, params: Params) -> None:
    workers = set(stage.service.pids("http"))
    stage.service.kill("front")
    eventually("the old workers are gone", lambda: not workers & set(stage.service.pids("http")))


def kill_supervisor(stage: Stage, params: Params) -> None:
    stage.service.kill("supervisor")
    stage.service.start()  # at once: it waits for what is left of the old one


def kill_all(stage: Stage, params: Params) -> None:
    """All at once, and sometimes again while the next ones start and recover."""
    stage.service.kill_all()
    if "workers" in params:
        stage.set_workers(int(params["workers"]))
    if "again_ms" in params:
        stage.service.spawn()
        time.sleep(int(params["again_ms"]) / 1000)
        stage.service.kill_all()
    stage.service.start()


def kill_pair(stage: Stage, params: Params) -> None:
    """A shard and an HTTP worker in the same instant."""
    shard = stage.service.signal(signal.SIGKILL, "shard", int(params["shard"]))
    worker = stage.service.signal(signal.SIGKILL, "http", which=int(params["worker"]))
    eventually("both are gone", lambda: not {shard, worker} & {child.pid for child in stage.service.children()})


# ---- other signals


def for_seconds(chance: random.Random, setup: Setup) -> float:
    return round(chance.uniform(min(STOP_S_MIN, setup.stop_seconds), setup.stop_seconds), 2)


def a_process_and_seconds(chance: random.Random, setup: Setup) -> Params:
    role = chance.choice(("shard", "http", "front", "supervisor"))
    which = chance.randrange({"shard": setup.workers, "http": setup.http_workers}.get(role, 1))
    return {"role": role, "which": which, "seconds": for_seconds(chance, setup)}


def only_seconds(chance: random.Random, setup: Setup) -> Params:
    return {"seconds": for_seconds(chance, setup)}


def stop_process(stage: Stage, params: Params) -> None:
    """SIGSTOP to one process and, later, SIGCONT. Writes wait for no parent of a worker, and without ids for no shard."""
    role, which = str(params["role"]), int(params["which"])
    pid = stage.service.signal(signal.SIGSTOP, role, which if role == "shard" else None, 0 if role == "shard" else which)
    try:
        if role != "http" and not (role == "shard" and stage.load.ids):
            stage.load.more(10)
        time.sleep(float(params["seconds"]))
    finally:
        os.kill(pid, signal.SIGCONT)


def stop_all(stage: Stage, params: Params) -> None:
    """SIGSTOP to all processes and, later, SIGCONT."""
    pids = [*stage.service.pids("supervisor"), *(child.pid for child in stage.service.children())]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(float(params["seconds"]))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def some_hups(chance: random.Random, setup: Setup) -> Params:
    role = chance.choice(("supervisor", "front"))
    return {"role": role, "times": chance.randint(1, HUPS_MAX), "gap_ms": chance.choice((0, 1, 20))}


def hup(stage: Stage, params: Params) -> None:
    """A storm of SIGHUP: the supervisor has nothing to reload, the front replaces its workers."""
    for _ in range(int(params["times"])):
        stage.service.signal(signal.SIGHUP, str(params["role"]))
        time.sleep(int(params["gap_ms"]) / 1000)


def a_way_to_stop(chance: random.Random, setup: Setup) -> Params:
    return {"signal": chance.choice(("SIGTERM", "SIGINT")), **maybe_other_workers(chance, setup)}


def restart(stage: Stage, params: Params) -> None:
    """A clean stop, which must end with exit code 0, and a start."""
    stage.service.stop(signal.Signals[str(params["signal"])])
    if "workers" in params:
        stage.set_workers(int(params["workers"]))
    stage.service.start()


# ---- a second instance


def folder_or_port(chance: random.Random, setup: Setup) -> Params:
    return {"same": chance.choice(tuple(REFUSED))}


def second_instance(stage: Stage, params: Params) -> None:
    """Another service on the same folder, or on the same port, is refused with exit code 1 and says why."""
    service, same, log = stage.service, str(params["same"]), stage.folder / "second.log"
    where = (free_port(), service.data_dir) if same == "folder" else (service.port, stage.folder / "second")
    with log.open("wb") as output:
        process = start_tied(serve_command(*where, *service.flags, host=service.host), output, clean_environment())
    try:
        code: int | None = process.wait(WITHIN_S)
    except subprocess.TimeoutExpired:
        code = None
        process.kill()
        process.wait()
    said = log.read_text(errors="replace")
    if code != 1 or REFUSED[same] not in said:
        raise ServiceFailed(f"a second instance on the same {same} ended with {code} instead of being refused:\n{said}")


KINDS = (
    Kind("kill-shard", a_shard, kill_shard, weight=3, kills=True),
    Kind("kill-http", an_http_worker, kill_http, weight=2, kills=True),
    Kind("kill-front", nothing, kill_front, weight=1, kills=True),
    Kind("kill-supervisor", nothing, kill_supervisor, weight=2, kills=True, needs=DURABLE),
    Kind("kill-pair", a_shard_and_an_http_worker, kill_pair, weight=1, kills=True),
    Kind("kill-all", how_to_kill_all, kill_all, weight=2, kills=True, needs=DURABLE),
    Kind("stop-process", a_process_and_seconds, stop_process, weight=3),
    Kind("stop-all", only_seconds, stop_all),
    Kind("hup", some_hups, hup),
    Kind("second-instance", folder_or_port, second_instance),
    Kind("restart", a_way_to_stop, restart, weight=2, needs=DURABLE),
)
