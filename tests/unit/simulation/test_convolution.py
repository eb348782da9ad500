"""Convolutional clients trained without autograd, against the sequential oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedlearn.errors import UnsupportedError
from fedlearn.learning import local
from fedlearn.learning.local import Place, trainable
from fedlearn.learning.strategy import MAIN, ClientStart, Pull
from fedlearn.learning.task import Batch, ClientData, Task, build_model
from fedlearn.learning.update import DELTA
from fedlearn.models.cnn import ImageNet
from fedlearn.simulation.blocks import Block, StepPlan, by_steps
from fedlearn.simulation.chain import Chain, chain_of
from fedlearn.simulation.convolution import ConvTrainer
from fedlearn.study import TrainTable
from strategies import create
from tests.support.tiny_task import TinyTask

SIDE = 8

MODELS = {
    "relu": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 48),
        nn.ReLU(),
        nn.Linear(48, 3),
    ),
    "tanh": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 40), nn.Linear(40, 3)
    ),
    "group norm": lambda: ImageNet(1, 3, widths=(4, 8), groups=2),
    "wide first": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, 64),
        nn.Sigmoid(),
        nn.Linear(64, 40, bias=False),
        nn.GELU(),
        nn.Linear(40, 3),
    ),
    "gelu": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GELU("tanh"),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
}


@dataclass(frozen=True)
class Images(Task):
    kind: str = "relu"
    name: ClassVar[str] = "images"
    card: ClassVar = TinyTask.card

    def load(self, source=None):
        raise NotImplementedError

    def model(self):
        return MODELS[self.kind]()

    def loss(self, outputs, y):
        return nn.functional.cross_entropy(outputs, y, reduction="none")

    def metrics(self, outputs, y):
        return {}


def clients_of(counts, seed=1):
    random = np.random.default_rng(seed)
    return {
        f"client {i}": Batch(random.normal(size=(n, 1, SIDE, SIDE)).astype(np.float32), random.integers(0, 3, n))
        for i, n in enumerate(counts)
    }


@dataclass(frozen=True)
class Case:
    """Some clients, their common start, and the trainer for them."""

    task: Task
    train: TrainTable
    data: dict[str, Batch]

    @property
    def dtype(self):
        return torch.float64 if self.train.precision == "float64" else torch.float32

    @property
    def start(self):
        model = build_model(self.task, 3).to(self.dtype)
        return {name: p.detach().clone() for name, p in trainable(model).items()}

    def ordered(self):
        """The block's clients, most steps first."""
        names = list(self.data)
        order = by_steps(self.train, names, [len(batch) for batch in self.data.values()])
        return [names[i] for i in order]

    def block(self):
        clients = self.ordered()
        return Block(4, 2, tuple(clients), tuple(self.data[client] for client in clients))

    def trainer(self):
        model = build_model(self.task, 9).to(self.dtype)
        chain = chain_of(model)
        assert isinstance(chain, Chain), chain
        return ConvTrainer(self.task, model, chain, self.train)

    def oracle(self, strategy, client, state):
        start = {name: tensor.numpy() for name, tensor in self.start.items()}
        shared = {name: np.full_like(array, 0.01) for name, array in start.items()}
        return local.fit(
            self.task,
            build_model(self.task, 9),
            strategy,
            self.train,
            ClientData(self.data[client], self.data[client]),
            place=Place(4, 2, client),
            global_model=start,
            shared=shared,
            state=state,
        )


def states_of(case, strategy):
    """A memory for each client of a stateful strategy, all different."""
    if not strategy.stateful:
        return {client: {} for client in case.data}
    random = np.random.default_rng(8)
    return {
        client: {
            name: random.normal(scale=0.05, size=t.shape).astype(str(t.dtype)[6:]) for name, t in case.start.items()
        }
        for client in case.data
    }


def assert_equal_to_the_oracle(case, strategy_name="fedavg", tolerance=None):
    tolerance = tolerance or (1e-10 if case.train.precision == "float64" else 1e-5)
    strategy = create(strategy_name)
    states, clients, trainer = states_of(case, strategy), case.ordered(), case.trainer()
    stacked = {
        name: torch.from_numpy(np.stack([states[client][name] for client in clients])) for name in states[clients[0]]
    }
    start = case.start
    shared = {name: torch.full_like(tensor, 0.01) for name, tensor in start.items()}
    block = case.block()
    for one in strategy.client_passes(ClientStart(start, shared, stacked)):
        if one.name != MAIN:
            continue
        plan = StepPlan.of(case.train, block, one.name)
        done = trainer.run(one.initial, one.direction, block, plan)
        views = trainer.layout.views(done.weights)
        for i, client in enumerate(clients):
            expected = case.oracle(strategy, client, states[client]).update
            assert done.loss_sums[i] / done.loss_counts[i] == pytest.approx(
                expected.facts["loss"], rel=max(tolerance, 1e-6)
            )
            assert int(plan.steps[i]) == expected.facts["steps"]
            for name, delta in expected.private[DELTA].items():
                after = start[name].numpy() + delta
                assert distance(views[name][i].numpy(), after) <= tolerance, (client, name)


def distance(got, expected):
    return np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)


def train_table(**fields):
    return TrainTable(**{"lr": 0.1, "batch_size": 4, **fields})


OPTIMIZERS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.01},
    {"momentum": 0.5, "weight_decay": 0.02},
    {"optimizer": "adam", "lr": 0.01},
    {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda fields: "-".join(map(str, fields.values())) or "sgd")
def test_every_model_and_optimiser_equals_the_oracle(kind, optimizer):
    case = Case(Images(kind), train_table(precision="float64", epochs=2, **optimizer), clients_of((9, 4, 1)))
    assert_equal_to_the_oracle(case)


@pytest.mark.parametrize("kind", MODELS)
def test_single_precision_is_within_its_rounding(kind):
    assert_equal_to_the_oracle(Case(Images(kind), train_table(epochs=2), clients_of((9, 4, 1))))


@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "ditto"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["group norm", "relu"])
def test_client_rules_turn_the_gradient(strategy, kind, precision):
    case = Case(Images(kind), train_table(precision=precision), clients_of((11, 8, 3)))
    assert_equal_to_the_oracle(case, strategy)


@given(
    counts=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    kind=st.sampled_from(sorted(MODELS)),
    optimizer=st.sampled_from(OPTIMIZERS),
    batch_size=st.integers(1, 6),
    epochs=st.integers(1, 2),
    max_steps=st.none() | st.integers(1, 4),
    strategy=st.sampled_from(["fedavg", "fedprox", "scaffold"]),
)
@settings(max_examples=25, deadline=None)
def test_ragged_clients_equal_the_oracle(counts, kind, optimizer, batch_size, epochs, max_steps, strategy):
    train = train_table(precision="float64", batch_size=batch_size, epochs=epochs, max_steps=max_steps, **optimizer)
    assert_equal_to_the_oracle(Case(Images(kind), train, clients_of(counts)), strategy)


def summed_by_rows(case, start, direction, shares):
    trainer, block = case.trainer(), case.block()
    done = trainer.run(start, direction, block, StepPlan.of(case.train, block, MAIN))
    start = torch.empty(trainer.layout.size, dtype=case.dtype)
    trainer.layout.fill(start, case.start)
    return torch.from_numpy(shares).to(case.dtype) @ (done.weights - start), done


@given(
    counts=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    kind=st.sampled_from(sorted(MODELS)),
    optimizer=st.sampled_from(OPTIMIZERS),
    epochs=st.integers(1, 2),
    strength=st.sampled_from([None, 0.0, 0.5]),
)
@settings(max_examples=25, deadline=None)
def test_a_sum_is_the_sum_of_the_clients(counts, kind, optimizer, epochs, strength):
    case = Case(Images(kind), train_table(precision="float64", epochs=epochs, **optimizer), clients_of(counts))
    shares = np.linspace(0.5, 2.0, len(counts))
    start = case.start
    direction = None if strength is None else Pull(start, strength)
    called = direction and direction.__call__  # no longer known for a pull
    expected, rows = summed_by_rows(case, start, called, shares)
    block, trainer = case.block(), case.trainer()
    done = trainer.run_sum(start, direction, block, StepPlan.of(case.train, block, MAIN), shares)
    for name, part in trainer.layout.slices.items():
        assert distance(done.total[part].numpy(), expected[part].numpy()) <= 1e-10, name
    np.testing.assert_allclose(done.loss_sums, rows.loss_sums, rtol=1e-10)
    np.testing.assert_array_equal(done.loss_counts, rows.loss_counts)


def test_wide_matrices_are_factored_and_narrow_ones_are_not():
    case = Case(Images("relu"), train_table(), clients_of((5, 3)))
    plan = StepPlan.of(case.train, case.block(), MAIN)
    assert case.trainer()._wide(plan) == {"7.weight"}  # 48 x 32; the last, 3 x 48, is cheaper as it is
    many = Case(Images("relu"), train_table(), clients_of((30, 3)))
    assert not many.trainer()._wide(StepPlan.of(many.train, many.block(), MAIN))
    adam = Case(Images("relu"), train_table(optimizer="adam"), clients_of((5, 3)))
    assert not adam.trainer()._wide(StepPlan.of(adam.train, adam.block(), MAIN))


def test_images_of_many_channels_and_a_block_of_one():
    class Colour(Images):
        def model(self):
            return ImageNet(3, 3, widths=(8, 8), groups=4)

    random = np.random.default_rng(2)
    data = {"only": Batch(random.normal(size=(6, 3, SIDE, SIDE)).astype(np.float32), random.integers(0, 3, 6))}
    assert_equal_to_the_oracle(Case(Colour(), train_table(precision="float64"), data))


def test_the_same_bytes_every_time():
    case = Case(Images("relu"), train_table(epochs=2), clients_of((9, 4, 7)))
    block, trainer = case.block(), case.trainer()
    plan = StepPlan.of(case.train, block, MAIN)
    shares = np.ones(3)
    first, second = (trainer.run_sum(case.start, None, block, plan, shares).total for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(*(trainer.run(case.start, None, block, plan).weights for _ in range(2)))


def test_bfloat16_is_not_for_this_trainer():
    case = Case(Images("relu"), train_table(precision="bfloat16"), clients_of((2,)))
    with pytest.raises(UnsupportedError, match="float32 or float64"):
        case.trainer()
