"""Blocks: the oracle's batches in stacked form, and torch's optimisers on stacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.learning.local import Place, batch_rows
from fedlearn.learning.task import Batch
from fedlearn.simulation.blocks import Block, Layout, StackedOptimizer, StepPlan, by_steps, turn
from fedlearn.study import TrainTable


def block_of(train: TrainTable, sizes: list[int]) -> Block:
    order = by_steps(train, sizes, sizes)
    data = tuple(Batch(np.full((sizes[i], 2), i, np.float32), np.zeros(sizes[i], np.int64)) for i in order)
    return Block(9, 4, tuple(f"c{i}" for i in order), data)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    max_steps=st.sampled_from([None, 1, 2, 5]),
)
@settings(deadline=None)
def test_a_plan_holds_the_oracles_batches(sizes, batch_size, epochs, max_steps):
    train = TrainTable(batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    block = block_of(train, sizes)
    plan = StepPlan.of(train, block, "global")
    first = np.cumsum(block.counts) - block.counts
    assert list(plan.steps) == sorted(plan.steps, reverse=True)
    for i, client in enumerate(block.clients):
        expected = list(batch_rows(train, Place(9, 4, client), "global", int(block.counts[i])))
        assert plan.steps[i] == len(expected)
        for step in range(plan.rows.shape[1]):
            assert (i < plan.active(step)) == (step < len(expected))
            rows = plan.rows[i, step, : plan.sizes[i, step]] - first[i]
            assert list(rows) == (list(expected[step]) if step < len(expected) else [])
            assert set(plan.rows[i, step, plan.sizes[i, step] :]) <= {first[i]}, "filled up with the client's own row"


def test_equal_clients_stay_in_their_order():
    assert by_steps(TrainTable(batch_size=4), "abcd", [4, 9, 3, 12]) == [1, 3, 0, 2]


def test_a_layout_shares_memory():
    layout = Layout({"w": (2, 3), "b": (2,)})
    flat = torch.zeros(4, layout.size)
    layout.fill(flat, {"w": torch.arange(6.0).view(2, 3), "b": torch.arange(8.0).view(4, 2)})
    assert flat[2].tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    layout.views(flat)["b"][1] = 7.0
    assert flat[1, 6:].tolist() == [7, 7]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.1},
        {"optimizer": "adamw", "weight_decay": 0.1},
    ],
)
def test_the_optimisers_are_torchs(options):
    train = TrainTable(lr=0.05, **options)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    steps = (4, 2, 1)  # of each client
    stack = start.clone()
    optimizer = StackedOptimizer(train, stack)
    for step in range(4):
        active = sum(count > step for count in steps)
        optimizer.step(stack[:active], gradients[step, :active].clone())
    for client, count in enumerate(steps):
        weights = torch.nn.Parameter(start[client].clone())
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        extra = {"momentum": train.momentum} if train.optimizer == "sgd" else {}
        oracle = kinds[train.optimizer]([weights], lr=train.lr, weight_decay=train.weight_decay, **extra)
        for step in range(count):
            weights.grad = gradients[step, client].clone()
            oracle.step()
        torch.testing.assert_close(stack[client], weights.detach(), rtol=1e-12, atol=1e-14)


def test_a_rule_turns_only_those_who_still_train():
    layout = Layout({"w": (2,)})
    gradient, weights = torch.ones(3, 2), torch.full((3, 2), 5.0)
    own = torch.tensor([[1.0], [2.0], [3.0]])  # a row for every client, as a control variate has
    turn(lambda g, w: {"w": g["w"] * own + w["w"]}, layout, gradient, weights, 2)
    assert gradient.tolist() == [[6, 6], [7, 7], [1, 1]]
