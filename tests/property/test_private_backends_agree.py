"""Under every privacy plan every backend equals the sequential oracle, and itself for any number of workers.

Chance follows from the study's seed, so that both draw the same batches and noise: what is left is arithmetic. Under an adaptive clip a norm
within a rounding error of the clip would be counted by one and not by the other. That is not to be expected of a few updates; of
thousands of examples it may be, so records under an adaptive clip are compared in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedlearn.aggregation.linear import FINE_QUANTUM_BITS, QUANTUM_BITS
from fedlearn.arrays import digest
from fedlearn.privacy.study import CLIP
from fedlearn.simulation import plan
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.plan import Way
from fedlearn.simulation.sequential import SequentialBackend
from tests.support.private_plans import PLANS
from tests.support.ragged_task import outcome_of, population_of, ragged_study, strategy_of

STRATEGIES = ("fedavg", "fedprox", "scaffold", "ditto", "fedadam")
MODELS = ("linear", "tabular", "relu", "residual", "cnn", "wide cnn", "lstm", "dropout")
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
SIZES = st.lists(st.integers(1, 13), min_size=9, max_size=14)
PRECISION = st.sampled_from(["float32", "float64"])
RUNS = settings(max_examples=1, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""One each, of many; without shrinking, which takes minutes. The slow test runs the rest."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(kind, strategy, model, precision, sizes, *more, block=4, workers=2):
    if kind in {"record adaptive", "group adaptive"}:
        precision = "float64"
    study = ragged_study(
        f"strategy.name={strategy}",
        f"task.options.model_name={model}",
        f"task.options.sizes={sizes}",
        f"train.precision={precision}",
        *PLANS[kind],
        *more,
    )
    population, rule = population_of(study), strategy_of(study)
    expected = outcome_of(study, SequentialBackend(study, population, rule))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MOST_CLIENTS", dict.fromkeys(plan.MOST_CLIENTS, block))
        backend = BatchedBackend(study, population, rule, workers=1)
        got = outcome_of(study, backend)
        again = outcome_of(study, BatchedBackend(study, population, rule, workers=workers))
    tolerance = TOLERANCE[precision]
    quantum = 2.0 ** -(FINE_QUANTUM_BITS if precision == "float64" else QUANTUM_BITS)
    for name, array in expected.state.model.items():
        # Half a quantum a round in each coordinate is the resolution of the sums themselves.
        resolution = study.rounds * quantum / 2 * np.sqrt(array.size)
        error = np.linalg.norm(array - got.state.model[name])
        assert error <= tolerance * np.linalg.norm(array) + resolution, name
    assert got.state.shared.keys() == expected.state.shared.keys()
    if CLIP in expected.state.shared:
        assert float(got.state.shared[CLIP]) == pytest.approx(float(expected.state.shared[CLIP]), rel=tolerance)
    for part in ("model", "shared", "memory"):
        assert digest(getattr(got.state, part)) == digest(getattr(again.state, part))
    assert [row["clients"] for row in expected.history] == [row["clients"] for row in got.history]
    return backend


@pytest.mark.parametrize("kind", sorted(PLANS))
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(sizes=SIZES, precision=PRECISION, block=st.integers(2, 7))
@RUNS
def test_every_strategy_under_every_plan(kind, strategy, sizes, precision, block):
    check(kind, strategy, "tabular", precision, sizes, block=block)


@pytest.mark.parametrize("kind", ["record", "record adaptive", "client adaptive"])
@pytest.mark.parametrize("model", MODELS)
@given(sizes=SIZES, strategy=st.sampled_from(STRATEGIES), workers=st.integers(2, 4))
@RUNS
def test_every_model_under_a_plan(kind, model, sizes, strategy, workers):
    backend = check(kind, strategy, model, "float32", sizes, workers=workers)
    if kind.startswith("record"):
        way = {"linear": Way.DENSE, "tabular": Way.DENSE, "relu": Way.DENSE, "dropout": Way.SEQUENTIAL}
        assert backend.plan(()).way is way.get(model, Way.SINGLE)


@pytest.mark.parametrize("optimizer", ["train.optimizer=adam", "train.momentum=0.9", "train.weight_decay=0.01"])
@pytest.mark.parametrize("kind", ["record", "client adaptive"])
def test_every_optimizer_follows_noisy_gradients(kind, optimizer):
    check(kind, "fedavg", "relu", "float64", [5, 1, 9, 4, 12, 3, 7, 2, 6, 8], optimizer)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["record", "client", "client adaptive"])
def test_clients_without_rows(kind, strategy):
    """Under a client-level plan they count like any other, with an update of zero; under a record-level one they take no part."""
    sizes = [1, 8, 1, 9, 4, 1, 6, 5, 1]
    backend = check(kind, strategy, "tabular", "float32", sizes, "data.folds=2")
    study = ragged_study(f"task.options.sizes={sizes}", "data.folds=2", "rounds=1", *PLANS[kind])
    outcome = outcome_of(study, BatchedBackend(study, population_of(study), strategy_of(study)))
    empty = [c for c in population_of(study).client_ids if not len(population_of(study).client(c).train)]
    assert empty
    assert outcome.history[0]["clients"] == len(sizes) - (len(empty) if kind == "record" else 0)
    assert backend.plan(()).way is Way.DENSE


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(
    kind=st.sampled_from(sorted(PLANS)),
    strategy=st.sampled_from(STRATEGIES),
    model=st.sampled_from(MODELS),
    sizes=SIZES,
    precision=PRECISION,
    block=st.integers(2, 9),
    workers=st.integers(2, 5),
)
@settings(RUNS, max_examples=60)
def test_everything_at_length(kind, strategy, model, sizes, precision, block, workers):
    check(kind, strategy, model, precision, sizes, block=block, workers=workers)
