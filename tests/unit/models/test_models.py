"""Every task's model: trains, has per-example gradients under Opacus, and mixes no examples."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fedlearn.learning.population import Population
from fedlearn.learning.task import build_model
from fedlearn.models.recurrent import Lstm
from fedlearn.models.transformer import CausalTransformer
from fedlearn.tasks import load_task
from fedlearn.tasks.keyboard import VOCABULARY

TABLE = {"label": "y", "features": ["a"], "categorical": {"b": ["u", "v"]}, "classes": ["no", "yes"]}
CASES = {
    "heart": ("hospital/heart", {}, (23,), 2),
    "heart, linear": ("hospital/heart", {"hidden": 0, "columns": "all"}, (33,), 2),
    "blood smear": ("hospital/blood-smear", {}, (3, 28, 28), 4),
    "digits": ("vision/digits", {}, (1, 8, 8), 10),
    "fraud": ("bank/fraud", {"objective": "focal"}, (16,), 2),
    "transformer": ("device/keyboard", {"context": 16, "width": 32}, (16,), VOCABULARY),
    "lstm": ("device/keyboard", {"architecture": "lstm", "context": 16, "width": 32}, (16,), VOCABULARY),
    "table": ("tabular/csv", TABLE, (5,), 2),
    "npz": ("image/npz", {"classes": 3, "channels": 1}, (1, 20, 24), 3),
    "folder": ("image/folder", {"classes": ["a", "b"]}, (3, 32, 32), 2),
}


def batch_of(name, n, seed=0):
    task_name, options, shape, classes = CASES[name]
    task = load_task(task_name, options)
    g = torch.Generator().manual_seed(seed)
    if task_name == "device/keyboard":
        x = torch.randint(0, VOCABULARY, (n, *shape), generator=g)
        return task, x, x.roll(-1, 1)
    x = torch.randn(n, *shape, generator=g)
    return task, x, torch.randint(0, classes, (n,), generator=g)


def per_example_gradients(task, model, x, y):
    """The slow and obvious way: one backward pass an example."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        task.loss(model(x[i : i + 1]), y[i : i + 1]).sum().backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", CASES)
def test_passes_opacus_validator_and_has_its_per_example_gradients(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' own, of its imports and hooks
        from opacus.grad_sample import GradSampleModule
        from opacus.validators import ModuleValidator

        task, x, y = batch_of(name, 5)
        model = build_model(task, 1)
        assert ModuleValidator.validate(model, strict=False) == []
        expected = per_example_gradients(task, model, x, y)
        model.zero_grad()
        hooked = GradSampleModule(model, loss_reduction="sum")
        task.loss(hooked(x), y).sum().backward()
        for (key, parameter), (_, wanted) in zip(hooked._module.named_parameters(), expected.items(), strict=True):
            assert parameter.grad_sample.shape == (5, *parameter.shape), key
            torch.testing.assert_close(parameter.grad_sample, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_state_no_batch_statistics_and_no_tied_weights(name):
    task, x, y = batch_of(name, 4)
    model = build_model(task, 1)
    assert not list(model.buffers())
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Dropout | nn.RNNBase)]
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert task.loss(together, y).shape == (4,)
    assert task.card.metric.split()[0] in task.metrics(together.numpy(), y.numpy())


@pytest.mark.parametrize("name", CASES)
def test_a_few_steps_lower_the_loss(name):
    task, x, y = batch_of(name, 16)
    model = build_model(task, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = task.loss(model(x), y).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone():
    task = load_task("vision/digits")
    before = torch.random.get_rng_state()
    first, again, other = (build_model(task, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_transformer_sees_no_future():
    torch.manual_seed(0)
    model = CausalTransformer(10, 8, 16, 2, 2).eval()
    x = torch.randint(0, 10, (1, 8))
    later = x.clone()
    later[0, 5:] = (later[0, 5:] + 1) % 10
    with torch.no_grad():
        a, b = model(x), model(later)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_our_lstm_is_torchs():
    torch.manual_seed(0)
    ours, fused = Lstm(3, 4), nn.LSTM(3, 4, batch_first=True)
    with torch.no_grad():  # the same order of gates: input, forget, candidate, output
        fused.weight_ih_l0.copy_(ours.from_input.weight)
        fused.bias_ih_l0.copy_(ours.from_input.bias)
        fused.weight_hh_l0.copy_(ours.from_state.weight)
        fused.bias_hh_l0.zero_()
        x = torch.randn(2, 6, 3)
        torch.testing.assert_close(ours(x), fused(x)[0])


@pytest.mark.parametrize("options", [("hospital/heart", {}), ("hospital/blood-smear", {"images": 40, "hospitals": 2})])
def test_real_rows_go_through_model_loss_and_metrics(options):
    from fedlearn.data.partition import make_partition

    task = load_task(*options)
    data = task.load()
    population = Population(task, data, make_partition(data, "natural", None, 0), seed=0)
    mine = population.client(population.client_ids[-1])
    with torch.no_grad():
        outputs = build_model(task, 0)(torch.from_numpy(mine.test.x)).numpy()
    assert 0 <= task.metrics(outputs, mine.test.y)[task.card.metric] <= 1
