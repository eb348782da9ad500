"""Chance: right distributions, secret by default, reproducible when seeded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedlearn.privacy.mechanisms import secret_chance, seeded_chance


def draw(count: int, dtype=np.float64, std: float = 1.0, seed: int = 1) -> np.ndarray:
    out = np.zeros(count, dtype=dtype)
    seeded_chance(seed, "test").add_normal(out, std)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_is_normal(dtype):
    found = draw(400_000, dtype, 3.0).astype(np.float64) / 3.0
    assert stats.kstest(found, "norm").pvalue > 1e-4
    assert abs(found.mean()) < 5 / math.sqrt(len(found))
    assert abs(found.var() - 1) < 5 * math.sqrt(2 / len(found))
    assert abs(stats.kurtosis(found)) < 5 * math.sqrt(24 / len(found))
    # A pair shares its radius, and still is independent.
    half = 1 << 14
    assert abs(np.corrcoef(found[:half], found[half : 2 * half])[0, 1]) < 5 / math.sqrt(half)


def test_noise_is_added_whatever_the_shape():
    for count in (0, 1, 2, 3, 32_767, 32_768, 32_769, 65_537):
        found = draw(count)
        assert found.shape == (count,)
        assert len(np.unique(found)) == count
    grid = np.full((3, 5), 7.0)
    seeded_chance(1, "test").add_normal(grid, 0.5)
    np.testing.assert_allclose(grid.ravel(), 7.0 + draw(15, std=0.5))


@pytest.mark.parametrize("lengths", [(3, 0, 1, 32_768, 5), (40_000, 30_000), (), (0,), (70_001,)])
def test_several_arrays_get_the_noise_of_one(lengths):
    parts = [np.zeros((length, 1)) for length in lengths]
    seeded_chance(1, "test").add_normals(parts, 2.0)
    np.testing.assert_array_equal(np.concatenate([np.zeros(0), *map(np.ravel, parts)]), draw(sum(lengths), std=2.0))


def test_arrays_of_several_types_are_refused():
    with pytest.raises(ValueError, match="noise"):
        secret_chance().add_normals([np.zeros(3), np.zeros(3, dtype=np.float32)], 1.0)


@pytest.mark.parametrize("to", [np.zeros(4, dtype=np.int64), np.zeros((4, 4))[:, :3], np.zeros(4, dtype=np.float16)])
def test_what_cannot_carry_noise_is_refused(to):
    with pytest.raises(ValueError, match="noise"):
        secret_chance().add_normal(to, 1.0)


def test_seeded_chance_repeats_and_secret_chance_does_not():
    assert draw(10).tolist() == draw(10).tolist() != draw(10, seed=2).tolist()
    assert not seeded_chance(1, "test").private
    first, second = secret_chance(), secret_chance()
    assert first.private
    assert first.normal(10).tolist() != second.normal(10).tolist() != first.normal(10).tolist()


def test_coins_fall_as_often_as_they_should():
    heads = seeded_chance(3, "coins").coins(200_000, 0.03)
    assert stats.binomtest(int(heads.sum()), len(heads), 0.03).pvalue > 1e-4
    assert secret_chance().coins(1000, 1.0).all()


def test_a_key_does_not_show():
    assert repr(secret_chance()) == "Chance(private=True)"
