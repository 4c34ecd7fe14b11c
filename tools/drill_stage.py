"""What the faults of a drill act on: the service under load and, if there are any, MongoDB, the proxy and the small disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from catchall.tools.drill_disk import SmallDisk
from catchall.tools.drill_load import BrokenPromise, Load
from catchall.tools.drill_mongod import Mongo
from catchall.tools.drill_proxy import Proxy
from catchall.tools.drill_service import Service, ServiceFailed
from catchall.tools.polling import eventually

FAILURES = (ServiceFailed, BrokenPromise, TimeoutError)  # the service did not do what it promises

ACKNOWLEDGED_BEFORE, ACKNOWLEDGED_AFTER = 10, 20  # requests, before a fault and after it


@dataclass(slots=True)
class Stage:
    folder: Path  # for what a fault needs to write
    service: Service
    load: Load
    within_s: float  # how long a recovery may take
    mongo: Mongo | None = None
    proxy: Proxy | None = None  # between the service and a single server
    disk: SmallDisk | None = None  # where the data folder lies

    def under_load(self) -> None:
        """Requests are being acknowledged. Raises FAILURES."""
        self.load.more(ACKNOWLEDGED_BEFORE)

    def recovered(self) -> None:
        """Every process runs or has a successor, and requests are being acknowledged again. Raises FAILURES."""
        try:
            eventually("every process has a successor", lambda: self.service.complete, self.within_s)
            self.load.more(ACKNOWLEDGED_AFTER, self.within_s)
        except TimeoutError as error:
            said = f"{error}; last refusal: {self.load.record.last_refusal}"
            raise TimeoutError(f"the service did not recover within {self.within_s:g} s: {said}") from error

    def set_workers(self, workers: int) -> None:
        """How many shards the next start has."""
        flags = list(self.service.flags)
        flags[flags.index("--workers") + 1] = str(workers)
        self.service.flags = tuple(flags)
