"""The plan of a drill: which faults, with what targets and parameters. The same seed and options give the same plan.

When exactly a fault strikes is not in it: that is up to the machine, and two runs of a plan meet the service at other instants.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from catchall.tools.drill_stage import Stage

Params = dict[str, int | float | str]

WAIT_MS_MAX = 150  # of load before a fault, so that it strikes anywhere between two flushes


class Setup(NamedTuple):
    """What the parameters of a fault are drawn for."""

    workers: int
    http_workers: int
    stop_seconds: float  # the longest time that a process stands still, or a server is away
    replicas: int


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    draw    chooses its parameters                       apply   does it, and puts back what it took away; what must hold
    weight  how often it is chosen, beside the others            meanwhile is asserted by exceptions (drill_stage.FAILURES)
    kills   whether it is SIGKILL                        needs   "durable", "mongodb", "one server", "replica set", "small disk"
    """

    name: str
    draw: Callable[[random.Random, Setup], Params]
    apply: Callable[[Stage, Params], None]
    weight: int = 1
    kills: bool = False
    needs: frozenset[str] = frozenset()


class Planned(NamedTuple):
    number: int  # from 1
    kind: Kind
    wait_ms: int
    params: Params

    @property
    def what(self) -> str:
        return " ".join([self.kind.name, *(f"{key}={value}" for key, value in self.params.items())])

    def __str__(self) -> str:
        return f"{self.number} {self.what} wait_ms={self.wait_ms}"


def make_plan(seed: int, count: int, kinds: Sequence[Kind], setup: Setup) -> list[Planned]:
    chance = random.Random(seed)
    plan = []
    for number in range(1, count + 1):
        (kind,) = chance.choices(kinds, [kind.weight for kind in kinds])
        planned = Planned(number, kind, chance.randint(0, WAIT_MS_MAX), kind.draw(chance, setup))
        plan.append(planned)
        setup = setup._replace(workers=int(planned.params.get("workers", setup.workers)))
    return plan
