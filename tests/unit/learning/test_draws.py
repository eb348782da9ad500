"""What may draw in a training step, and whose draws these are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlearn.learning.draws import may_draw, seeded
from fedlearn.learning.task import build_model
from fedlearn.tasks import load_task
from tests.support.tiny_task import TinyTask

HEART = load_task("hospital/heart")
CPU = torch.device("cpu")


class Mine(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class MyLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(0.0)), (3, 2)),
        (nn.LSTM(2, 2), (3, 1, 2)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.MaxPool2d(2), nn.Flatten()), (3, 1, 8, 8)),
    ],
)
def test_torchs_own_quiet_layers_do_not_draw(model, shape):
    assert not may_draw(HEART, model)
    before = torch.get_rng_state()
    model.train()(torch.ones(shape))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.1),
        nn.RReLU(),
        nn.LSTM(2, 2, num_layers=2, dropout=0.1),
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2),
        Mine(),
        MyLinear(2, 2),
    ],
)
def test_layers_that_draw_or_are_unknown_may_draw(layer):
    assert may_draw(HEART, layer)
    assert may_draw(HEART, nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer)))


def test_what_a_user_hangs_on_a_layer_may_draw():
    hooked, patched = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x + torch.rand(2)
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for layer in (hooked, patched, weighted):
        assert may_draw(HEART, layer)


def test_a_users_own_loss_may_draw():
    assert may_draw(TinyTask(), nn.Linear(3, 2))


@pytest.mark.parametrize("name", ["hospital/heart", "vision/digits", "bank/fraud"])
def test_our_own_models_and_losses_do_not(name):
    task = load_task(name)
    assert not may_draw(task, build_model(task, 0))


def test_draws_are_those_of_manual_seed_and_the_generator_is_given_back():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with seeded(CPU, 123):
        drawn = torch.rand(5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    assert torch.equal(drawn, torch.rand(5))
