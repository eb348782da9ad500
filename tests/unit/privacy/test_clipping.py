"""Client-level releases: the sum that leaves has the plan's sensitivity and the plan's noise, whoever came."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlearn.errors import UpdateError
from fedlearn.learning.postprocess import joint_l2_norm
from fedlearn.learning.update import Update
from fedlearn.privacy.clipping import central_release, contribute, denominator
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import AdaptiveClip, Everyone, FixedClip, FixedCohort, PoissonSampling, PrivacyPlan, Unit

PLAN = PrivacyPlan(Unit.CLIENT, PoissonSampling(0.1), FixedClip(2.0), 1.5, 1e-5, units=1_000, rounds=10)


def update(*values: float, dtype=np.float32) -> Update:
    return Update({"delta": {"w": np.array(values, dtype=dtype)}}, examples=37, facts={"loss": 0.3})


@pytest.mark.parametrize(
    ("values", "unclipped", "norm"), [((0.0, 0.0), True, 0.0), ((3.0, 4.0), True, 5.0), ((30.0, 40.0), False, 5.0)]
)
def test_a_contribution_is_clipped_and_says_nothing_else(values, unclipped, norm):
    found = contribute(update(*values), 5.0)
    assert found.unclipped is unclipped
    assert joint_l2_norm(found.update) == pytest.approx(norm)
    assert joint_l2_norm(found.update) <= 5.0
    assert (found.update.examples, found.update.facts) == (1, {})


@pytest.mark.parametrize("values", [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 0.0)])
def test_what_is_not_finite_contributes_nothing(values):
    with pytest.raises(UpdateError):
        contribute(update(*values), 5.0)


def test_integers_are_refused():
    with pytest.raises(UpdateError, match="floating point"):
        contribute(update(1, 2, dtype=np.int64), 5.0)


def test_everything_that_is_released_is_clipped_jointly():
    both = Update({"delta": {"w": np.array([3.0])}, "control": {"w": np.array([4.0])}}, examples=1)
    found = contribute(both, 1.0).update.private
    assert found["delta"]["w"][0] ** 2 + found["control"]["w"][0] ** 2 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("sampling", "expected"), [(PoissonSampling(0.1), 100.0), (FixedCohort(50, 1_000), 50.0), (Everyone(), 1_000.0)]
)
def test_the_denominator_is_the_plans(sampling, expected):
    assert denominator(replace(PLAN, sampling=sampling)) == expected


@pytest.mark.parametrize("came", [100, 37, 0])
def test_noise_is_the_plans_whoever_came(came):
    sums = {"delta": {"w": np.full(50_000, came * 0.01)}}
    release = central_release(PLAN, 2.0, sums, came, came, seeded_chance(4, "noise"))
    found = release.means["delta"]["w"]
    assert release.noise_std == pytest.approx(1.5 * 2.0 / 100)
    assert found.std() == pytest.approx(release.noise_std, rel=0.02)
    assert found.mean() == pytest.approx(came * 0.01 / 100, abs=5 * release.noise_std / np.sqrt(50_000))
    assert release.clip_l2 == 2.0
    assert sums["delta"]["w"][0] == came * 0.01  # the exact sum is left as it was


def follow(norms: np.ndarray, start: float, quantile: float, rounds: int, sampling) -> float:
    plan = replace(
        PLAN,
        sampling=sampling,
        clipping=AdaptiveClip(start, quantile, count_share=0.05),
        units=len(norms),
        noise_multiplier=1.0,
        delta=1e-6,
    )
    chance, clip = seeded_chance(5, "clip"), start
    for _ in range(rounds):
        drawn = norms[chance.coins(len(norms), sampling.rate)] if isinstance(sampling, PoissonSampling) else norms
        unclipped = int((drawn <= clip).sum())
        clip = central_release(plan, clip, {}, unclipped, len(drawn), chance).clip_l2
    return clip


@pytest.mark.parametrize("start", [1e-3, 0.1, 3.0, 1e3])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_converges_to_the_norms_quantile(start, quantile):
    norms = np.random.default_rng(0).lognormal(1.0, 0.7, 5_000)
    for sampling in (Everyone(), PoissonSampling(0.2)):
        found = follow(norms, start, quantile, 400, sampling)
        assert (norms <= found).mean() == pytest.approx(quantile, abs=0.06)
