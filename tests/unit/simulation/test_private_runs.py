"""Simulations of private studies: which backend does them, what is told, what is refused, and that they go on where they were stopped."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest

from fedlearn import events
from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.errors import AccountingError
from fedlearn.privacy import prv
from fedlearn.privacy.statement import whole_account
from fedlearn.privacy.study import CLIP
from fedlearn.simulation.backends import chosen
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.run import simulate
from fedlearn.simulation.sequential import SequentialBackend
from strategies.fedavg import FedAvg
from tests.support.private_plans import ADAPTIVE, CLIENT, PLANS, RECORD
from tests.support.ragged_task import outcome_of, population_of, ragged_study, strategy_of
from tests.support.tiny_task import tiny_study
from tests.unit.simulation.test_batched import Spoilt, huge, nan, strange


@pytest.mark.parametrize(
    ("overrides", "population", "backend"),
    [
        ((), 9, "batched"),
        (RECORD, 8, "sequential"),
        (RECORD, 9, "batched"),
        ((*RECORD, "cohort.size=8"), 1000, "sequential"),
        (CLIENT, 9, "batched"),
        ((*CLIENT, "cohort.rate=0.008"), 1000, "sequential"),
        ((*CLIENT, "cohort.rate=0.0081"), 1000, "batched"),
    ],
)
def test_auto_chooses_by_the_cohort_that_is_expected(overrides, population, backend):
    assert chosen(ragged_study(*overrides), population) == backend


def crowd(kind, *more):
    return tiny_study("data.partition=iid", "data.clients=12", "task.options.hidden=3", "rounds=4", *PLANS[kind], *more)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        *((kind, "scaffold") for kind in sorted(PLANS) if not kind.startswith("group")),  # the task names nobody
        ("record", "ditto"),
        ("client adaptive", "fedavg"),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, kind, strategy):
    study = crowd(kind, f"strategy.name={strategy}", "evaluate.every=2")
    whole = simulate(study, backend="auto")
    finished: list[int] = []

    def take(event):
        if isinstance(event, events.RoundFinished):
            finished.append(event.round)

    stopped = simulate(study, out=tmp_path, emit=take, should_stop=lambda: len(finished) == 2)
    assert stopped.stopped
    resumed = simulate(resume=tmp_path, workers=1)
    for part in ("model", "shared", "memory"):
        assert digest(getattr(resumed.outcome.state, part)) == digest(getattr(whole.outcome.state, part))
    rows = [[{**row, "seconds": 0} for row in outcome.outcome.history] for outcome in (resumed, whole)]
    np.testing.assert_equal(*rows)


@pytest.mark.parametrize(
    ("change", "table", "refused"),
    [
        (nan, CLIENT, True),
        (nan, (*CLIENT, *ADAPTIVE), True),
        (nan, RECORD, False),
        (huge, CLIENT, False),
        (strange, CLIENT, True),
        (strange, RECORD, False),
    ],
)
def test_one_bad_client_costs_nobody_else(change, table, refused):
    """What is not finite is refused by name at client level; at record level such rows, and those that raise, contribute zero. What is long is clipped."""
    study = ragged_study("rounds=2", *table)
    population = population_of(study)
    rows = population.rows["c004"]
    x, y = population.examples.x, population.examples.y
    x[rows], y[rows] = change(x[rows], y[rows])
    population = replace(population, task=Spoilt())
    outcomes, out = [], []
    for kind in (SequentialBackend, BatchedBackend):
        seen = []
        outcomes.append(outcome_of(study, kind(study, population, strategy_of(study)), seen.append))
        out.append({(e.round, e.client) for e in seen if isinstance(e, events.ClientDropped)})
    assert out[0] == out[1] == ({(1, "c004"), (2, "c004")} if refused else set())
    for name, array in outcomes[0].state.model.items():
        np.testing.assert_allclose(outcomes[1].state.model[name], array, rtol=1e-4, atol=1e-6)


class Curious(FedAvg):
    """Looks at what the server sent."""

    def client_passes(self, start):
        assert CLIP not in start.shared, "the plan's own is not the strategy's business"
        return super().client_passes(start)


@pytest.mark.parametrize("backend", [SequentialBackend, BatchedBackend])
def test_the_clip_is_not_the_client_rules_business(backend):
    study = ragged_study("rounds=2", *CLIENT, *ADAPTIVE)
    outcome = outcome_of(study, backend(study, population_of(study), Curious()))
    assert [row["clients"] for row in outcome.history] == [10, 10]


@pytest.mark.parametrize(
    ("model", "table", "said"),
    [
        ("cnn", RECORD, ["DP-SGD is written out for linear layers"]),
        ("dropout", RECORD, ["draws random numbers"]),
        ("tabular", RECORD, []),
        ("cnn", CLIENT, []),
    ],
)
def test_what_trains_one_by_one_is_said_once(caplog, model, table, said):
    study = ragged_study("rounds=2", f"task.options.model_name={model}", *table)
    with caplog.at_level(logging.WARNING, "fedlearn.simulation"):
        outcome_of(study, BatchedBackend(study, population_of(study), strategy_of(study), workers=2))
    assert len(caplog.messages) == len(said)
    assert all(reason in message for reason, message in zip(said, caplog.messages, strict=True))


def test_a_cohort_that_nobody_is_in_asks_nobody():
    study = ragged_study(*PLANS["client nobody"], "rounds=3")
    asked = []

    class Asked(BatchedBackend):
        def fit(self, work):
            asked.append(work.cohort)
            yield from super().fit(work)

    outcome = outcome_of(study, Asked(study, population_of(study), load_app().strategy("fedavg", {})))
    assert not asked
    assert [row["clients"] for row in outcome.history] == [0, 0, 0]
    assert float(outcome.state.shared[CLIP]) != study.privacy.clip_l2, "the clip follows the noisy count all the same"


@pytest.mark.parametrize("off", [-1.0, 1.0])
def test_accountants_that_contradict_each_other_stop_a_run_before_its_first_round(monkeypatch, off):
    whole_account.cache_clear()
    right = prv.interval
    monkeypatch.setattr(prv, "interval", lambda counts, delta: tuple(x + off for x in right(counts, delta)))
    seen: list[events.Event] = []
    with pytest.raises(AccountingError, match=r"dp-accounting PLD .* Opacus PRV"):
        simulate(crowd("record"), emit=seen.append)
    assert not any(isinstance(event, events.RoundStarted | events.PrivacyStated) for event in seen)


def test_a_run_states_every_accountants_number():
    stated: list[events.PrivacyStated] = []
    simulate(crowd("record"), emit=lambda e: stated.append(e) if isinstance(e, events.PrivacyStated) else None)
    assert len(stated) == 2, "before and after"
    for event in stated:
        names = [" ".join(other["accountant"].split()[:2]) for other in event.statement["other_accountants"]]
        assert names == ["fedlearn RDP", "Opacus PRV"]
