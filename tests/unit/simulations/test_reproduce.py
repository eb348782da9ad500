"""The published comparisons: every arm is a study that can be run, and what is made of the runs."""

from __future__ import annotations

import json

import pytest

import fedlearn
from fedlearn.app import load_app
from fedlearn.learning.combine import check_combination
from simulations.reproduce.__main__ import COMPARISONS
from simulations.reproduce.runs import Comparison, figure, rounds_to, run, score, table

ALIKE = {"epsilon 1", "epsilon 8"}
"""Differ from epsilon 3 in that number; finding the noise of each takes a second."""
ARMS = [(name, arm) for name, comparison in COMPARISONS.items() for arm in comparison.arms if arm not in ALIKE]
CURVE = [(1, 0.1), (2, 0.5), (3, 0.4), (4, 0.6), (5, 0.7), (6, 0.8)]


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_is_a_study_of_its_own(name, arm):
    study = COMPARISONS[name].study_of(arm, 3)
    assert study.seed == 3
    check_combination(study, load_app().strategy(study.strategy.name, study.strategy.options))
    others = [other for other in COMPARISONS[name].arms if other != arm]
    assert study.digest not in {COMPARISONS[name].study_of(other, 3).digest for other in others}


def test_the_metric_is_one_of_the_studys():
    study = COMPARISONS["heart"].study_of("FedAvg", 0)
    history = fedlearn.simulate(study, rounds=1).outcome.history
    assert COMPARISONS["heart"].metric in history[0]["metrics"]


def test_a_table_of_private_arms_says_what_its_epsilons_are_about(tmp_path):
    arms = {"epsilon 8": ("privacy.epsilon=8",), "none": ()}
    comparison = Comparison("../privacy/heart", "T", "auc", arms, apart={"none": "../heart"}, last=1)
    assert list(comparison.private_arms) == ["epsilon 8"]
    assert comparison.study_of("none", 1).name == "heart"
    found = {"epsilon 8": [CURVE, CURVE], "none": [CURVE, CURVE]}
    page = table("t", comparison, found)
    assert "delta 1e-05, unit record" in page
    assert "NOT PRIVATE" in page
    (private,) = (line for line in page.splitlines() if line.startswith("| epsilon 8"))
    assert float(private.split("|")[3]) == pytest.approx(
        comparison.private_arms["epsilon 8"].noise_multiplier, abs=1e-3
    )
    assert "| none | 0.800 ± 0.000 | none |" in page
    figure(comparison, found, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_scores_and_rounds():
    assert score(CURVE) == pytest.approx(0.6)
    assert rounds_to(CURVE, 0.5) == 2
    assert rounds_to(CURVE, 0.9) is None


def test_what_was_run_is_not_run_again_and_becomes_a_page(tmp_path):
    comparison = Comparison("heart", "Title", "accuracy", {"a": ("train.lr=0.1",), "b": ("train.lr=0.2",)}, reach=0.75)
    for arm in comparison.arms:
        for seed in range(2):
            rows = [(n, value - 0.1 * seed) for n, value in CURVE] if arm == "a" else [(n, 0.0) for n, _ in CURVE]
            path = tmp_path / f"{comparison.study_of(arm, seed).digest[:16]}.json"
            path.write_text(json.dumps(rows), encoding="utf-8")
    found = run(comparison, 2, 1, tmp_path)
    page = table("name", comparison, found)
    assert "| a | 0.550 ± 0.071 | 6 (1 of 2 never) |" in page
    assert "| b | 0.000 ± 0.000 | none |" in page
    figure(comparison, found, tmp_path / "name.png")
    assert (tmp_path / "name.png").stat().st_size > 1000
