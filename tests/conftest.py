"""Fixtures of all tests: MongoDB servers (mongod.py), services (service.py) and canaries (canaries.py)."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from canaries import caught  # noqa: F401
from mongod import connect_copy, mongo, mongo_database, own_mongo, own_standalone  # noqa: F401
from service import HTTP_LIMITS, Client, Service


@contextmanager
def running(folder: Path, *flags: str) -> Iterator[Service]:
    """A service whose log shows when the test failed, and holds no traceback."""
    service = Service(folder, *flags)
    try:
        with service:
            yield service
    finally:
        print(f"log of the service on port {service.port}:\n{service.log[-6000:]}")
    assert "Traceback" not in service.log, service.log


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service of this test's own: serve("--workers", "2", name="other"). All of it is gone after the test."""
    with ExitStack() as stack:

        def start(*flags: str, name: str = "service") -> Service:
            (tmp_path / name).mkdir()
            return stack.enter_context(running(tmp_path / name, *flags))

        yield start


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that the tests of an xdist worker share, each with domains of its own. Do not stop it."""
    with running(tmp_path_factory.mktemp("http"), "--workers", "2", "--http-workers", "2", *HTTP_LIMITS) as shared:
        yield shared


@pytest.fixture
def client(service: Service) -> Client:
    return service.client()


@pytest.fixture
def domain() -> str:
    """A domain that no other test uses."""
    return f"d{uuid.uuid4().hex}.example"
