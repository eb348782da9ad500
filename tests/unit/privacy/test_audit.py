"""One-run auditing: theorem 5.2 by another way of computing it, its error rates, and the builds that it must catch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import StudyError
from fedlearn.privacy.audit import (
    LARGEST_BOUND,
    count_correct,
    epsilon_lower_bound,
    guess_counts,
    imagined_scores,
    judge,
    p_value,
    power,
)
from fedlearn.privacy.canaries import Canaries, CanarySteps, Evidence
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import FixedClip, PoissonSampling, PrivacyPlan, Unit
from tests.support.planted import QuietChance

SIGMA_OF_ONE = 3.730632
"""Of one Gaussian release with epsilon = 1 at delta = 1e-5 (Balle and Wang 2018); privacy.md has it among the reference values."""
ONE_RELEASE = PrivacyPlan(Unit.RECORD, PoissonSampling(1.0), FixedClip(1.0), SIGMA_OF_ONE, 1e-5, 100, rounds=1)


def exact_tail(count: int, at_least: int, right: float) -> float:
    """P[Binomial(count, right) >= at_least], term by term."""
    return math.fsum(math.comb(count, k) * right**k * (1 - right) ** (count - k) for k in range(at_least, count + 1))


def theorem(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 as it stands in the paper, every i tried."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail = exact_tail(guesses, correct, right)
    worst = max((exact_tail(guesses, max(correct - i, 0), right) - tail) / i for i in range(1, canaries + 1))
    return min(1.0, tail + 2 * canaries * delta * worst)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize(("guesses", "correct"), [(1, 1), (30, 0), (30, 15), (30, 29), (120, 97), (120, 120)])
def test_without_delta_it_is_a_binomial_tail(guesses, correct, epsilon):
    expected = exact_tail(guesses, correct, 1 / (1 + math.exp(-epsilon)))
    assert p_value(120, guesses, correct, epsilon, 0.0) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_theorem_by_another_way(data):
    canaries = data.draw(st.integers(1, 60))
    guesses = data.draw(st.integers(1, canaries))
    correct = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(st.floats(0, 6)), data.draw(st.floats(0, 0.01))
    assert p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(
        theorem(canaries, guesses, correct, epsilon, delta), rel=1e-8, abs=1e-14
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 80), st.floats(0, 5), st.floats(0, 0.2), st.data())
def test_no_mechanism_that_has_the_property_does_better(canaries, epsilon, delta, data):
    # With probability delta a coin is told, else its randomised answer: (epsilon, delta)-DP, and the guess is as good as it can be.
    correct = data.draw(st.integers(0, canaries))
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    assert exact_tail(canaries, correct, right) <= p_value(canaries, canaries, correct, epsilon, delta) + 1e-12


def test_the_bound_is_above_the_truth_as_rarely_as_it_says_and_not_much_more_rarely():
    # Randomised response with epsilon = 1: the theorem is tight there. Exact, over all numbers of right guesses.
    canaries, right = 400, 1 / (1 + math.exp(-1.0))
    wrong = math.fsum(
        math.comb(canaries, v) * right**v * (1 - right) ** (canaries - v)
        for v in range(canaries + 1)
        if epsilon_lower_bound(canaries, canaries, v, 0.0, 0.95) > 1.0
    )
    assert 0.03 < wrong <= 0.05


def test_all_right_gives_the_closed_form():
    right = 0.05 ** (1 / 1000)
    bound = epsilon_lower_bound(1000, 1000, 1000, 0.0, 0.95)
    assert bound == pytest.approx(math.log(right / (1 - right)), abs=2e-3)
    assert bound <= math.log(right / (1 - right))


@given(st.integers(10, 200), st.floats(0, 1e-3), st.data())
@settings(max_examples=40, deadline=None)
def test_more_right_guesses_prove_more_and_a_larger_delta_less(guesses, delta, data):
    correct = data.draw(st.integers(1, guesses))
    here = epsilon_lower_bound(guesses, guesses, correct, delta, 0.95)
    assert epsilon_lower_bound(guesses, guesses, correct - 1, delta, 0.95) <= here <= LARGEST_BOUND
    assert epsilon_lower_bound(guesses, guesses, correct, 2 * delta, 0.95) <= here
    assert epsilon_lower_bound(guesses, guesses, correct, delta, 0.99) <= here


@pytest.mark.parametrize(
    ("guesses", "correct", "epsilon", "delta"), [(11, 0, 1, 0), (5, 6, 1, 0), (5, 5, -1, 0), (5, 5, 1, 2)]
)
def test_numbers_that_cannot_be_are_refused(guesses, correct, epsilon, delta):
    with pytest.raises(ValueError, match="audit"):
        p_value(10, guesses, correct, epsilon, delta)


def test_half_of_the_guesses_are_in_and_half_are_out():
    scores, inside = np.array([5.0, 1, 4, 0, 3, 2]), np.array([1, 0, 0, 1, 1, 0], dtype=bool)
    assert count_correct(scores, inside, 2) == 1  # 5 is in; 0 is in too
    assert count_correct(scores, inside, 4) == 2
    assert count_correct(scores, inside, 6) == 4
    assert guess_counts(1000) == (100, 200, 400, 900)
    assert guess_counts(10) == (2, 4, 8)


def test_scores_that_are_no_numbers_and_too_few_canaries_are_refused():
    inside = np.arange(20) % 2 == 0
    with pytest.raises(StudyError, match="finite"):
        judge(np.where(inside, np.nan, 0.0), inside, 1.0, 1e-5)
    with pytest.raises(StudyError, match="9 canaries"):
        judge(np.zeros(9), inside[:9], 1.0, 1e-5)


def test_a_claim_of_infinity_is_never_refuted():
    inside = np.arange(1000) % 2 == 0
    found = judge(inside.astype(float), inside, math.inf, 1e-5)
    assert not found.refuted
    assert found.epsilon_lower > 5


# The Gaussian mechanism itself: one release, white box, 1,000 canaries, a claim of epsilon <= 1, 95 % confidence.


def finding(seed: int, factor: float = 1.0, claim: float = 1.0):
    """What an audit says of one release by the steps that every site runs."""
    evidence = Evidence(Canaries(1000, {"weight": 1000}, seed), ONE_RELEASE)
    steps = CanarySteps(5, ONE_RELEASE, QuietChance(seed, factor), evidence)
    steps.draw()
    steps.release([np.zeros(1000, dtype=np.float32)], unclipped=0, not_finite=0)
    return judge(evidence.scores, evidence.canaries.inside, claim, 1e-5), evidence


def test_an_honest_build_is_refuted_no_more_often_than_stated():
    # Five hundred audits: one in twenty may be wrong. They are far fewer, since the theorem is not tight for the Gaussian mechanism.
    found = [finding(seed) for seed in range(500)]
    assert sum(one.refuted for one, _ in found) <= 0.05 * len(found)
    assert sum(one.epsilon_lower > 1.0 for one, _ in found) <= 0.05 * len(found)
    assert np.median([one.epsilon_lower for one, _ in found]) > 0.05  # it does look
    assert not any(noise.too_little for _, evidence in found for noise in evidence.noise())


@pytest.mark.parametrize(("factor", "at_least"), [(0.0, 5.0), (0.1, 3.0)])
def test_missing_noise_and_a_tenth_of_it_are_caught_every_time(factor, at_least):
    for seed in range(20):
        one, evidence = finding(seed, factor)
        assert one.refuted
        assert one.epsilon_lower > at_least
        assert all(noise.too_little for noise in evidence.noise() if noise.name == "weight")
        assert evidence.noise_factor() == pytest.approx(factor, abs=0.01)


def test_a_claim_far_below_the_truth_is_refuted_for_an_honest_build_of_another_plan():
    # Noise for epsilon = 12 sold as epsilon = 1.
    found = [finding(seed, 0.5 / SIGMA_OF_ONE)[0] for seed in range(10)]
    assert all(one.refuted for one in found)


# What an audit could see.


def test_imagined_scores_are_those_of_the_real_steps():
    plan = replace(ONE_RELEASE, sampling=PoissonSampling(0.3), rounds=5, steps=4)
    evidence = Evidence(Canaries(4000, {"weight": 4000}, 1), plan)
    steps = CanarySteps(5, plan, seeded_chance(1, "steps"), evidence)
    for _ in range(plan.releases):
        steps.draw()
        steps.release([np.zeros(4000, dtype=np.float32)], unclipped=0, not_finite=0)
    inside = evidence.canaries.inside
    imagined = imagined_scores(plan, 1.0, inside, np.random.default_rng(2))
    for which in (inside, ~inside):
        real, other = evidence.scores[which], imagined[which]
        assert real.mean() == pytest.approx(other.mean(), abs=4 * 17 / math.sqrt(len(real)))
        assert real.std() == pytest.approx(other.std(), rel=0.08)


def test_power_tells_what_would_be_caught():
    found = {one.noise_factor: one for one in power(ONE_RELEASE, 1.0, 1000, repetitions=5)}
    assert found[1.0].refuted == 0.0
    assert found[0.1].refuted == found[0.0].refuted == 1.0
    assert found[1.0].epsilon_lower < found[0.5].epsilon_lower < found[0.1].epsilon_lower < found[0.0].epsilon_lower
    few = {one.noise_factor: one for one in power(ONE_RELEASE, 1.0, 20, repetitions=5)}
    assert few[0.1].refuted < 1.0
