"""Canaries among a site's records: they go through the real draw, sum and noise, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedlearn.models.tabular import TabularNet
from fedlearn.privacy.canaries import WIDENED, Canaries, CanarySitePlan, CanarySteps, Evidence
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import AdaptiveClip, FixedClip, FixedCohort, PoissonSampling, PrivacyPlan, Unit
from tests.support.planted import QuietChance

PLAN = PrivacyPlan(Unit.RECORD, PoissonSampling(0.25), FixedClip(0.5), 1.2, 1e-4, units=40, rounds=3, steps=10)


@given(st.integers(10, 60), st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_each_canary_has_a_number_of_its_own(count, sizes, seed):
    canaries = Canaries(count, {f"a{i}": size for i, size in enumerate(sizes)}, seed)
    arrays = [np.zeros(size) for size in canaries.sizes.values()]
    values = np.arange(1.0, count + 1)
    canaries.add(arrays, values)
    np.testing.assert_array_equal(canaries.read(arrays), values)
    assert sum(np.count_nonzero(array) for array in arrays) == count
    assert canaries.widened == max(1, count - sum(sizes))


def test_canaries_are_spread_over_the_whole_model_and_follow_from_the_seed():
    one, again, other = (Canaries(1000, {"a": 2000, "b": 8000}, seed) for seed in (1, 1, 2))
    arrays = [np.zeros(2000), np.zeros(8000), np.zeros(one.widened)]
    one.add(arrays, np.ones(1000))
    assert 150 < np.count_nonzero(arrays[0]) < 250
    assert 420 < int(one.inside.sum()) < 580
    np.testing.assert_array_equal(one.inside, again.inside)
    assert (one.inside != other.inside).any()


def run(plan=PLAN, *, factor=1.0, count=200, sizes=(6, 300), seed=1, **kwargs):
    evidence = Evidence(Canaries(count, {f"a{i}": n for i, n in enumerate(sizes)}, seed), plan)
    steps = CanarySteps(40, plan, QuietChance(seed, factor), evidence, **kwargs)
    generator = np.random.default_rng(seed)
    batches = []
    for _ in range(plan.releases):
        batches.append(steps.draw())
        real = [generator.normal(size=n).astype(np.float32) * 10 for n in sizes]
        steps.release(real, unclipped=0, not_finite=0)
    return evidence, steps, batches


def test_real_rows_are_drawn_as_ever_and_canaries_with_them():
    evidence, steps, batches = run(replace(PLAN, rounds=40))
    rows = np.concatenate(batches)
    assert rows.max() < 40
    assert len(rows) / (40 * 400) == pytest.approx(0.25, abs=0.02)
    inside = int(evidence.canaries.inside.sum())
    assert steps.tally.examples / ((40 + inside) * 400) == pytest.approx(0.25, abs=0.01)


def test_without_noise_a_score_is_how_often_its_canary_was_drawn():
    evidence, _, _ = run(factor=0.0)
    inside = evidence.canaries.inside
    np.testing.assert_allclose(evidence.scores[~inside], 0, atol=1e-3)
    drawn = evidence.scores[inside]
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-3)
    assert drawn.mean() == pytest.approx(0.25 * 30, abs=0.8)
    assert evidence.releases == 30


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.1])
def test_the_noise_is_measured_array_by_array(factor):
    evidence, _, _ = run(factor=factor)
    found = {one.name: one for one in evidence.noise()}
    assert set(found) == {"a0", "a1", WIDENED}
    for one in found.values():
        assert one.factor == pytest.approx(factor, abs=4 * one.chance)
        assert one.chance == pytest.approx((2 * 30 * evidence.canaries.sizes[one.name]) ** -0.5)
    assert found["a1"].too_little == (factor < 1)
    assert evidence.noise_factor() == pytest.approx(factor, rel=0.05)


def test_an_array_without_noise_is_found(monkeypatch):
    honest = CanarySteps._add_noise
    monkeypatch.setattr(CanarySteps, "_add_noise", lambda self, sums, std: honest(self, sums[1:], std))
    evidence, _, _ = run()
    assert {one.name: one.too_little for one in evidence.noise()} == {"a0": True, "a1": False, WIDENED: False}


def test_nothing_is_measured_before_the_first_release():
    evidence = Evidence(Canaries(20, {"a": 30}, 1), PLAN)
    assert evidence.noise() == ()
    assert np.isnan(evidence.noise_factor())


def test_a_canary_is_a_group_by_itself():
    plan = replace(PLAN, unit=Unit.GROUP, units=4, delta=1e-3, sampling=PoissonSampling(0.5))
    groups = np.array([f"patient {i // 10}" for i in range(40)])
    evidence, _, batches = run(plan, factor=0.0, groups=groups)
    assert all(len({groups[row] for row in batch}) == len(batch) for batch in batches)
    drawn = evidence.scores[evidence.canaries.inside]
    assert drawn.mean() == pytest.approx(0.5 * 30, abs=1.2)


def test_an_adaptive_clip_stays_where_the_canaries_say_that_it_is_right():
    plan = replace(PLAN, clipping=AdaptiveClip(0.5, 0.7, count_share=0.5), sampling=PoissonSampling(1.0), rounds=20)
    evidence, steps, _ = run(plan)
    assert evidence.canaries.within_clip(plan).mean() == pytest.approx(0.7)
    assert 0.05 < steps.clip_l2 < 50
    inside = evidence.canaries.inside
    assert evidence.scores[inside].mean() - evidence.scores[~inside].mean() == pytest.approx(200, abs=8)


def test_replaced_canaries_give_the_opposite():
    clients = PrivacyPlan(Unit.CLIENT, FixedCohort(5, 40), FixedClip(0.5), 1.0, 1e-4, units=40, rounds=1)
    canaries = Canaries(50, {"a": 100}, 3)
    assert set(canaries.signs(clients).tolist()) == {1.0, -1.0}
    assert set(canaries.signs(PLAN).tolist()) == {1.0, 0.0}


def test_training_follows_gradients_in_the_models_own_shapes():
    torch.manual_seed(3)
    model, x, y = TabularNet(5, 3), torch.randn(40, 5), torch.randint(3, (40,))

    def losses(rows):
        return nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")

    sizes = {name: p.numel() for name, p in model.named_parameters()}
    evidence = Evidence(Canaries(500, sizes, 1), PLAN)
    plan = CanarySitePlan(PLAN, seeded_chance(1, "dp"), evidence=evidence)
    gradients = plan.gradients(model, losses, 40)
    for _ in range(3):
        found = gradients.gradient()
        assert {n: g.shape for n, g in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert evidence.releases == gradients.tally.steps == 3
    assert evidence.noise_factor() == pytest.approx(1.0, abs=0.1)
