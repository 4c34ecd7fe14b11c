"""Faults of what the service stands on: MongoDB, the way to it, the disk. Writes never wait for MongoDB."""

from __future__ import annotations

import random
import time
from contextlib import suppress

from pymongo.errors import PyMongoError

from catchall.tools.drill_faults import for_seconds, only_seconds
from catchall.tools.drill_mongod import Mongo
from catchall.tools.drill_plan import Kind, Params, Setup
from catchall.tools.drill_proxy import Proxy
from catchall.tools.drill_record import REFUSED
from catchall.tools.drill_stage import Stage
from catchall.tools.polling import eventually

MONGODB, ONE_SERVER, REPLICA_SET = (frozenset({"mongodb"} | more) for more in (set(), {"one server"}, {"replica set"}))
AWAY_S_MAX = 2.0
CUT_WITHIN = {"request": 20_000, "answer": 2_000}  # bytes: within a few pushes
CUTS_MAX = 5
DELAY_MS_MAX = 500
LEAVE_KIB_MAX = 512
STEP_DOWN_S = 2


def a_short_outage(chance: random.Random, setup: Setup) -> Params:
    return {"seconds": round(chance.uniform(0, min(AWAY_S_MAX, setup.stop_seconds)), 2)}


def a_member(chance: random.Random, setup: Setup) -> Params:
    return {"member": chance.randrange(setup.replicas), **a_short_outage(chance, setup)}


def a_member_and_seconds(chance: random.Random, setup: Setup) -> Params:
    return {"member": chance.randrange(setup.replicas), "seconds": for_seconds(chance, setup)}


def kill_mongod(stage: Stage, params: Params) -> None:
    mongo = _mongo(stage)
    mongo.nodes[int(params["member"])].kill()
    _while_away(stage, params)
    mongo.start()


def stop_mongod(stage: Stage, params: Params) -> None:
    node = _mongo(stage).nodes[int(params["member"])]
    node.pause()
    try:
        _while_away(stage, params)
    finally:
        node.resume()


def kill_primary(stage: Stage, params: Params) -> None:
    """The others choose a new one; then the old one comes back."""
    mongo = _mongo(stage)
    mongo.primary().kill()
    _while_away(stage, params)
    mongo.start()


def step_down(stage: Stage, params: Params) -> None:
    mongo = _mongo(stage)
    with mongo.primary().client() as client, suppress(PyMongoError):  # it closes the connection that told it so
        client.admin.command("replSetStepDown", STEP_DOWN_S, secondaryCatchUpPeriodSecs=1)
    _while_away(stage, params)
    mongo.primary()


def a_delay(chance: random.Random, setup: Setup) -> Params:
    return {"delay_ms": chance.randint(5, DELAY_MS_MAX), "seconds": for_seconds(chance, setup)}


def slow(stage: Stage, params: Params) -> None:
    proxy = _proxy(stage)
    proxy.delay_s = int(params["delay_ms"]) / 1000
    try:
        _while_away(stage, params)
    finally:
        proxy.delay_s = 0.0


def some_cuts(chance: random.Random, setup: Setup) -> Params:
    direction = chance.choice(tuple(CUT_WITHIN))
    return {"direction": direction, "after": chance.randint(1, CUT_WITHIN[direction]), "times": chance.randint(1, CUTS_MAX)}


def cut(stage: Stage, params: Params) -> None:
    """In the middle of a request the server has applied nothing or not all; of an answer, everything, and nobody knows."""
    proxy = _proxy(stage)
    for _ in range(int(params["times"])):
        before = proxy.cuts
        proxy.cut(str(params["direction"]), int(params["after"]))
        eventually("the connection was cut", lambda before=before: proxy.cuts > before)  # type: ignore[misc]


def refuse(stage: Stage, params: Params) -> None:
    proxy = _proxy(stage)
    proxy.refuses = True
    proxy.reset()
    try:
        _while_away(stage, params)
    finally:
        proxy.refuses = False


def some_room_left(chance: random.Random, setup: Setup) -> Params:
    drawn: Params = {"leave_kib": chance.randint(0, LEAVE_KIB_MAX), "seconds": round(chance.uniform(0, 1), 2)}
    return drawn | ({"shard": chance.randrange(setup.workers)} if chance.random() < 0.5 else {})


def fill_disk(stage: Stage, params: Params) -> None:
    """Writes come until they are refused; sometimes a shard is killed meanwhile. Then there is room again."""
    assert stage.disk is not None
    requests = stage.load.record.requests
    stage.disk.fill(int(params["leave_kib"]) << 10)
    stage.load.flood = True
    try:
        before = requests[REFUSED]
        eventually("writes are refused on a full disk", lambda: requests[REFUSED] > before)
        if "shard" in params:
            stage.service.kill("shard", int(params["shard"]))
        time.sleep(float(params["seconds"]))
    finally:
        stage.load.flood = False
        stage.disk.free()


def _while_away(stage: Stage, params: Params) -> None:
    stage.load.more(10)
    time.sleep(float(params["seconds"]))


def _mongo(stage: Stage) -> Mongo:
    assert stage.mongo is not None
    return stage.mongo


def _proxy(stage: Stage) -> Proxy:
    assert stage.proxy is not None
    return stage.proxy


KINDS = (
    Kind("kill-mongod", a_member, kill_mongod, weight=2, kills=True, needs=MONGODB),
    Kind("stop-mongod", a_member_and_seconds, stop_mongod, needs=MONGODB),
    Kind("slow-mongodb", a_delay, slow, needs=ONE_SERVER),
    Kind("cut-mongodb", some_cuts, cut, weight=2, needs=ONE_SERVER),
    Kind("refuse-mongodb", only_seconds, refuse, needs=ONE_SERVER),
    Kind("kill-primary", a_short_outage, kill_primary, weight=2, kills=True, needs=REPLICA_SET),
    Kind("step-down", a_short_outage, step_down, weight=2, needs=REPLICA_SET),
    Kind("full-disk", some_room_left, fill_disk, needs=frozenset({"small disk"})),
)
