"""Breaking a rule on purpose, and having a check find it: for test_canaries.py and test_canaries_ids.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from catchall.engine.push import Superseded

FOUND = (AssertionError, Superseded)

Check = Callable[[int], None]


@pytest.fixture
def caught(tmp_path: Path, record_property: Callable[[str, object], None]) -> Callable[[Check, int], None]:
    """Run a check up to so many times, each in a folder of its own, until it fails. --junit-xml keeps what it found."""

    def run(check: Check, tries: int) -> None:
        for number in range(1, tries + 1):
            (tmp_path / str(number)).mkdir()
            try:
                check(number)
            except FOUND as found:
                record_property("found", f"at try {number}: {type(found).__name__} {str(found).splitlines()[0]}")
                return
        pytest.fail(f"in {tries} tries the check has not seen that the rule is broken")

    return run


def broken(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Lay a wrong version over owner.name; `make` gets the right one."""
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))
