"""The Ray backend on a Ray of this machine: the batched backend's bytes for any number of workers, with workers that die too."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from fedlearn import events
from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.data.population import build_population
from fedlearn.errors import RunFailedError, UnsupportedError
from fedlearn.learning.backend import Failed, Summed, Work
from fedlearn.learning.federation import Federation
from fedlearn.learning.local import initial_weights
from fedlearn.release.journal import DictJournal
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.ray_backend import RayBackend, import_ray
from fedlearn.simulation.run import simulate
from fedlearn.tasks import load_task
from tests.support.fatal_task import NAME, crowd
from tests.support.private_plans import PLANS
from tests.support.ragged_task import population_of, ragged_study

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray forgets the processes and sockets that it opened
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedlearn[ray]'")
    import_ray()
    module.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield module
    module.shutdown()


def run(study, make, **arguments):
    """Final state, and what was reported on the way."""
    return run_on(build_population(study, load_task(study.task.name, study.task.options)), study, make, **arguments)


def run_on(population, study, make, **arguments):
    strategy = load_app().strategy(study.strategy.name, study.strategy.options)
    backend = make(study, population, strategy, **arguments)
    seen: list[events.Event] = []
    first = initial_weights(population.task, study)
    federation = Federation(
        study,
        "run",
        strategy,
        first,
        backend,
        DictJournal(),
        metric="accuracy",
        emit=seen.append,
        may_join=False,
        rehearsal=True,
    )
    try:
        outcome = federation.run()
    finally:
        backend.close()
    return outcome, [e for e in seen if isinstance(e, events.ClientDropped)], backend


def everything(outcome):
    state = outcome.state
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in outcome.history]
    return digest(state.model), digest(state.shared), digest(state.memory), rows


def test_an_address_without_a_cluster_is_named():
    pytest.importorskip("ray")  # first of this file: none has been started in this process
    study = crowd()
    population = build_population(study, load_task(study.task.name, study.task.options))
    strategy = load_app().strategy("fedavg", {})
    with pytest.raises(RunFailedError, match="no cluster at"):
        RayBackend(study, population, strategy, address="auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "workers"),
    [
        (("task.options.hidden=4",), 1),
        (("task.options.hidden=4", "update.clip_l2=0.2"), 4),
        (("strategy.name=scaffold", "cohort.size=11"), 2),
        (("strategy.name=ditto", "evaluate.every=1", "data.folds=3", "data.clients=9"), 1),
        (("strategy.name=median", "task.options.hidden=4", "task.options.dropout=0.5"), 1),
    ],
)
def test_bytes_are_the_batched_backends(ray, overrides, workers):
    study = crowd(*overrides)
    expected, _, _ = run(study, BatchedBackend)
    got, dropped, backend = run(study, RayBackend, workers=workers)
    assert everything(got) == everything(expected)
    assert not dropped
    assert backend.lost == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy", "workers"),
    [
        *(("record adaptive", "scaffold", workers) for workers in (1, 2, 4)),
        *(("client poisson adaptive", "fedavg", workers) for workers in (1, 2, 4)),
        ("record", "ditto", 2),
        ("client", "scaffold", 2),
        ("client ftrl", "fedavg", 2),
    ],
)
def test_bytes_are_the_batched_backends_under_every_plan(ray, kind, strategy, workers):
    """Rows are split by unit there, so a test set says whether an actor splits them as the driver does."""
    table = (
        f"strategy.name={strategy}",
        "task.options.hidden=4",
        "data.folds=3",
        "data.clients=12",
        "evaluate.every=3",
    )
    study = crowd(*table, *PLANS[kind])
    expected, _, _ = run(study, BatchedBackend)
    got, dropped, _ = run(study, RayBackend, workers=workers)
    assert everything(got) == everything(expected)
    assert not dropped


@pytest.mark.slow
def test_models_that_train_one_by_one_under_a_plan_do_so_on_ray(ray):
    """Convolutions: DP-SGD runs on the oracle's path in each actor, and only sums come back."""
    study = ragged_study("task.options.model_name=cnn", "strategy.name=ditto", "rounds=2", *PLANS["record"])
    expected, _, _ = run_on(population_of(study), study, BatchedBackend)
    got, _, _ = run_on(population_of(study), study, RayBackend, workers=2)
    assert everything(got) == everything(expected)


@pytest.mark.slow
def test_a_lost_worker_changes_nothing(ray, tmp_path):
    study = crowd(f"task.name={NAME}", f"task.options.spare={os.getpid()}", f"task.options.fuse={tmp_path / 'fuse'}")
    expected, _, _ = run(study, BatchedBackend)
    (tmp_path / "fuse").touch()
    got, dropped, backend = run(study, RayBackend, workers=2)
    assert backend.lost == 1
    assert not (tmp_path / "fuse").exists()
    assert everything(got) == everything(expected)
    assert not dropped


@pytest.mark.slow
def test_a_span_that_kills_every_worker_ends_the_run(ray):
    study = crowd(f"task.name={NAME}", f"task.options.spare={os.getpid()}")
    with pytest.raises(RunFailedError, match=r"3 workers were lost on clients .* to "):
        run(study, RayBackend, workers=1)


@pytest.mark.slow
def test_what_a_client_raises_is_reported_by_name(ray):
    study = crowd(
        f"task.name={NAME}", f"task.options.spare={os.getpid()}", "task.options.raises=true", "runtime.max_attempts=1"
    )
    seen = []
    population = build_population(study, load_task(study.task.name, study.task.options))
    strategy = load_app().strategy("fedavg", {})
    first = initial_weights(population.task, study)
    backend = RayBackend(study, population, strategy, workers=1)
    federation = Federation(
        study, "run", strategy, first, backend, DictJournal(), metric="accuracy", emit=seen.append, may_join=False
    )
    with pytest.raises(RunFailedError):
        federation.run()
    backend.close()
    dropped = [e for e in seen if isinstance(e, events.ClientDropped)]
    assert {e.client for e in dropped} == set(population.client_ids)
    assert all("these rows cannot be learnt" in e.reason for e in dropped)


def test_without_ray_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match="not installed") as error:
        import_ray()
    assert "fedlearn[ray]" in error.value.hint


@pytest.mark.slow
def test_a_reply_that_nobody_waits_for_leaves_the_workers_usable(ray):
    study = crowd()
    population = build_population(study, load_task(study.task.name, study.task.options))
    strategy = load_app().strategy("fedavg", {})
    backend = RayBackend(study, population, strategy, workers=2)
    model = initial_weights(population.task, study)
    work = Work(1, 1, tuple(population.client_ids), model, {}, digest(model), {}, 5.0)
    replies = backend.fit(work)
    next(replies)
    replies.close()
    clients = [c for reply in backend.fit(replace(work, round=2)) for c in reply.partial.examples]
    backend.close()
    assert sorted(clients) == sorted(population.client_ids)


def test_an_address_goes_with_ray_only():
    with pytest.raises(UnsupportedError, match="address"):
        simulate(crowd(), backend="batched", address="auto")


@pytest.mark.slow
def test_simulate_takes_it_by_name(ray):
    study = crowd("task.options.hidden=4", "rounds=2")
    got, expected = simulate(study, backend="ray", workers=1), simulate(study, backend="batched", workers=2)
    assert digest(got.weights) == digest(expected.weights)


@pytest.mark.slow
def test_a_client_without_its_memory_fails_alone(ray):
    study = crowd("strategy.name=scaffold")
    population = build_population(study, load_task(study.task.name, study.task.options))
    strategy = load_app().strategy("scaffold", {})
    backend = RayBackend(study, population, strategy, workers=1)
    model = initial_weights(population.task, study)
    shared = strategy.server_init(model).shared
    ids = tuple(population.client_ids)
    work = Work(2, 1, ids, model, shared, digest(model), {ids[3]: (1, 1)}, 5.0)
    replies = list(backend.fit(work))
    backend.close()
    assert [r.client for r in replies if isinstance(r, Failed)] == [ids[3]]
    assert {c for r in replies if isinstance(r, Summed) for c in r.partial.examples} == {*ids} - {ids[3]}
