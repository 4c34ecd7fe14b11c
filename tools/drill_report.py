"""The report of a drill: a line while it runs, the verdict, and all of it as JSON.

    {"schema": 1, "verdict": "lost=0 doubled=0 ambiguous=3", "exit_code": 0, "failure": null, "when": "after 25 faults",
     "seed": 7, "command": "…", "versions": {…}, "options": {…}, "seconds": 41.2, "tracebacks": [], "log_end": "…",
     "requests": {"acknowledged": …}, "events": {"acknowledged": …, "ambiguous": …, "counted": …},
     "mismatched": 0, "mismatches": [the first 20],
     "checkpoints": [{"after": 25, "restarted": false, "at_s": 31.0, "counted": …}],
     "faults": [{"number": 1, "kind": "kill-shard", "params": {"shard": 0}, "wait_ms": 70, "at_s": 0.4, "took_s": 0.5}]}
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from catchall.tools.drill_plan import Planned
from catchall.tools.drill_record import ACKNOWLEDGED, Mismatch, Record, verdict

SCHEMA = 1
DOMAINS_MAX = 20  # mismatches that are told
GOOD, COULD_NOT_RUN, MISMATCH = 0, 1, 2
PACKAGES = ("catchall", "granian", "pymongo")


@dataclass(slots=True)
class Report:
    seed: int
    command: str
    options: dict[str, Any]
    record: Record
    code: int = GOOD
    failure: str | None = None
    mismatches: list[Mismatch] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    counted: int = 0  # events, at the last comparison
    tracebacks: list[str] = field(default_factory=list)  # in the service's log: how each ends
    log_end: str = ""
    _under_way: tuple[Planned, float] | None = None  # a fault, and when it began
    _started: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def begin_fault(self, planned: Planned) -> None:
        self._under_way = planned, self.elapsed_s()

    def end_fault(self, total: int) -> None:
        assert self._under_way is not None
        planned, at_s = self._under_way
        self._under_way = None
        took_s = round(self.elapsed_s() - at_s, 3)
        self.faults.append(
            {"number": planned.number, "kind": planned.kind.name, "params": planned.params, "wait_ms": planned.wait_ms,
             "at_s": at_s, "took_s": took_s}
        )  # fmt: skip
        rate = self.record.requests[ACKNOWLEDGED] / max(0.001, self.elapsed_s())
        tell(f"fault {planned.number} of {total}: {planned.what}, recovered in {took_s:.2f} s, {rate:.0f} acknowledged/s")

    def note_checkpoint(self, counts: dict[str, tuple[int, int]], restarted: bool) -> None:
        self.counted = sum(delivered + bounced for delivered, bounced in counts.values())
        self.checkpoints.append(
            {"after": len(self.faults), "restarted": restarted, "at_s": self.elapsed_s(), "counted": self.counted}
        )
        where = " and a stop and a start" if restarted else ""
        tell(f"compared after {len(self.faults)} faults{where}: {self.verdict}, {self.counted:,} events counted")

    @property
    def when(self) -> str:
        """What was being done, for a failure."""
        if self._under_way is not None:
            return f"during fault {self._under_way[0].number}, {self._under_way[0].what}"
        return f"after {len(self.faults)} faults"

    @property
    def verdict(self) -> str:
        return verdict(self.mismatches, sum(self.record.ambiguous.values()))

    def as_json(self) -> dict[str, Any]:
        acknowledged, ambiguous = self.record.acknowledged.total(), self.record.ambiguous.total()
        return {
            "schema": SCHEMA, "verdict": self.verdict, "exit_code": self.code, "failure": self.failure,
            "when": self.when, "seed": self.seed,
            "command": self.command, "options": self.options, "seconds": self.elapsed_s(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "requests": dict(self.record.requests),
            "events": {"acknowledged": acknowledged, "ambiguous": ambiguous, "counted": self.counted},
            "checkpoints": self.checkpoints, "mismatched": len(self.mismatches),
            "mismatches": [one._asdict() for one in self.mismatches[:DOMAINS_MAX]], "tracebacks": self.tracebacks,
            "log_end": self.log_end,
            "faults": self.faults,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
