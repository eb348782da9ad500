"""A backend in a simulated world: nobody is trained in vain, and a run on a virtual clock survives crashes to the same bits."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlearn
from fedlearn import events
from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.data.population import build_population
from fedlearn.errors import RunFailedError
from fedlearn.learning.federation import Federation
from fedlearn.learning.local import Place, batch_rows, initial_weights
from fedlearn.release.journal import DictJournal
from fedlearn.report.history import History
from fedlearn.simulation.environment import VOID_S
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.simulation.virtual import EnvironmentBackend, examples_processed
from fedlearn.study import Study, TrainTable
from tests.support.tiny_task import TinyTask, tiny_study

CLIENTS = ("data.partition=iid", "data.clients=18", "cohort.size=6", "cohort.wait_for=1", "evaluate.clients=3")
HARD = (
    *CLIENTS,
    "environment.over_selection=1.5",
    "environment.dropout=0.3",
    "environment.jitter=0.5",
    "environment.deadline_s=30.0",
    "environment.server_s=1.5",
    "environment.availability={kind = 'diurnal', lowest = 0.1, highest = 0.9, time_zones = 3}",
    "environment.devices={slow = {examples_per_s = 0.5, compute_spread = 0.5}, fast = {share = 2.0, network_spread = 1.0}}",
)
COLUMNS = ("virtual_seconds", "bytes_down", "bytes_up", "unavailable", "dropouts", "stragglers")


class Crash(BaseException):
    """The process dies here."""


class CrashingJournal(DictJournal):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def write(self, changes):
        super().write(changes)
        self.left -= 1
        if self.left == 0:
            raise Crash


class Seen(SequentialBackend):
    """Remembers who was trained."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.trained = []

    def fit(self, work):
        self.trained.append((work.round, work.attempt, work.cohort))
        yield from super().fit(work)


def world(study: Study, journal=None, seen=None):
    """The federation of a study in its environment, and the backend that trains."""
    strategy = load_app().strategy(study.strategy.name, study.strategy.options)
    population = build_population(study, TinyTask())
    inner = Seen(study, population, strategy)
    backend = EnvironmentBackend(inner, study, study.environment, population, strategy)
    run = Federation(
        study,
        "run",
        strategy,
        initial_weights(TinyTask(), study),
        backend,
        DictJournal() if journal is None else journal,
        metric="accuracy",
        emit=(lambda _: None) if seen is None else seen.append,
        may_join=False,
        conditions=backend,
    )
    return run, inner


def comparable(outcome):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in outcome.history]
    return digest(outcome.state.model), rows


def test_a_kind_world_changes_nothing_but_the_clock():
    study = tiny_study(*CLIENTS, "environment={}", "rounds=4")
    with_it = world(study)[0].run()
    strategy = load_app().strategy("fedavg", {})
    plain = replace_environment(study)
    backend = SequentialBackend(plain, build_population(plain, TinyTask()), strategy)
    weights = initial_weights(TinyTask(), plain)
    without = Federation(
        plain, "run", strategy, weights, backend, DictJournal(), metric="accuracy", emit=lambda _: None, may_join=False
    ).run()
    assert digest(with_it.state.model) == digest(without.state.model)
    for row, other in zip(with_it.history, without.history, strict=True):
        assert {k: v for k, v in row.items() if k not in {*COLUMNS, "seconds"}} == {
            k: v for k, v in other.items() if k != "seconds"
        }
        assert (row["unavailable"], row["dropouts"], row["stragglers"]) == (0, 0, 0)
        assert row["virtual_seconds"] > 0
        assert row["bytes_down"] > row["bytes_up"] > 6 * 4 * 8


def replace_environment(study: Study) -> Study:
    return study.model_copy(update={"environment": None})


def test_nobody_is_trained_in_vain_and_everybody_is_accounted_for():
    study, seen = tiny_study(*HARD, "rounds=8"), []
    run, inner = world(study, seen=seen)
    outcome = run.run()
    trained = {(r, a): cohort for r, a, cohort in inner.trained}
    finished = [event for event in seen if isinstance(event, events.RoundFinished)]
    assert len(finished) == 8
    for event in finished:
        sizes = [one.cohort_size for one in seen if isinstance(one, events.RoundStarted) and one.round == event.round]
        arrived = [one.client for one in seen if isinstance(one, events.ClientFinished) and one.round == event.round]
        assert sorted(arrived) == sorted(trained[event.round, event.attempt])
        assert len(arrived) == event.clients <= 6
        facts = event.environment
        assert sizes[event.attempt - 1] == event.clients + facts["dropouts"] + facts["stragglers"]
        assert facts["virtual_seconds"] <= 30 + 1.5 + (event.attempt - 1) * 30 or facts["virtual_seconds"] > 900
    reasons = [event.reason for event in seen if isinstance(event, events.ClientDropped)]
    assert any(reason.startswith("vanished after") for reason in reasons)
    assert any(reason.startswith("too late: needs") for reason in reasons)
    history = History(outcome.history, "accuracy")
    assert set(COLUMNS) <= set(history.columns)
    assert sum(history.column("unavailable")) > 0
    assert all(value > 0 for name in COLUMNS[:3] for value in history.column(name))


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_crash_at_any_write_changes_nothing(strategy):
    study = tiny_study(*HARD, f"strategy.name={strategy}", "rounds=3")
    journal = CrashingJournal(10**9)
    expected = comparable(world(study, journal)[0].run())
    for at in range(1, 10**9 - journal.left + 1):
        journal = CrashingJournal(at)
        run, inner = world(study, journal)
        with pytest.raises(Crash):
            run.run()
        again, later = world(study, journal)
        later._memories = inner._memories
        assert comparable(again.run()) == expected


def test_a_run_folder_is_resumed_on_its_own_clock(tmp_path):
    study = tiny_study(*HARD, "rounds=4", "evaluate.every=0")
    whole = fedlearn.simulate(study)
    fedlearn.simulate(study, rounds=2, out=tmp_path / "run")
    rest = fedlearn.simulate(resume=tmp_path / "run", rounds=4)
    assert digest(rest.weights) == digest(whole.weights)
    assert [rest.history.column(name) for name in COLUMNS] == [whole.history.column(name) for name in COLUMNS]


def test_a_void_attempt_costs_time_and_is_tried_with_other_luck():
    study = tiny_study(*CLIENTS, "environment.dropout=0.6", "cohort.minimum=4", "runtime.max_attempts=100", "rounds=3")
    outcome = world(study)[0].run()
    attempts = [row["attempt"] for row in outcome.history]
    assert max(attempts) > 1
    for row in outcome.history:
        assert (row["attempt"] - 1) * VOID_S < row["virtual_seconds"] < (row["attempt"] - 1) * VOID_S + 60


def test_too_few_clients_in_a_week_end_the_run():
    study = tiny_study(*CLIENTS, "environment.availability={kind = 'bernoulli', chance = 1e-9}")
    with pytest.raises(RunFailedError, match="0 clients are available, needs 1") as caught:
        world(study)[0].run()
    assert "cohort.minimum" in caught.value.hint


def test_whose_data_raises_is_the_one_that_fails(monkeypatch):
    prepare = TinyTask.prepare

    def broken(self, train, test):
        if len(train.x) + len(test.x) == 14:
            raise ZeroDivisionError("bob")
        return prepare(self, train, test)

    monkeypatch.setattr(TinyTask, "prepare", broken)
    seen = []
    outcome = world(tiny_study("environment.dropout=0.01", "rounds=1"), seen=seen)[0].run()
    (out,) = (event for event in seen if isinstance(event, events.ClientDropped))
    assert (out.client, out.virtual) == ("bob", False)
    assert outcome.history[0]["clients"] == 3


def test_a_strategy_that_trains_twice_takes_twice_as_long():
    seconds = []
    for strategy in ("fedavg", "ditto"):
        study = tiny_study(*CLIENTS, f"strategy.name={strategy}", "environment.devices={d = {examples_per_s = 1e-3}}")
        seconds.append(world(study)[0].run().history[0]["virtual_seconds"])
    assert seconds[1] / seconds[0] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(("strategy", "passes"), [("fedavg", 0), ("ditto", 1)])
def test_under_dp_sgd_its_own_batches_take_the_time(strategy, passes):
    """A fifth of the rows in each of twenty steps are four times all rows; Ditto's personal pass goes through them once more."""
    slow = (*CLIENTS, "data.folds=1", f"strategy.name={strategy}", "environment.devices={d = {examples_per_s = 1e-3}}")
    plan = ("privacy.unit=record", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")
    private = tiny_study(*slow, *plan, "privacy.sampling_rate=0.2", "privacy.steps=20")
    seconds = [world(study)[0].run().history[0]["virtual_seconds"] for study in (private, tiny_study(*slow))]
    assert seconds[0] / seconds[1] == pytest.approx((4 + passes) / (1 + passes), rel=1e-3)


def test_an_evaluation_asks_anybody_and_costs_nothing():
    rare = ("environment.availability={kind = 'bernoulli', chance = 0.1}", "cohort.minimum=1", "rounds=1")
    study = tiny_study(*CLIENTS, *rare, "evaluate.clients=18")
    seen = []
    outcome = world(study, seen=seen)[0].run()
    assert len(next(event for event in seen if isinstance(event, events.Evaluated)).clients) == 18
    quiet = world(study.with_overrides(["evaluate.every=0"]))[0].run()
    assert quiet.history[0]["virtual_seconds"] == outcome.history[0]["virtual_seconds"]


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 4), st.none() | st.integers(1, 30))
def test_examples_are_those_that_a_client_goes_through(count, batch_size, epochs, max_steps):
    train = TrainTable(batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    batches = batch_rows(train, Place(1, 1, "a"), "global", count)
    assert examples_processed(train, np.array([count])).tolist() == [sum(map(len, batches))]


def test_rows_are_json_and_a_cohort_of_a_thousand_costs_milliseconds():
    study = tiny_study(
        "data.partition=bootstrap",
        "data.clients=1000000",
        "cohort.size=1000",
        "environment.over_selection=1.3",
        "environment.dropout=0.1",
        "environment.availability={kind = 'diurnal'}",
    )
    run, _ = world(study)
    backend = run._backend
    backend.resume(())
    began = time.process_time()
    for number in range(1, 6):
        at = run._machine.next_step.at._replace(round=number)
        cohort = backend.cohort(at)
        work = replace(run._work(at, cohort, "d" * 64), round=number)
        backend._work_out(work)
    assert time.process_time() - began < 2.5, "a tenth of it where nothing else runs"
    assert len(cohort) == 1300
    assert json.loads(json.dumps(dict(backend.facts(at)))) == backend.facts(at)
