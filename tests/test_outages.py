"""The real service while MongoDB is slow, refuses, is emptied or restored from a backup, or a copy of the folder is in use."""

import shutil
from typing import Any

import pytest
from mongod import Mongo
from service import Service, eventually

FLAGS = ("--set", "mongodb.push_interval=20ms", "--set", "mongodb.backoff_max=200ms", "--set", "mongodb.stats_interval=100ms",
         "--flush-interval", "20ms", "--cache-ttl", "0s", "--set", "data.partitions=4", "--workers", "2")  # fmt: skip
COMMANDS = ("insert", "update", "findAndModify", "find", "aggregate")
NAMES = [f"n{number}.example" for number in range(40)]


def flags(mongo: Mongo, database: str) -> list[str]:
    return [*FLAGS, "--mongodb", mongo.uri, "--set", f"mongodb.database={database}"]


class Copy:
    """What MongoDB holds, beside what it should hold."""

    def __init__(self, mongo: Mongo, database: str) -> None:
        self._mongo, self._database = mongo, database

    def held(self) -> dict[str, tuple[int, int]]:
        with self._mongo.client() as client:
            found = client[self._database].domain_status.find()
            return {document["_id"]: (document["delivered"], document["bounced"]) for document in found}

    def becomes(self, wanted: dict[str, tuple[int, int]]) -> None:
        eventually("the copy is exact", lambda: self.held() == wanted)


def count(service: Service, times: int = 1) -> None:
    events = [{"domain": name, "type": kind, "count": times} for name in NAMES for kind in ("delivered", "bounced")]
    assert service.client().bulk(*events).status == 200


def metric(service: Service, name: str) -> set[int]:
    """The values of a metric, over all its series."""
    lines = service.client().request("GET", "/metrics").body.decode().splitlines()
    return {int(float(line.split()[-1])) for line in lines if line.startswith((f"{name} ", f"{name}{{"))}


@pytest.mark.parametrize(
    "fault",
    [{"blockConnection": True, "blockTimeMS": 300}, {"errorCode": 13}, {"errorCode": 10107}, {"closeConnection": True}],
    ids=["slow", "forbidden", "not writable", "cut off"],
)
def test_with_a_mongodb_that_is_slow_or_refuses_all_goes_on_and_the_copy_is_exact_afterwards(
    serve: Any, mongo: Mongo, mongo_database: str, fault: dict[str, Any]
) -> None:
    service = serve(*flags(mongo, mongo_database))
    copy = Copy(mongo, mongo_database)
    count(service)
    copy.becomes(dict.fromkeys(NAMES, (1, 1)))
    with mongo.failing(*COMMANDS, **fault):
        if "blockConnection" not in fault:
            count(service)
            eventually("it is noticed", lambda: metric(service, "catchall_mongodb_up") == {0})
        before = service.client().counts(NAMES[0])[0]
        for times in range(1, 5):
            count(service)
            assert service.client().counts(NAMES[0]) == (before + times, before + times)
    wanted = dict.fromkeys(NAMES, (before + 4, before + 4))
    copy.becomes(wanted)
    assert service.client().stats()["total"] == len(NAMES)
    service.stop()


def test_a_mongodb_that_was_emptied_or_restored_is_filled_again_by_itself(
    serve: Any, mongo: Mongo, mongo_database: str
) -> None:
    service = serve(*flags(mongo, mongo_database))
    copy = Copy(mongo, mongo_database)
    count(service)
    copy.becomes(dict.fromkeys(NAMES, (1, 1)))
    eventually("all of it is pushed", lambda: metric(service, "catchall_mongodb_lag_flushes") == {0})
    with mongo.client() as client:
        database = client[mongo_database]
        backup = {name: list(database[name].find()) for name in ("domains", "domains_fences")}
        count(service)
        copy.becomes(dict.fromkeys(NAMES, (2, 2)))
        eventually("all of it is pushed", lambda: metric(service, "catchall_mongodb_lag_flushes") == {0})
        for name, documents in backup.items():
            database[name].delete_many({})
            database[name].insert_many(documents)
        copy.becomes(dict.fromkeys(NAMES, (2, 2)))
        client.drop_database(mongo_database)
        copy.becomes(dict.fromkeys(NAMES, (2, 2)))
    service.stop()


def test_two_live_copies_of_one_folder_end_with_components_of_their_own_and_count_what_comes_then(
    serve: Any, mongo: Mongo, mongo_database: str
) -> None:
    first = serve(*flags(mongo, mongo_database), "--set", "data.partitions=1", "--workers", "1", name="first")
    second = serve(*flags(mongo, mongo_database), "--set", "data.partitions=1", "--workers", "1", name="second")
    first.client().put("a.example")
    copy = Copy(mongo, mongo_database)
    copy.becomes({"a.example": (1, 0)})
    first.stop()
    second.stop()
    shutil.rmtree(second.data_dir)
    shutil.copytree(first.data_dir, second.data_dir)
    first.start()
    second.start()

    def begun_anew(service: Service) -> bool:
        service.client().put("earlier.example")
        return bool(list(service.data_dir.glob("00/ledger-*.superseded")))

    def alone(service: Service) -> bool:
        """It has begun anew, or the other one has and it knows. What came before may be missing in MongoDB."""
        said = service.log
        return begun_anew(service) or said.rfind("no other process pushes") >= said.rfind("another process pushes")

    eventually("one of them has parted", lambda: any([begun_anew(first), begun_anew(second)]))
    eventually("both are alone", lambda: all([alone(first), alone(second)]))
    for service in (first, second):
        service.wait_until_ready()
        for _ in range(3):
            service.client().count("later.example", delivered=1)
    later = {"later.example": (6, 0)}
    eventually("what came then is in the copy", lambda: later.items() <= copy.held().items())
    for service in (first, second):
        eventually("both see all of it", lambda service=service: service.client().counts("later.example") == (6, 0))
        service.stop()
