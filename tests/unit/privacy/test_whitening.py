"""Correlated noise made independent again."""

from __future__ import annotations

import numpy as np
import pytest

from fedlearn.privacy.audit import imagined_scores
from fedlearn.privacy.canaries import Canaries, Evidence
from fedlearn.privacy.ftrl import Banded, BufferedToeplitz, CorrelatedNoise
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import FixedClip, PrivacyPlan, Spaced, Unit
from fedlearn.privacy.whitening import Whitening

MATRICES = {"banded": Banded(3), "blt": BufferedToeplitz((0.3, 0.1), (0.9, 0.5))}


def plan_with(matrix, rounds=9) -> PrivacyPlan:
    return PrivacyPlan(Unit.CLIENT, Spaced(50, 3), FixedClip(0.5), 1.5, 1e-5, units=200, rounds=rounds, matrix=matrix)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_it_gives_back_what_the_noise_was_made_of(matrix):
    plan = plan_with(matrix)
    noise = CorrelatedNoise(plan.ftrl, 40, lambda number: seeded_chance(1, number))
    undo = Whitening(matrix.coefficients(plan.rounds))
    for number in range(1, plan.rounds + 1):
        made_of = seeded_chance(1, number).normal(40, plan.ftrl.noise_std)
        np.testing.assert_allclose(undo.next(noise.next()), made_of, atol=1e-12)


def test_independent_noise_stays_as_it_is():
    undo = Whitening(np.array([1.0, 0.0, 0.0]))
    for value in (np.arange(3.0), np.ones(3)):
        np.testing.assert_array_equal(undo.next(value), value)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_imagined_scores_are_those_of_real_releases(matrix):
    plan = plan_with(matrix)
    evidence = Evidence(Canaries(3000, {"a": 3000}, 1), plan)
    canaries, clip = evidence.canaries, 0.5
    noise = CorrelatedNoise(plan.ftrl, sum(canaries.sizes.values()), lambda number: seeded_chance(2, number))
    for number in range(plan.rounds):
        asked = np.arange(3000) % 3 == number % 3  # each every third round
        exact = [np.zeros(size) for size in canaries.sizes.values()]
        canaries.add(exact, clip * (canaries.inside & asked))
        flat = noise.next()
        parts = np.split(flat, np.cumsum([len(e) for e in exact])[:-1])
        evidence.hear([(e + n) / 50 for e, n in zip(exact, parts, strict=True)], exact, np.zeros(3000), clip, asked)
    assert evidence.noise_factor() == pytest.approx(1.0, abs=0.02)
    imagined = imagined_scores(plan, 1.0, canaries.inside, np.random.default_rng(3))
    for which in (canaries.inside, ~canaries.inside):
        real, other = evidence.scores[which], imagined[which]
        error = 4 * other.std() / len(other) ** 0.5
        assert real.mean() == pytest.approx(other.mean(), abs=1.5 * error)
        assert real.std() == pytest.approx(other.std(), rel=0.08)
