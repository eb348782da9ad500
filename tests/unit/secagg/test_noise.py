"""Integer noise: the distribution that it says, to the last digit of its table; the same again from the same key."""

import math

import mpmath
import numpy as np
import pytest
from scipy import special, stats

from fedlearn.errors import StudyError
from fedlearn.secagg.noise import (
    PARTS_LIMIT,
    VARIANCE_LIMIT,
    Noise,
    _aliased,
    _Buffers,
    add_noise,
    magnitudes,
    sample,
    table_of,
)

KEY = b"n" * 32
VARIANCES = (0.05, 0.7, 3.0, 200.0, 54321.5)


def exact(kind: Noise, variance: float, k: np.ndarray) -> np.ndarray:
    """scipy's formulas: another way to the same chances, in double precision."""
    if kind is Noise.SKELLAM:
        return special.ive(np.abs(k), variance)
    everything = np.arange(-40 * math.ceil(math.sqrt(variance)) - 40, 40 * math.ceil(math.sqrt(variance)) + 41)
    return np.exp(-(k**2) / (2 * variance)) / np.exp(-(everything**2) / (2 * variance)).sum()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", Noise)
def test_a_table_holds_the_published_formula_to_double_precision(kind, variance):
    weights = magnitudes(kind, variance)
    assert sum(weights) == 2**127
    k = np.arange(len(weights))
    expected = exact(kind, variance, k) * np.where(k, 2, 1)
    assert np.allclose([w / 2**127 for w in weights], expected, rtol=1e-9, atol=1e-37)


@pytest.mark.parametrize("variance", [0.7, 200.0])
def test_a_table_holds_the_formula_to_a_hundred_bits(variance):
    with mpmath.workprec(300):
        v = mpmath.mpf(variance)
        for kind in Noise:
            weights = magnitudes(kind, variance)
            whole = mpmath.nsum(lambda k, v=v: mpmath.exp(-(k**2) / (2 * v)), [-mpmath.inf, mpmath.inf])
            for k in (0, 1, 2, 5, len(weights) - 1):
                chance = (
                    mpmath.exp(-v) * mpmath.besseli(k, v)
                    if kind is Noise.SKELLAM
                    else mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * v)) / whole
                )
                assert abs(weights[k] - (2 if k else 1) * chance * 2**127) < 2**20


@pytest.mark.parametrize("kind", Noise)
def test_columns_hold_exactly_the_weights(kind):
    weights = magnitudes(kind, 200.0)
    table = table_of(kind, 200.0)
    columns, share = 1 << table.bits, 1 << (127 - table.bits)
    held = [0] * columns
    for i in range(columns):
        keep = int(table.keep[i]) << 64 | int(table.more[i])
        assert 0 <= keep <= share
        held[i] += keep
        held[table.other[i]] += share - keep
    assert held[: len(weights)] == weights
    assert not any(held[len(weights) :])


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", Noise)
def test_what_is_drawn_is_distributed_as_it_says(kind, variance):
    count = 400_000
    drawn = sample(kind, variance, count, KEY)
    edges = np.arange(-40, 41) * max(
        1, round(math.sqrt(variance) / 10)
    )  # cells of a tenth of a deviation, tails at four
    wide = np.arange(-40 * math.ceil(math.sqrt(variance)) - 40, 40 * math.ceil(math.sqrt(variance)) + 41)

    def p_value(of: float) -> float:
        chances = np.bincount(np.digitize(wide, edges), exact(kind, of, wide), minlength=len(edges) + 1)
        observed = np.bincount(np.digitize(drawn, edges), minlength=len(edges) + 1)
        rare = count * chances < 10
        cells = np.append(observed[~rare], observed[rare].sum()), count * np.append(chances[~rare], chances[rare].sum())
        filled = cells[1] > 0
        return stats.chisquare(cells[0][filled], cells[1][filled] * count / cells[1][filled].sum()).pvalue

    assert p_value(variance) > 1e-4
    assert p_value(1.05 * variance) < 1e-6 or variance < 0.5, "the test would not see five per cent more variance"


def test_numbers_are_independent_of_their_neighbours():
    drawn = sample(Noise.SKELLAM, 200.0, 400_000, KEY).astype(float)
    for lag in (1, 2, 16, 1 << 14):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / math.sqrt(len(drawn))


def test_the_same_key_draws_the_same_and_another_one_does_not():
    first = sample(Noise.SKELLAM, 3.0, 50_000, KEY)
    assert np.array_equal(first, sample(Noise.SKELLAM, 3.0, 50_000, KEY))
    assert np.array_equal(first[:100], sample(Noise.SKELLAM, 3.0, 100, KEY)), (
        "a number depends on its place, not on the length"
    )
    assert not np.array_equal(first, sample(Noise.SKELLAM, 3.0, 50_000, b"o" * 32))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("variance", [0.7, 54321.5, 3.3 * VARIANCE_LIMIT])
def test_what_is_taken_off_is_what_was_added_wrapping_or_not(dtype, variance):
    vector = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, 40_001, dtype=dtype)
    before = vector.copy()
    add_noise(vector, Noise.SKELLAM, variance, KEY)
    assert not np.array_equal(vector, before)
    add_noise(vector, Noise.SKELLAM, variance, KEY, sign=-1)
    assert np.array_equal(vector, before)


def test_more_skellam_noise_than_a_table_holds_is_drawn_in_parts():
    drawn = sample(Noise.SKELLAM, 3.3 * VARIANCE_LIMIT, 100_000, KEY)
    assert abs(drawn.var() / (3.3 * VARIANCE_LIMIT) - 1) < 5 * math.sqrt(2 / 100_000)


def test_sums_of_skellam_shares_are_skellam():
    total = sum(sample(Noise.SKELLAM, 0.5, 400_000, bytes([i]) * 32) for i in range(6))
    reach = np.arange(-6, 7)
    expected = 400_000 * special.ive(np.abs(reach), 3.0)
    observed = np.array([(total == k).sum() for k in reach])
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_a_tie_is_broken_by_further_bits():
    table = _aliased([2**126, 2**125 + 2**60, 2**125 - 2**60, 0], 2)
    column = next(i for i in range(4) if table.more[i] and table.keep[i] > 1)
    word = np.array([(column << 62) | int(table.keep[column])], dtype=np.uint64)
    buffers = _Buffers(1)
    asked = []

    def ties(further: int):
        return lambda count: asked.append(count) or np.array([further], dtype=np.uint64)

    below = buffers.numbers(table, word, ties(int(table.more[column]) - 1)).copy()
    at = buffers.numbers(table, word, ties(int(table.more[column]))).copy()
    assert asked == [1, 1]
    assert below[0] == column
    assert at[0] == table.other[column]
    clear = word - np.uint64(1)
    assert buffers.numbers(table, clear, ties(0))[0] == column
    assert asked == [1, 1], "a word that ties with nothing needs no further bits"


def test_one_column_is_drawn_too():
    assert not sample(Noise.DISCRETE_GAUSSIAN, 1e-4, 1000, KEY).any()


@pytest.mark.parametrize(
    ("kind", "variance"),
    [
        (Noise.SKELLAM, 0.0),
        (Noise.SKELLAM, -1.0),
        (Noise.SKELLAM, math.nan),
        (Noise.SKELLAM, math.inf),
        (Noise.SKELLAM, 1.01 * PARTS_LIMIT * VARIANCE_LIMIT),
        (Noise.DISCRETE_GAUSSIAN, 1.01 * VARIANCE_LIMIT),
    ],
)
def test_what_cannot_be_drawn_is_refused(kind, variance):
    with pytest.raises(StudyError, match="noise: variance"):
        sample(kind, variance, 10, KEY)
