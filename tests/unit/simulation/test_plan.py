"""Which way a model is trained, and why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedlearn.learning.task import Batch
from fedlearn.simulation import plan as planning
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.plan import Way, plan_training
from tests.support.ragged_task import MODELS, RaggedTask, population_of, ragged_study, strategy_of


def plan_of(model: nn.Module, *overrides: str, x=None, sums_only=False):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3, 6)).astype(np.float32) if x is None else x
    example = Batch(x, np.array([0, 1, 2]))
    return plan_training(RaggedTask(), model, ragged_study(*overrides), example, sums_only=sums_only)


class Wide(nn.Module):
    """More parameters than vmap pays for, and no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 20_000), nn.Linear(20_000, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.head(hidden + torch.tanh(hidden))


@pytest.mark.parametrize(
    ("model", "way", "said"),
    [
        (MODELS["relu"](), Way.DENSE, "linear layers"),
        (MODELS["residual"](), Way.GENERAL, "expected a straight line"),
        (MODELS["mixing"](), Way.SINGLE, "depends on the others"),
        (MODELS["branching"](), Way.SINGLE, "vmap cannot follow"),
        (MODELS["dropout"](), Way.SEQUENTIAL, "draws random numbers"),
        (Wide(), Way.SINGLE, "parameters"),
        (nn.Linear(7, 3), Way.SINGLE, "cannot be tried"),
    ],
)
def test_the_way_and_its_reason(model, way, said):
    plan = plan_of(model)
    assert plan.way is way
    assert said in plan.reason


def test_a_reduced_loss_is_not_batched():
    class Reduced(RaggedTask):
        def loss(self, outputs, y):
            return super().loss(outputs, y).mean()

    x = np.ones((3, 6), np.float32)
    plan = plan_training(Reduced(), nn.Linear(6, 3), ragged_study(), Batch(x, np.zeros(3, np.int64)))
    assert (plan.way, plan.reason) == (Way.SINGLE, "the loss has shape (), expected one for each example")


def test_bfloat16_is_not_batched():
    assert plan_of(MODELS["relu"](), "train.precision=bfloat16").way is Way.SINGLE


def test_convolutions_are_a_way_of_their_own_on_a_cpu():
    x = np.random.default_rng(0).normal(size=(3, 1, 6, 6)).astype(np.float32)
    assert plan_of(MODELS["cnn"](), x=x).way is Way.CONVOLUTION


def test_linear_layers_on_sequences_are_for_any_model():
    class Sequences(RaggedTask):
        def loss(self, outputs, y):
            return super().loss(outputs.mean(1), y)

    x = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
    plan = plan_training(Sequences(), nn.Linear(6, 3), ragged_study(), Batch(x, np.zeros(3, np.int64)))
    assert (plan.way, plan.reason) == (Way.GENERAL, "a linear layer takes more than a row of each example")


def test_blocks_of_convolutions_are_bounded_by_what_a_step_holds():
    x = np.random.default_rng(0).normal(size=(3, 1, 6, 6)).astype(np.float32)
    assert plan_of(MODELS["cnn"](), x=x).block == planning.MOST_CLIENTS[Way.CONVOLUTION]
    large = np.zeros((3, 1, 400, 400), np.float32)
    assert plan_of(MODELS["cnn"](), "train.batch_size=64", x=large).block == 1


def test_a_trial_leaves_no_trace():
    model = MODELS["dropout"]()
    before = torch.get_rng_state()
    plan_of(model)
    assert torch.equal(before, torch.get_rng_state())


def test_large_models_make_small_blocks():
    small, large = (
        plan_of(MODELS["relu"]()),
        plan_of(nn.Sequential(nn.Linear(6, 50_000), nn.ReLU(), nn.Linear(50_000, 3))),
    )
    assert small.block == planning.MOST_CLIENTS[Way.DENSE]
    row = 4 * sum(p.numel() for p in nn.Sequential(nn.Linear(6, 50_000), nn.Linear(50_000, 3)).parameters())
    assert large.block == planning.STACK_BYTES // (planning.COPIES * row) < small.block


def test_a_cohort_without_rows_plans_nothing():
    study = ragged_study()
    backend = BatchedBackend(study, population_of(study), strategy_of(study))
    assert backend.plan(()).reason == "no client of this cohort has training rows"
    assert backend.plan(("c000",)).way is Way.DENSE
