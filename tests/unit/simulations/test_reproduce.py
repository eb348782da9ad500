"""The published comparisons: every arm is a study that can be run, and what is made of the runs."""

from __future__ import annotations

import json

import pytest

import fedlearn
from fedlearn.app import load_app
from fedlearn.learning.combine import check_combination
from simulations.reproduce.__main__ import COMPARISONS
from simulations.reproduce.runs import Comparison, figure, rounds_to, run, score, table

ARMS = [(name, arm) for name, comparison in COMPARISONS.items() for arm in comparison.arms]
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
