"""Fixtures over real MongoDB servers (catchall.tools.drill_mongod).

`mongo` is shared by all tests of one xdist worker, each with its own `mongo_database`; `own_mongo` and `own_standalone` are for
tests that hurt the server; `connect_copy` makes a MongoCopy over this test's database.
"""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from catchall.storage.mongodb import MongoCopy, MongoOptions
from catchall.tools.drill_mongod import Mongo, Mongod, mongod_binary, replica_set, standalone
from catchall.tools.drill_process import free_port
from catchall.tools.polling import eventually

__all__ = ["Connect", "Mongo", "Mongod", "connect_copy", "eventually", "free_port", "mongo", "mongo_database", "mongod_binary",
           "own_mongo", "own_standalone", "replica_set", "standalone"]  # fmt: skip


@pytest.fixture(scope="session")
def mongo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mongo]:
    """The replica set of one node that the tests of an xdist worker share. Do not stop it."""
    with replica_set(tmp_path_factory.mktemp("mongo")) as running:
        yield running


@pytest.fixture
def mongo_database() -> str:
    """The name of a database that no other test uses."""
    return f"test_{uuid.uuid4().hex}"


@pytest.fixture
def own_mongo(tmp_path: Path) -> Iterator[Mongo]:
    """A replica set of one node for one test, which may stop, kill and pause it."""
    with replica_set(tmp_path / "mongo") as running:
        yield running


@pytest.fixture
def own_standalone(tmp_path: Path) -> Iterator[Mongo]:
    """A server that is no replica set, for one test."""
    with standalone(tmp_path / "standalone") as running:
        yield running


Connect = Callable[..., MongoCopy]


@pytest.fixture
def connect_copy(mongo_database: str) -> Iterator[Connect]:
    """Return a maker of copies, `connect_copy(uri, **options)`, over this test's database; it closes them all."""
    made: list[MongoCopy] = []

    def connect(uri: str, **options: Any) -> MongoCopy:
        waits = {"connect_timeout": 5.0, "server_selection_timeout": 5.0, "socket_timeout": 20.0, **options}
        made.append(MongoCopy(MongoOptions(uri=uri, database=mongo_database, **waits)))
        return made[-1]

    yield connect
    for copy in made:
        copy.close()
