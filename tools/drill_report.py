"""The report of a drill: a line while it runs, the verdict, and all of it as JSON.

    {"schema": 1, "verdict": "lost=0 doubled=0 ambiguous=3", "exit_code": 0, "failure": null, "seed": 7, "command": "…",
     "versions": {…}, "options": {…}, "seconds": 41.2, "requests": {"acknowledged": …}, "tracebacks": [],
     "events": {"acknowledged": …, "ambiguous": …, "counted": …}, "checkpoints": [{"after": 25, "at_s": 31.0, "counted": …}],
     "mismatched": 0, "mismatches": [the first 20],
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
    _started: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def note_fault(self, planned: Planned, at_s: float, total: int) -> None:
        took_s = round(self.elapsed_s() - at_s, 3)
        self.faults.append(
            {"number": planned.number, "kind": planned.kind.name, "params": planned.params, "wait_ms": planned.wait_ms,
             "at_s": at_s, "took_s": took_s}
        )  # fmt: skip
        rate = self.record.requests[ACKNOWLEDGED] / max(0.001, self.elapsed_s())
        tell(f"fault {planned.number} of {total} {planned} recovered_s={took_s:.2f} acknowledged/s={rate:.0f}")

    def note_checkpoint(self, counts: dict[str, tuple[int, int]]) -> None:
        self.counted = sum(delivered + bounced for delivered, bounced in counts.values())
        self.checkpoints.append({"after": len(self.faults), "at_s": self.elapsed_s(), "counted": self.counted})
        tell(f"compared after {len(self.faults)} faults: {self.verdict}, {self.counted:,} events counted")

    @property
    def verdict(self) -> str:
        return verdict(self.mismatches, sum(self.record.ambiguous.values()))

    def as_json(self) -> dict[str, Any]:
        acknowledged, ambiguous = self.record.acknowledged.total(), self.record.ambiguous.total()
        return {
            "schema": SCHEMA, "verdict": self.verdict, "exit_code": self.code, "failure": self.failure, "seed": self.seed,
            "command": self.command, "options": self.options, "seconds": self.elapsed_s(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "requests": dict(self.record.requests),
            "events": {"acknowledged": acknowledged, "ambiguous": ambiguous, "counted": self.counted},
            "checkpoints": self.checkpoints, "mismatched": len(self.mismatches),
            "mismatches": [one._asdict() for one in self.mismatches[:DOMAINS_MAX]], "tracebacks": self.tracebacks,
            "faults": self.faults,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
