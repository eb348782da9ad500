"""Blocks in which something is wrong with one client: it is named, and the others are trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.errors import RunFailedError
from fedlearn.simulation import plan
from fedlearn.simulation.batched import BatchedBackend, default_workers
from fedlearn.simulation.sequential import SequentialBackend
from tests.support.ragged_task import RaggedTask, outcome_of, population_of, ragged_study, strategy_of


class Spoilt(RaggedTask):
    """What is wrong with a client is in its first feature."""

    def loss(self, outputs, y):
        if torch.any(y == 9):
            raise ValueError("a label that nobody knows")
        return super().loss(outputs, y)


def outcomes(change, *overrides: str):
    """The run on both backends with one client's rows changed, and who dropped out."""
    study = ragged_study("rounds=2", *overrides)
    population = population_of(study)
    rows = population.rows["c004"]
    x, y = population.examples.x, population.examples.y
    x[rows], y[rows] = change(x[rows], y[rows])
    population = replace(population, task=Spoilt(study.task.options.get("model_name", "tabular")))
    found = []
    for kind in (SequentialBackend, BatchedBackend):
        dropped = []
        outcome = outcome_of(study, kind(study, population, strategy_of(study)), dropped.append)
        dropped = [event for event in dropped if isinstance(event, events.ClientDropped)]
        found.append((outcome, dropped))
    return found


def nan(x, y):
    return np.full_like(x, np.nan), y


def huge(x, y):
    return np.full_like(x, 1e12), y


def strange(x, y):
    return x, np.full_like(y, 9)


@pytest.mark.parametrize("change", [nan, strange])
@pytest.mark.parametrize(
    "overrides", [(), ("update.clip_l2=0.1",), ("strategy.name=scaffold",), ("strategy.name=median",)]
)
def test_one_bad_client_costs_nobody_else(change, overrides):
    (expected, out), (got, dropped) = outcomes(change, *overrides)
    assert {(e.round, e.client) for e in dropped} == {(e.round, e.client) for e in out} == {(1, "c004"), (2, "c004")}
    for name, array in expected.state.model.items():
        np.testing.assert_allclose(got.state.model[name], array, rtol=1e-4, atol=1e-6)


def test_sums_that_cannot_be_held_are_taken_apart():
    """All clients but one have sane updates: the sum of the block is refused, and then the one, by name."""
    for _, dropped in outcomes(huge, "task.options.model_name=linear"):
        assert {(event.round, event.client) for event in dropped} == {(1, "c004"), (2, "c004")}
        assert all("headroom" in event.reason for event in dropped)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "multi_krum"])
def test_threads_change_no_bit(monkeypatch, strategy):
    monkeypatch.setattr(plan, "MOST_CLIENTS", dict.fromkeys(plan.MOST_CLIENTS, 3))
    study = ragged_study(f"strategy.name={strategy}")
    models = set()
    for workers in (1, 2, 5):
        backend = BatchedBackend(study, population_of(study), strategy_of(study), workers=workers)
        models.add(digest(outcome_of(study, backend).state.model))
    assert len(models) == 1


def test_evaluation_is_the_oracles():
    study = ragged_study(
        "rounds=1",
        "data.folds=3",
        "evaluate.every=1",
        "evaluate.batch_size=4",
        "task.options.sizes=[1,4,9,2,12,6,3,5,7]",
    )
    rows = []
    for kind in (SequentialBackend, BatchedBackend):
        outcome = outcome_of(study, kind(study, population_of(study), strategy_of(study)))
        rows.append(outcome.history[0]["clients_metrics"])
    for client, scores in rows[0].items():
        assert rows[1][client] == pytest.approx(scores, rel=1e-5)
    assert rows[0].keys() == rows[1].keys()


def test_nobody_with_rows_is_an_error_that_says_so():
    study = ragged_study("task.options.sizes=[1,1,1,1,1,1,1,1,1]", "data.folds=2")
    with pytest.raises(RunFailedError, match="0 of 9 clients"):
        outcome_of(study, BatchedBackend(study, population_of(study), strategy_of(study)))


def test_another_device_runs_one_block_at_a_time():
    assert default_workers(torch.device("cpu")) >= 1
    assert default_workers(torch.device("meta")) == 1
