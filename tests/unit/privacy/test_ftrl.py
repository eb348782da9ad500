"""DP-FTRL: sensitivity by brute force, noise that is C^-1 Z, and what it is all for: a smaller error of the running sums."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import LocalProtocolError, StudyError
from fedlearn.privacy.accounting import account, pld_epsilon
from fedlearn.privacy.events import Cost, Gaussian, Repeated
from fedlearn.privacy.ftrl import (
    Banded,
    BufferedToeplitz,
    CorrelatedNoise,
    FtrlPlan,
    inverse_coefficients,
    sensitivity,
)
from fedlearn.privacy.ftrl_fit import MAX_FITTED_ROUNDS, fitted
from fedlearn.privacy.mechanisms import seeded_chance

BLT = BufferedToeplitz((0.25, 0.2), (0.9, 0.4))
PLAN = FtrlPlan(Banded(4), rounds=9, separation=4, clip_l2=2.0, noise_multiplier=1.5, delta=1e-5, units=1_000)


def chance_of(number: int):
    return seeded_chance(1, "ftrl", number)


def matrix(plan: FtrlPlan) -> np.ndarray:
    column = plan.strategy.coefficients(plan.rounds)
    return np.array([[column[i - j] if i >= j else 0.0 for j in range(plan.rounds)] for i in range(plan.rounds)])


@pytest.mark.parametrize("strategy", [Banded(1), Banded(3), Banded(9), BLT], ids=str)
@pytest.mark.parametrize("separation", [1, 2, 4, 9])
@pytest.mark.parametrize("most", [None, 1, 2, 3])
def test_sensitivity_is_the_worst_pattern_of_participation(strategy, separation, most):
    plan = replace(PLAN, strategy=strategy, separation=separation, most=most)
    columns, worst = matrix(plan).T, 0.0
    for count in range(1, plan.participations + 1):
        for rounds in itertools.combinations(range(plan.rounds), count):
            if all(b - a >= separation for a, b in itertools.pairwise(rounds)):
                # C is not negative, so contributions that all point one way move it furthest.
                worst = max(worst, float(np.linalg.norm(columns[list(rounds)].sum(0))))
    assert plan.sensitivity == pytest.approx(worst)


@given(
    steps=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    separation=st.integers(1, 9),
    most=st.integers(1, 4),
)
def test_no_pattern_and_no_direction_moves_more_than_the_sensitivity(steps, separation, most):
    """Theorem 2 for any coefficients that fall: over all patterns of participation, and contributions of any sign."""
    column = np.cumprod([1.0, *steps])
    n = len(column)
    columns = np.array([[column[i - j] if i >= j else 0.0 for i in range(n)] for j in range(n)])
    worst = 0.0
    for count in range(1, most + 1):
        for rounds in itertools.combinations(range(n), count):
            if any(b - a < separation for a, b in itertools.pairwise(rounds)):
                continue
            for signs in itertools.product((1.0, -1.0), repeat=count - 1):
                worst = max(worst, float(np.linalg.norm(np.array([1.0, *signs]) @ columns[list(rounds)])))
    assert sensitivity(column, separation, min(most, -(-n // separation))) == pytest.approx(worst)


@pytest.mark.parametrize("most", [None, 2])
def test_the_zcdp_of_a_published_matrix(most):
    # Google's federated-compute accounting of a BLT matrix, its own test's figure: 100 rounds, separation 50, noise multiplier 1.
    decays = (0.9999999999921251, 0.9944453083640997, 0.8985923474607591, 0.4912001418098778)
    weights = (0.0070314825502323835, 0.10613806907600574, 0.1898159060327625, 0.1966594748073734)
    plan = replace(PLAN, strategy=BufferedToeplitz(weights, decays), rounds=100, separation=50, most=most)
    assert plan.sensitivity**2 / 2 == pytest.approx(3.17226586, abs=1e-8)


def test_bands_no_wider_than_the_separation_cost_the_root_of_the_participations():
    # Choquette-Choo et al. 2023: columns that do not overlap are orthogonal.
    plan = replace(PLAN, strategy=Banded(4), rounds=8)
    one = float(np.linalg.norm(plan.strategy.coefficients(8)))
    assert plan.sensitivity == pytest.approx(math.sqrt(2) * one)


def test_independent_noise_costs_what_its_composition_costs():
    # One band: a client that takes part in k rounds is k Gaussian releases.
    plan = replace(PLAN, strategy=Banded(1), separation=3)
    each = plan.noise_std / plan.clip_l2
    assert plan.participations == 3
    assert pld_epsilon(plan.cost(), 1e-5) == pytest.approx(
        pld_epsilon(Cost(Repeated(Gaussian(each), 3)), 1e-5), rel=1e-3
    )


@pytest.mark.parametrize("strategy", [Banded(1), Banded(3), Banded(40), BLT], ids=str)
def test_noise_is_the_inverse_of_c_times_independent_noise(strategy):
    plan = replace(PLAN, strategy=strategy)
    noise = CorrelatedNoise(plan, 5, chance_of)
    found = np.stack([noise.next() for _ in range(plan.rounds)])
    independent = np.stack([chance_of(t).normal(5, plan.noise_std) for t in range(1, plan.rounds + 1)])
    np.testing.assert_allclose(matrix(plan) @ found, independent, atol=1e-9)
    with pytest.raises(LocalProtocolError, match="9 rounds"):
        noise.next()


def test_the_square_root_is_a_square_root():
    # c * c = (1, 1, 1, ...), the running sums; its squared norm is Landau's constant, bounded by Brutman (1982).
    column = Banded(10**5).coefficients(10**5)
    np.testing.assert_allclose(np.convolve(column[:200], column[:200])[:200], 1.0, rtol=1e-9)
    for n in (10, 1_000, 100_000):
        assert 1 <= column[:n] @ column[:n] - math.log(n) / math.pi < 1.0663
    inverse = inverse_coefficients(column[:50])
    np.testing.assert_allclose(np.convolve(inverse, column[:50])[:50], [1.0] + [0.0] * 49, atol=1e-12)


def test_the_error_of_running_sums_is_the_measured_one():
    plan = replace(PLAN, strategy=Banded(4))
    noise = CorrelatedNoise(plan, 40_000, chance_of)
    sums = np.cumsum([noise.next() for _ in range(plan.rounds)], axis=0)
    assert math.sqrt(float((sums**2).mean())) == pytest.approx(plan.error(), rel=0.02)


def test_correlated_noise_is_what_it_is_for():
    plan = replace(PLAN, rounds=512, separation=512)
    independent, banded, whole = (replace(plan, strategy=Banded(b)).error() for b in (1, 32, 512))
    assert whole < banded < independent
    assert independent / whole > 4
    assert replace(plan, strategy=BufferedToeplitz((0.2, 0.15, 0.1), (0.99, 0.9, 0.3))).error() < independent / 2


@pytest.mark.parametrize(
    ("rounds", "separation", "most", "gain"),
    [
        (100, 10, 10, 2.2),
        (200, 20, 10, 2.95),
        (256, 256, 1, 3.5),
        (500, 25, 4, 3.0),
        (2_000, 100, 20, 6.55),
        (7, 3, 3, 1.2),
    ],
)
def test_a_fitted_matrix_is_as_good_as_bands_of_the_separation(rounds, separation, most, gain):
    blt = fitted(rounds, separation, most)
    plan = replace(PLAN, strategy=blt, rounds=rounds, separation=separation, most=most)
    assert plan.error() < 1.04 * replace(plan, strategy=Banded(separation)).error()
    assert plan.error() < replace(plan, strategy=Banded(1)).error() / gain
    assert len(blt.decays) == 2, "two models of memory"


def test_nothing_is_better_than_independent_noise_where_everybody_comes_every_round():
    blt = fitted(40, 1, 40)
    assert sensitivity(blt.coefficients(40), 1, 40) == pytest.approx(math.sqrt(40), rel=1e-6)


def test_a_fit_has_a_limit():
    with pytest.raises(StudyError, match=r"MAX_FITTED_ROUNDS.*5000"):
        fitted(MAX_FITTED_ROUNDS + 1, 10, 3)


def test_the_whole_run_is_one_gaussian_to_every_accountant():
    # The analytic Gaussian mechanism (Balle and Wang 2018): epsilon = 1 at delta = 1e-5 needs 3.730632.
    answer = account(replace(PLAN, noise_multiplier=3.730632).cost(), 1e-5)
    assert answer.reported.epsilon == pytest.approx(1.0, abs=1e-3)
    assert answer.shown[0].epsilon >= answer.reported.epsilon


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rounds": 0}, "rounds"),
        ({"separation": 0}, "separation"),
        ({"most": 0}, "participations"),
        ({"clip_l2": 0.0}, "clip_l2"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"delta": 1e-3}, "less than 1/1000"),
        ({"delta": 0.0}, "delta"),
        ({"units": 0}, "delta"),
        ({"strategy": BufferedToeplitz((-0.5,), (0.5,))}, "negative"),
        ({"strategy": BufferedToeplitz((1.5,), (0.5,))}, "rise"),
    ],
)
def test_a_plan_whose_sensitivity_is_not_known_is_refused(change, says):
    with pytest.raises(StudyError, match=says):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Banded(0),
        lambda: BufferedToeplitz((), ()),
        lambda: BufferedToeplitz((1.0,), (0.5, 0.5)),
        lambda: BufferedToeplitz((1.0,), (1.0,)),
        lambda: BufferedToeplitz((math.inf,), (0.5,)),
    ],
)
def test_a_family_out_of_range_is_refused(make):
    with pytest.raises(StudyError, match="DP-FTRL"):
        make()
