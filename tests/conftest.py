"""Fixtures of all tests: MongoDB servers (mongod.py) and services (service.py)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mongod import connect_copy, mongo, mongo_database, own_mongo, own_standalone  # noqa: F401
from service import Service


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service of this test's own: serve("--workers", "2", name="other"). All of it is gone after the test."""
    with ExitStack() as stack:

        def start(*flags: str, name: str = "service") -> Service:
            (tmp_path / name).mkdir()
            return stack.enter_context(Service(tmp_path / name, *flags))

        yield start
