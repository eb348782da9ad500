"""The studies that ship: each is read, its task and data exist, and a short run of the quick ones learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlearn.data.population import build_population
from fedlearn.privacy.accounting import account
from fedlearn.privacy.study import plan_of
from fedlearn.study import load_study
from fedlearn.tasks import load_task, task_of

FOLDER = Path(__file__).resolve().parents[3] / "simulations"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SHIPPED = {"heart", "heart_flamby", "blood_smear", "digits", "keyboard", "fraud", "devices"}


def test_the_studies_are_there():
    assert set(STUDIES) >= SHIPPED


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_read_described_and_finds_its_clients(name):
    study = load_study(FOLDER / f"{name}.toml")
    assert study.name == name
    assert study.description
    task = load_task(study.task.name, study.task.options)
    population = build_population(study, task)
    client = population.client(population.client_ids[0])
    assert len(client.train) > 0
    assert len(client.test) > 0


@pytest.mark.parametrize("name", ["heart", "digits", "fraud", "keyboard", "fashion"])
def test_a_private_study_is_read_and_its_plan_keeps_to_its_budget(name):
    study = load_study(FOLDER / "privacy" / f"{name}.toml")
    assert study.name == f"{name}-private"
    plan = plan_of(study)
    assert plan is not None
    assert study.privacy is not None
    assert study.privacy.epsilon is not None
    assert account(plan.whole_cost(), plan.delta).reported.epsilon <= study.privacy.epsilon
    task_of(study)  # refused where it cannot protect such units


@pytest.mark.parametrize(
    ("name", "overrides", "metric", "at_least"),
    [
        ("heart", (), "auc", 0.75),
        ("heart_flamby", (), "accuracy", 0.65),
        ("digits", (), "accuracy", 0.5),
        (
            "fraud",
            ("task.options.customers=200", "task.options.terminals=80", "train.max_steps=40"),
            "average_precision",
            0.05,
        ),
        ("blood_smear", ("task.options.images=60", "evaluate.every=1"), "accuracy", 0.3),
        ("devices", ("data.clients=200", "environment.deadline_s=20.0"), "accuracy", 0.2),
        ("keyboard", ("cohort.size=4", "evaluate.clients=4", "train.max_steps=4"), "top1", 0.1),
    ],
)
def test_a_few_rounds_learn(name, overrides, metric, at_least):
    import fedlearn

    result = fedlearn.simulate(FOLDER / f"{name}.toml", rounds=4, overrides=overrides)
    assert result.history.column(metric)[-1] >= at_least
    losses = result.history.column("train_loss")
    assert losses[-1] < losses[0]
