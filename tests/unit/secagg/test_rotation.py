"""Rotation: keeps norms, comes back, spreads what is concentrated, adds no coordinate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.secagg.rotation import BLOCK, block_of, largest_after, rotated, unrotated

KEY = b"r" * 32
LENGTHS = (1, 2, 3, 5, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 3 * BLOCK)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_comes_back_and_keeps_the_norm(length, dtype):
    vector = np.random.default_rng(length).normal(size=length).astype(dtype)
    before = vector.copy()
    turned = rotated(vector, KEY)
    tolerance = 1e-5 if dtype is np.float32 else 1e-12
    assert turned.shape == vector.shape
    assert turned.dtype == dtype
    assert np.array_equal(vector, before), "the update is left as it is"
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(vector), rel=tolerance)
    assert np.allclose(unrotated(turned, KEY), vector, atol=tolerance)


@pytest.mark.parametrize("length", [3, 5, 70, 131])
def test_it_is_an_orthogonal_matrix(length):
    matrix = np.array([rotated(row, KEY) for row in np.eye(length)])
    assert np.allclose(matrix @ matrix.T, np.eye(length), atol=1e-12)


def test_keys_turn_differently():
    vector = np.ones(1000)
    assert not np.allclose(rotated(vector, KEY), rotated(vector, b"s" * 32))


@given(st.sampled_from(LENGTHS), st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_one_large_coordinate_is_spread_within_the_bound(length, where, key):
    vector = np.zeros(length)
    vector[where % length] = 2.0
    turned = rotated(vector, key.to_bytes(32, "big"))
    assert np.abs(turned).max() <= largest_after(length, 2.0, 2.0**-20) + 1e-12
    assert largest_after(length, 2.0, 2.0**-20) <= 2.0


def test_the_sum_of_rotations_is_the_rotation_of_the_sum():
    one, other = np.random.default_rng(2).normal(size=(2, 2 * BLOCK + 7))
    assert np.allclose(unrotated(rotated(one, KEY) + rotated(other, KEY), KEY), one + other, atol=1e-11)


def test_a_block_is_at_most_the_length():
    assert [block_of(n) for n in (1, 2, 3, 1000, 10**7)] == [1, 2, 2, 512, BLOCK]
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(rotated(np.array([1.0, np.inf, 0.0]), KEY)).all(), "what is not finite stays so"
