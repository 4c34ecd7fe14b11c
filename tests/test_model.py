"""Random interleavings of everything that can happen to a service, drawn by hypothesis; the world is in tests/model.py.

The same examples at every run. For a long search with new and longer ones, which also shrinks what it finds:

    CATCHALL_MODEL_EXAMPLES=20000 .venv/bin/python -m pytest -n 3 --timeout 0 tests/test_model.py
"""

import itertools
import logging
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from model import Trouble, World
from model_books import NAMES, ONCE, PARTITIONS, Event

LONG = int(os.environ.get("CATCHALL_MODEL_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=LONG or 60,
    stateful_step_count=60 if LONG else 40,
    deadline=None,
    derandomize=not LONG,
    database=None,
    phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

hosts = st.integers(0, 1)
partitions = st.integers(0, PARTITIONS - 1)
numbers = st.integers(0, 1)  # of a writer or a shard
plain_names = st.integers(0, len(NAMES) - len(ONCE) - 1)
once_names = st.integers(0, len(NAMES) - 1)
events = st.lists(st.tuples(plain_names, st.sampled_from("+-"), st.integers(1, 3)), min_size=1, max_size=6)
events_with_ids = st.lists(st.tuples(once_names, st.sampled_from("+-"), st.integers(1, 3)), min_size=1, max_size=4)
keys = st.none() | st.integers(0, 2)
troubles = st.none() | st.builds(Trouble, st.sampled_from(("death", "death", "death", *World.MEANWHILE)), st.integers(1, 24))


class Service(RuleBasedStateMachine):
    """What may happen to a service, in any order."""

    policy = "interval"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="catchall-model-")
        names = itertools.count(1)  # of segments: the same at every run
        self.names = mock.patch("secrets.token_hex", lambda size: f"{next(names):0{2 * size}x}")
        self.names.start()

    @initialize(seed=st.integers(0, 1 << 16), hosts=st.integers(1, 2), names_max=st.sampled_from((1000, 4)))
    def begin(self, seed: int, hosts: int, names_max: int) -> None:
        self.world = World(Path(self.folder.name), seed, self.policy, hosts, names_max)
        for machine in self.world.machines:
            self.world.start(machine, 0)

    def at(self, host: int):
        return self.world.machines[host % len(self.world.machines)]

    @rule(host=hosts, writer=numbers, events=events, trouble=troubles)
    def append(self, host: int, writer: int, events: list[Event], trouble: Trouble | None) -> None:
        self.world.append(self.at(host), writer, events, trouble)

    @rule(host=hosts, writer=numbers, events=events)
    def append_undisturbed(self, host: int, writer: int, events: list[Event]) -> None:
        self.world.append(self.at(host), writer, events)

    @rule(host=hosts, writer=numbers, events=events_with_ids, key=keys, trouble=troubles)
    def send_with_ids(self, host: int, writer: int, events: list[Event], key: int | None, trouble: Trouble | None) -> None:
        self.world.send_with_ids(self.at(host), writer, events, key, trouble)

    @rule(host=hosts, writer=numbers, which=st.integers(-3, 20), trouble=troubles)
    def resend(self, host: int, writer: int, which: int, trouble: Trouble | None) -> None:
        self.world.resend(self.at(host), writer, which, trouble)

    @rule(host=hosts, partition=partitions, number_max=st.none() | st.integers(0, 40))
    def lose(self, host: int, partition: int, number_max: int | None) -> None:
        """Ids, because there is no room for more of them; or the whole ledger, because a later state of it is known."""
        if number_max is None:
            self.at(host).supersede(partition)
        else:
            self.at(host).forget(partition, number_max)

    @rule(host=hosts, writer=numbers, fails=st.sampled_from((False, False, False, True)), trouble=troubles)
    def sync(self, host: int, writer: int, fails: bool, trouble: Trouble | None) -> None:
        self.world.sync(self.at(host), writer, fails, trouble)

    @rule(host=hosts, writer=numbers, hours=st.integers(-48, 48))
    def second(self, host: int, writer: int, hours: int) -> None:
        self.world.second(self.at(host), writer, hours)

    @rule(host=hosts, number=numbers, trouble=troubles, end=st.sampled_from(("close", "kill", "kill", "restart", "stop")))
    def end(self, host: int, number: int, trouble: Trouble | None, end: str) -> None:
        world, machine = self.world, self.at(host)
        if end == "close":
            world.close(machine, number, trouble)
        elif end == "kill":
            world.kill_writer(machine, number)
            world.kill_shard(machine, 1 - number)
        elif end == "restart":
            world.restart(machine, 1 + number)
        else:
            world.stop(machine, number)

    @rule(host=hosts, shard=numbers, trouble=troubles)
    def start(self, host: int, shard: int, trouble: Trouble | None) -> None:
        self.world.start(self.at(host), shard, trouble)

    @rule(host=hosts, partition=partitions, bytes_max=st.sampled_from((1, 1000, 1 << 20)), trouble=troubles)
    def look(self, host: int, partition: int, bytes_max: int, trouble: Trouble | None) -> None:
        self.world.look(self.at(host), partition, bytes_max, trouble)

    @rule(host=hosts, partition=partitions)
    def cut(self, host: int, partition: int) -> None:
        self.world.cut(self.at(host), partition)

    @rule(host=hosts, partition=partitions, trouble=troubles)
    def run(self, host: int, partition: int, trouble: Trouble | None) -> None:
        self.world.run(self.at(host), partition, trouble)

    @rule(host=hosts, partition=partitions, trouble=troubles)
    def flush(self, host: int, partition: int, trouble: Trouble | None) -> None:
        self.world.look(self.at(host), partition, 1 << 20)
        self.world.flush(self.at(host), partition, trouble)

    @rule(host=hosts, partition=partitions, trouble=troubles)
    def push(self, host: int, partition: int, trouble: Trouble | None) -> None:
        self.world.push(self.at(host), partition, trouble)

    @rule(host=hosts, partition=partitions)
    def read(self, host: int, partition: int) -> None:
        self.at(host).check_read(partition)

    @rule(what=st.sampled_from(("outage", "snapshot", "restore")), which=st.integers(0, 3))
    def mongodb(self, what: str, which: int) -> None:
        if what == "outage":
            self.world.outage()
        elif what == "snapshot":
            self.world.snapshot()
        else:
            self.world.restore(which)

    @rule(host=hosts, what=st.sampled_from(("disk full", "settle", "settle", "power")))
    def disk(self, host: int, what: str) -> None:
        if what == "disk full":
            self.world.disk_full(self.at(host))
        elif what == "settle":
            self.world.settle(self.at(host))
        else:
            self.world.cut_power(self.at(host))

    def teardown(self) -> None:
        try:
            self.world.finish()
        finally:
            self.world.bury()
            self.names.stop()
            self.folder.cleanup()


@pytest.mark.parametrize("policy", ["always", "interval", "never"])
def test_whatever_happens_in_whatever_order_everything_is_counted_once(policy, caplog):
    caplog.set_level(logging.CRITICAL, "catchall")  # thousands of examples tell of their power cuts
    run_state_machine_as_test(type(policy.capitalize(), (Service,), {"policy": policy}), settings=SETTINGS)
