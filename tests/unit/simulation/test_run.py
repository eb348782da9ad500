"""`fedlearn.simulate`, as it is used from a notebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.errors import RunFailedError, StudyError, UnsupportedError
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study


def test_a_result_has_history_model_and_weights():
    result = fedlearn.simulate(tiny_study(), rounds=2)
    assert len(result.history) == 2
    assert result.study.rounds == 2
    x = TinyTask().load().x
    with torch.no_grad():
        outputs = result.model(torch.tensor(x)).numpy()
    np.testing.assert_allclose(outputs, x @ result.weights["weight"].T + result.weights["bias"], rtol=1e-5)
    assert not result.model.training
    assert result.plot() is not None


def test_one_study_gives_one_model_whatever_else_draws_or_runs():
    torch.manual_seed(1)
    first = digest(fedlearn.simulate(tiny_study()).weights)
    torch.manual_seed(2)
    torch.rand(10)
    fedlearn.simulate(tiny_study("seed=9"))
    assert digest(fedlearn.simulate(tiny_study()).weights) == first
    assert digest(fedlearn.simulate(tiny_study("seed=9")).weights) != first


def test_a_float64_study_gives_a_float64_model():
    result = fedlearn.simulate(tiny_study("train.precision=float64", "rounds=1"))
    np.testing.assert_array_equal(result.model.weight.detach().numpy(), result.weights["weight"])
    assert result.weights["weight"].dtype == np.float64


def test_learning_happens():
    history = fedlearn.simulate(tiny_study("rounds=10")).history
    assert history.column("train_loss")[-1] < history.column("train_loss")[0]
    assert history.final() > 0.8


def test_threads_are_given_back():
    before = torch.get_num_threads()
    fedlearn.simulate(tiny_study("runtime.threads=2", "rounds=1"))
    assert torch.get_num_threads() == before
    with pytest.raises(RunFailedError):
        fedlearn.simulate(tiny_study("runtime.threads=2", "strategy.name=krum"))
    assert torch.get_num_threads() == before


def test_events_come_as_they_happen():
    seen: list = []
    fedlearn.simulate(tiny_study("rounds=1"), emit=seen.append)
    assert seen[0].clients == CLIENTS
    assert isinstance(seen[-1], events.RunFinished)


def test_overrides_of_files_and_of_studies():
    from_file = fedlearn.simulate("simulations/heart.toml", rounds=1, overrides=["strategy.name=fedprox"])
    assert (from_file.study.strategy.name, from_file.study.rounds) == ("fedprox", 1)
    assert fedlearn.simulate(tiny_study(), overrides=("train.lr=0.5",), rounds=1).study.train.lr == 0.5


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "quantity"])
def test_partitions_make_clients(partition):
    options = {"dirichlet": "data.options={alpha=5.0}"}.get(partition, "data.options={}")
    study = tiny_study(f"data.partition={partition}", "data.clients=3", options, "cohort.wait_for=3", "rounds=1")
    assert len(fedlearn.simulate(study).history.clients) == 3


def test_what_cannot_run_says_why():
    with pytest.raises(StudyError, match="no such study file"):
        fedlearn.simulate("simulations/hart.toml")
    with pytest.raises(UnsupportedError, match="not on this machine"):
        fedlearn.simulate(tiny_study(), device="cuda:99")
    for key in ("cohort.size", "cohort.minimum"):
        with pytest.raises(StudyError, match=f"{key}: got 9, this study has 4 clients"):
            fedlearn.simulate(tiny_study(f"{key}=9"))


def test_a_simulation_waits_for_nobody():
    waiting = fedlearn.simulate(tiny_study("cohort.wait_for=9"))
    assert digest(waiting.weights) == digest(fedlearn.simulate(tiny_study()).weights)


def test_a_users_own_task_from_a_folder(tmp_path, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_task.py").write_text("from tests.support.tiny_task import TinyTask as Mine\n")
    result = fedlearn.simulate(tiny_study("task.name=my_task:Mine", "rounds=1"), app=tmp_path)
    assert digest(result.weights) == digest(fedlearn.simulate(tiny_study("rounds=1")).weights)
    del sys.modules["my_task"]
