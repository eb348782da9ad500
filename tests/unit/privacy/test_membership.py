"""The membership test: it finds what is there, nothing where nothing is, and says how little it can see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import StudyError
from fedlearn.privacy.membership import (
    auc_of,
    confidence_scores,
    likelihood_ratios,
    membership,
    noticed_auc,
    true_positive_share,
)


def models(added: float, runs: int = 8, units: int = 600, seed: int = 1):
    """Scores as in the additive model: difficulty of each unit, level of each run, what membership adds, and chance."""
    generator = np.random.default_rng(seed)
    inside = generator.random((runs, units)) < 0.5
    scores = 3 * generator.standard_normal(units) + generator.standard_normal((runs, 1))
    return scores + added * inside + 0.5 * generator.standard_normal((runs, units)), inside


def test_members_are_found_and_difficulty_does_not_hide_them():
    scores, inside = models(1.0)
    found = membership(scores, inside, 1.0, 1e-5, 0.95)
    assert found.noticed
    assert found.auc > 0.85  # two standard deviations apart, less what difficulty is not known by
    assert auc_of(scores[0], inside[0]) < 0.65  # without calibration
    assert found.finding.refuted
    assert found.true_positives[0] > 0.1
    assert found.true_positives[1] > 0.3


def test_where_membership_adds_nothing_nothing_is_found():
    aucs, refuted = [], 0
    for seed in range(40):
        found = membership(*models(0.0, seed=seed), 0.1, 1e-5, 0.95)
        aucs.append(found.auc)
        refuted += found.finding.refuted
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.01)
    assert refuted <= 2


def test_the_attacked_runs_coins_are_not_looked_at():
    scores, inside = models(0.5)
    other = inside.copy()
    other[3] = ~other[3]
    np.testing.assert_array_equal(likelihood_ratios(scores, inside, 3), likelihood_ratios(scores, other, 3))
    assert (likelihood_ratios(scores, inside, 2) != likelihood_ratios(scores, other, 2)).any()


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_auc_counts_pairs(pairs):
    scores = np.array([float(score) for score, _ in pairs])
    inside = np.array([member for _, member in pairs])
    members, others = scores[inside], scores[~inside]
    if not len(members) or not len(others):
        assert np.isnan(auc_of(scores, inside))
        return
    counted = np.mean([(m > o) + 0.5 * (m == o) for m in members for o in others])
    assert auc_of(scores, inside) == pytest.approx(counted)


def test_what_is_noticed_is_what_chance_exceeds_once_in_twenty():
    generator, limit = np.random.default_rng(5), noticed_auc(60, 80)
    inside = np.arange(140) < 60
    share = np.mean([auc_of(generator.standard_normal(140), inside) > limit for _ in range(4000)])
    assert share == pytest.approx(0.05, abs=0.012)


def test_true_positives_at_false_alarms():
    scores, inside = np.arange(200.0), np.arange(200) >= 100
    assert true_positive_share(scores, inside, 0.01) == 1.0
    assert true_positive_share(scores[::-1], inside, 0.05) == 0.0


def test_losses_become_logits_of_the_right_answers_probability():
    p = np.array([0.999, 0.5, 0.01])
    np.testing.assert_allclose(confidence_scores(-np.log(p)), np.log(p / (1 - p)))
    found = confidence_scores(np.array([0.0, 1e-30, 100.0]))
    assert np.isfinite(found).all()
    assert found[0] == found[1] > found[2]


@pytest.mark.parametrize(("runs", "units", "says"), [(2, 100, "2 models"), (8, 19, "19 units")])
def test_too_little_to_tell_anything_is_refused(runs, units, says):
    with pytest.raises(StudyError, match=says):
        membership(*models(1.0, runs, units), 1.0, 1e-5, 0.95)
