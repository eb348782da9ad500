"""Ids that are known to be sorted: they behave as the sorted tuple does, and cost nothing a client."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.learning.rows import ListedIds, NumberedIds, in_order

NUMBERED = st.integers(1, 300).map(NumberedIds)
LISTED = st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=12).map(ListedIds)


@given(NUMBERED | LISTED, st.slices(20), st.integers(-400, 400))
def test_they_are_the_sorted_tuple(ids, cut, place):
    plain = tuple(ids)
    assert list(plain) == sorted(set(plain))
    assert len(ids) == len(plain)
    assert ids[cut] == plain[cut]
    assert all(name in ids and ids.number(name) == ids.index(name) == i for i, name in enumerate(plain))
    assert list(reversed(ids)) == list(reversed(plain))
    if -len(plain) <= place < len(plain):
        assert ids[place] == plain[place]
    else:
        with pytest.raises(IndexError):
            ids[place]


@given(NUMBERED | LISTED, st.text(max_size=12) | st.integers() | st.just("client-00001") | st.just("client-٠٠٠٠"))
def test_nobody_else_is_among_them(ids, other):
    assert (other in ids) == (other in tuple(ids))
    assert ids.count(other) == tuple(ids).count(other)
    if other not in ids:
        with pytest.raises(KeyError):
            ids.number(other)
        with pytest.raises(ValueError):
            ids.index(other)


@pytest.mark.parametrize(
    ("count", "first", "last"), [(3, "client-0000", "client-0002"), (10_001, "client-00000", "client-10000")]
)
def test_numbered_ids_sort_as_their_numbers(count, first, last):
    ids = NumberedIds(count)
    assert (ids[0], ids[-1]) == (first, last)
    assert list(ids) == sorted(ids)


def test_what_is_sorted_is_not_sorted_again():
    ids = NumberedIds(10**8)
    assert in_order(ids) is ids
    assert sum(map(sys.getsizeof, vars(ids).values())) < 500
    assert list(in_order(("b", "a"))) == ["a", "b"]
