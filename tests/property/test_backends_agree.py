"""Every backend equals the sequential oracle, and itself for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedlearn.aggregation.linear import FINE_QUANTUM_BITS, QUANTUM_BITS
from fedlearn.arrays import digest
from fedlearn.simulation import plan
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.plan import Way
from fedlearn.simulation.sequential import SequentialBackend
from tests.support.ragged_task import MODELS, outcome_of, population_of, ragged_study, strategy_of

STRATEGIES = (
    *("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold", "ditto"),
    *("median", "trimmed_mean", "krum", "multi_krum"),
)
WAYS = {
    "linear": Way.DENSE,
    "tabular": Way.DENSE,
    "relu": Way.DENSE,
    "residual": Way.GENERAL,
    "mixing": Way.SINGLE,
    "branching": Way.SINGLE,
    "dropout": Way.SEQUENTIAL,
    "cnn": Way.CONVOLUTION,
    "wide cnn": Way.CONVOLUTION,
    "lstm": Way.GENERAL,
    "transformer": Way.GENERAL,
}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
TRAINING = st.fixed_dictionaries(
    {
        "train.batch_size": st.integers(1, 6),
        "train.epochs": st.integers(1, 2),
        "train.max_steps": st.sampled_from([None, 1, 3]),
        "train.weight_decay": st.sampled_from([0.0, 0.01]),
        "train.precision": st.sampled_from(["float32", "float64"]),
        "update.clip_l2": st.sampled_from([None, 0.05]),
        "cohort.size": st.sampled_from([None, 9]),
    }
)
RUNS = settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""Without shrinking, which takes minutes."""
SIZES = st.lists(st.integers(1, 13), min_size=9, max_size=14)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def study_of(model, strategy, settings_, sizes):
    """The study; in float64 where an adaptive server meets attention or convolutions.

    Such a server divides each number's update by its size, and so makes much of what is nothing but rounding: of the bias of attention's keys, which has
    no effect, and of what follows when a ReLU or a maximum of two equal numbers falls the other way.
    """
    if model in {"transformer", "cnn", "wide cnn"} and strategy in {"fedadam", "fedyogi", "fedadagrad"}:
        settings_ = settings_ | {"train.precision": "float64"}
    given_ = {"strategy.name": strategy, "task.options.model_name": model, "task.options.sizes": sizes, **settings_}
    return ragged_study(*(f"{key}={value}" for key, value in given_.items() if value is not None))


def check(study, block, workers):
    population, strategy = population_of(study), strategy_of(study)
    expected = outcome_of(study, SequentialBackend(study, population, strategy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MOST_CLIENTS", dict.fromkeys(plan.MOST_CLIENTS, block))
        backend = BatchedBackend(study, population, strategy, workers=1)
        got = outcome_of(study, backend)
        again = outcome_of(study, BatchedBackend(study, population, strategy, workers=workers))
    assert backend.plan(()).way is WAYS[study.task.options["model_name"]]
    for name, array in expected.state.model.items():
        # Half a quantum a round in each coordinate is the resolution of the sums themselves.
        quantum = 2.0 ** -(FINE_QUANTUM_BITS if array.dtype == np.float64 else QUANTUM_BITS)
        resolution = study.rounds * quantum / 2 * np.sqrt(array.size)
        error = np.linalg.norm(array - got.state.model[name])
        assert error <= TOLERANCE[study.train.precision] * np.linalg.norm(array) + resolution, name
    assert digest(got.state.model) == digest(again.state.model)
    assert [row["clients"] for row in expected.history] == [row["clients"] for row in got.history]
    losses = [[row["train_loss"] for row in outcome.history] for outcome in (expected, got)]
    assert np.allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(model=st.sampled_from(sorted(MODELS)), training=TRAINING, sizes=SIZES, block=st.integers(2, 7))
@RUNS
def test_every_strategy(strategy, model, training, sizes, block):
    check(study_of(model, strategy, training, sizes), block, 2)


@pytest.mark.parametrize("model", sorted(MODELS))
@given(strategy=st.sampled_from(STRATEGIES), training=TRAINING, sizes=SIZES, workers=st.integers(2, 4))
@RUNS
def test_every_model(model, strategy, training, sizes, workers):
    check(study_of(model, strategy, training, sizes), 4, workers)


@pytest.mark.slow
@given(
    model=st.sampled_from(sorted(MODELS)),
    strategy=st.sampled_from(STRATEGIES),
    training=TRAINING,
    sizes=SIZES,
    block=st.integers(2, 9),
    workers=st.integers(2, 5),
)
@settings(RUNS, max_examples=150)
def test_everything_at_length(model, strategy, training, sizes, block, workers):
    check(study_of(model, strategy, training, sizes), block, workers)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "momentum"])
@given(model=st.sampled_from(["tabular", "relu", "residual", "cnn", "wide cnn"]), training=TRAINING, sizes=SIZES)
@RUNS
def test_every_optimizer(optimizer, model, training, sizes):
    """In float64: Adam divides a gradient by its own size, so float32's rounding of a gradient that is 0 becomes a whole step."""
    chosen = {"train.momentum": 0.9} if optimizer == "momentum" else {"train.optimizer": optimizer, "train.lr": 0.01}
    check(study_of(model, "fedavg", training | chosen | {"train.precision": "float64"}, sizes), 5, 2)
