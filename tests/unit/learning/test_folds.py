"""Rows and groups that fall into a half by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from fedlearn.errors import DataError
from fedlearn.learning.folds import unit_fold
from fedlearn.learning.task import Examples


def examples(count: int, groups: int | None = None, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    owners = None if groups is None else np.array([f"person {i}" for i in rng.integers(groups, size=count)])
    return Examples(rng.normal(size=(count, 3)), rng.integers(2, size=count), None, owners)


@pytest.mark.parametrize("groups", [None, 400])
def test_the_halves_are_all_rows_in_order_and_the_folds_share_them(groups):
    data = examples(4_000, groups)
    tested = []
    for fold in range(4):
        train, test = unit_fold(data, 9, 4, fold)
        assert sorted([*train, *test]) == list(range(4_000))
        assert (np.diff(train) > 0).all()
        assert (np.diff(test) > 0).all()
        assert (train.dtype, test.dtype) == (np.int64, np.int64)
        units = len(test) if groups is None else len(np.unique(data.groups[test]))
        total = 4_000 if groups is None else len(np.unique(data.groups))
        assert abs(units / total - 1 / 4) < 5 * (3 / 16 / total) ** 0.5
        tested += [*test]
    assert sorted(tested) == list(range(4_000))


def test_a_group_is_whole_in_one_half():
    data = examples(900, 60)
    train, test = unit_fold(data, 1, 3, 0)
    assert not set(data.groups[train]) & set(data.groups[test])


def test_the_half_is_the_rows_own_and_the_seeds():
    data = examples(300)
    _, test = unit_fold(data, 1, 3, 0)
    order = np.random.default_rng(1).permutation(300)
    _, shuffled = unit_fold(data.take(order), 1, 3, 0)
    assert sorted(order[shuffled]) == test.tolist()
    assert unit_fold(data, 2, 3, 0)[1].tolist() != test.tolist()
    alone = [len(unit_fold(data.take(np.array([row])), 1, 3, 0)[1]) for row in range(300)]
    assert np.flatnonzero(alone).tolist() == test.tolist()


def test_text_is_hashed_as_it_stands_not_as_wide_as_the_longest():
    narrow = Examples(np.array([["a"], ["bb"]]), np.zeros(2), None, np.array(["x", "y"]))
    wide = Examples(np.array([["a"], ["bb"], ["c" * 90]]), np.zeros(3), None, np.array(["x", "y", "z" * 80]))
    for drop in (False, True):
        one, other = (Examples(e.x, e.y, None, None if drop else e.groups) for e in (narrow, wide))
        for seed in range(20):
            assert set(unit_fold(one, seed, 2, 0)[1]) == set(unit_fold(other, seed, 2, 0)[1]) - {2}


def test_edges():
    assert [len(half) for half in unit_fold(examples(5), 0, 1, 0)] == [5, 0]
    assert [len(half) for half in unit_fold(examples(0), 0, 3, 0)] == [0, 0]
    with pytest.raises(DataError, match="got 3 of 3"):
        unit_fold(examples(5), 0, 3, 3)
