"""Robust centres by blocks equal the dense ones, and resist what they promise to resist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlearn.aggregation import robust
from fedlearn.aggregation.stack import UpdateStack
from fedlearn.arrays import Spec
from fedlearn.errors import UpdateError
from tests.contract.oracles import krum_by_brute_force, krum_order

matrices = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 7), st.integers(1, 9)),
    elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)),
)


@contextmanager
def stacked(matrix: np.ndarray, block_bytes: int = 1 << 20) -> Iterator[UpdateStack]:
    """Rows arrive last first; their ids put them in order."""
    with UpdateStack({"w": Spec((matrix.shape[1],), "float64")}, block_bytes=block_bytes) as stack:
        for k in reversed(range(len(matrix))):
            stack.add(f"{k:03d}", {"w": matrix[k]}, 1)
        yield stack


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(8, 300))
def test_median_and_trimmed_mean_by_blocks(matrix, block_bytes) -> None:
    with stacked(matrix, block_bytes) as stack:
        ordered = np.sort(matrix, axis=0)
        n = len(matrix)
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        assert np.allclose(robust.coordinate_median(stack), middle, rtol=1e-12, atol=0)
        for trim in range((n + 1) // 2):
            expected = ordered[trim : n - trim].mean(axis=0)
            assert np.allclose(robust.trimmed_mean(stack, trim), expected, rtol=1e-12, atol=1e-9)
        assert np.array_equal(robust.mean_of_rows(stack, [n - 1, 0]), matrix[[0, n - 1]].mean(axis=0))


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(8, 300))
def test_distances_by_blocks(matrix, block_bytes) -> None:
    exact = ((matrix[:, None] - matrix[None]) ** 2).sum(axis=2)
    with stacked(matrix, block_bytes) as stack:
        got = robust.squared_distances(stack)
    assert np.allclose(got, exact, rtol=1e-12, atol=0)
    assert np.array_equal(got, got.T)
    assert not np.diag(got).any()


def test_distances_of_more_columns_than_a_chunk() -> None:
    matrix = np.random.default_rng(0).normal(size=(4, 3 * robust._CHUNK + 5))
    with stacked(matrix, 8 * 4 * 2000) as stack:
        got = robust.squared_distances(stack)
    assert np.allclose(got, ((matrix[:, None] - matrix[None]) ** 2).sum(axis=2), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(5, 7), st.integers(1, 4)), elements=st.floats(-1e3, 1e3)))
def test_krums_scores_are_the_smallest_sums_of_neighbours(matrix) -> None:
    with stacked(matrix) as stack:
        scores = robust.krum_scores(robust.squared_distances(stack), 1)
    assert np.allclose(scores, krum_by_brute_force(matrix, 1), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, (7, 2), elements=st.integers(-2, 2).map(float)), st.integers(1, 6))
def test_ties_go_to_the_smallest_id(matrix, select) -> None:
    with stacked(matrix) as stack:  # small integers: distances are exact, and many are equal
        assert list(robust.select_krum(stack, 2, select)) == krum_order(matrix, 2)[:select]


@pytest.mark.parametrize("attack", [1e3, 1e200, 1.7e308])
def test_colluding_attackers_are_not_chosen(attack) -> None:
    honest = np.random.default_rng(4).normal(size=(5, 6))
    evil = np.full((2, 6), attack)
    evil[1] = -attack
    with stacked(np.vstack([evil, honest])) as stack:
        assert 0 not in robust.select_krum(stack, 2, 5)
        assert 1 not in robust.select_krum(stack, 2, 5)


def test_too_few_rows_are_refused() -> None:
    with stacked(np.zeros((4, 2))) as stack:
        with pytest.raises(UpdateError, match=r"got 4 updates with byzantine = 1, expected at least 2 \* 1 \+ 3 = 5"):
            robust.select_krum(stack, 1, 1)
        with pytest.raises(UpdateError, match="select = 5 of 4"):
            robust.select_krum(stack, 0, 5)
        with pytest.raises(UpdateError, match="got 4 updates and trim 2"):
            robust.trimmed_mean(stack, 2)
        with pytest.raises(UpdateError, match="trim -1"):
            robust.trimmed_mean(stack, -1)
    with UpdateStack({"w": Spec((2,), "float64")}) as empty:
        for centre in (
            robust.coordinate_median,
            lambda s: robust.trimmed_mean(s, 0),
            lambda s: robust.mean_of_rows(s, [0]),
        ):
            with pytest.raises(UpdateError):
                centre(empty)
