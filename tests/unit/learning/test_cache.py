"""The cache of prepared clients: never more than its limit, and one value a key whoever asks."""

from __future__ import annotations

import pickle
import threading

from hypothesis import given
from hypothesis import strategies as st

from fedlearn.learning.cache import ByteCache

OPERATIONS = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60)), max_size=60)


@given(OPERATIONS)
def test_it_holds_the_last_used_within_its_limit(operations):
    cache, model = ByteCache(100, len), {}
    for key, size in operations:
        if (got := cache.get(key)) is not None:
            assert got == model[key]
            model[key] = model.pop(key)
        else:
            cache.put(key, "x" * size)
            if size <= 100:
                model[key] = "x" * size
            while sum(map(len, model.values())) > 100:
                del model[next(iter(model))]
        assert cache.used_bytes == sum(map(len, model.values())) <= 100
        assert len(cache) == len(model)
    assert all(cache.get(key) == value for key, value in list(model.items()))


def test_what_is_too_large_is_given_back_but_not_kept():
    cache = ByteCache(10, len)
    cache.put("a", "small")
    assert cache.put("b", "x" * 11) == "x" * 11
    assert (cache.get("a"), cache.get("b")) == ("small", None)


def test_of_two_threads_the_first_ones_value_stands():
    cache = ByteCache(10**6, lambda _: 1)
    kept: dict[str, set[int]] = {str(n): set() for n in range(200)}
    start = threading.Barrier(4)

    def work():
        start.wait()
        for key, seen in kept.items():
            seen.add(id(cache.get(key) or cache.put(key, object())))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(seen) == 1 for seen in kept.values())
    assert (len(cache), cache.used_bytes) == (200, 200)


def test_a_pickle_begins_empty():
    cache = ByteCache(10, len)
    cache.put("a", "small")
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.limit_bytes, len(copy), len(cache)) == (10, 0, 1)
