"""The table of request paths that were parsed before."""

from catchall.http.paths import PathTable


def test_a_table_never_holds_more_than_its_bound():
    table: PathTable[int] = PathTable(100, {})
    for i in range(1000):
        table.put(b"/%d" % i, i)
        assert len(table) <= 100


def test_a_path_that_is_asked_for_again_outlives_those_that_are_not():
    table: PathTable[int] = PathTable(100, {})
    table.put(b"/hot", -1)
    for i in range(1000):
        table.put(b"/%d" % i, i)
        assert table.get(b"/hot") == -1
    assert table.get(b"/0") is None


def test_the_young_generation_stays_the_same_object_for_those_who_look_into_it_directly():
    young: dict[bytes, int] = {}
    table = PathTable(4, young)
    for i in range(100):
        table.put(b"/%d" % i, i)
        assert young[b"/%d" % i] == i
    assert table.young is young


def test_a_table_without_room_holds_nothing():
    table: PathTable[int] = PathTable(0, {})
    table.put(b"/a", 1)
    assert table.get(b"/a") is None
