"""The cache: never above its bound, never behind what it was told."""

import random

import pytest

from catchall.engine.cache import TwoGenerations


@pytest.mark.parametrize("names_max", [0, 1, 2, 3, 10, 101])
@pytest.mark.parametrize("seed", range(10))
def test_it_never_exceeds_its_bound_and_never_answers_with_an_old_value(names_max, seed):
    rng = random.Random(seed)
    cache, truth = TwoGenerations(names_max), {}
    for step in range(600):
        if rng.random() < 0.4:
            entries = {f"n{rng.randrange(60)}": step for _ in range(rng.choice([0, 1, 3, 5, 80]))}
            truth |= entries
            cache.update(entries)
        else:
            name = f"n{rng.randrange(60)}"
            peeked = cache.peek(name)
            assert peeked in (None, truth.get(name))
            assert cache.get(name) == peeked
            assert cache.peek(name) == peeked
        assert len(cache) <= names_max


def test_what_is_asked_for_stays_and_what_is_not_goes():
    cache = TwoGenerations(20)
    cache.update({"hot": 1})
    for i in range(100):
        cache.update({f"cold{i}": 0})
        assert cache.get("hot") == 1
    assert cache.get("cold0") is None
    assert cache.get("cold99") == 0


def test_hits_alone_do_not_make_it_grow():
    cache = TwoGenerations(20)
    cache.update({f"a{i}": i for i in range(10)})
    cache.update({f"b{i}": i for i in range(10)})
    for i in range(10):
        cache.get(f"a{i}")
    cache.update({f"c{i}": i for i in range(10)})
    assert len(cache) <= 20
