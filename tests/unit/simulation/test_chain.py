"""Which models are recognised as a straight line of layers, and why others are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedlearn.learning.local import trainable
from fedlearn.models.cnn import ImageNet
from fedlearn.models.tabular import TabularNet
from fedlearn.simulation.chain import Chain, NotAChain, chain_of
from fedlearn.simulation.layers import Activation, AdaptiveAvgPool, Affine, Conv, Flatten, GroupNorm, Kind, Linear


class Functional(nn.Module):
    """As many write it: functions, and a view by the batch's size."""

    def __init__(self, view="size"):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding="same", bias=False), nn.Linear(36, 3)
        self.kind = view

    def forward(self, x):
        x = functional.max_pool2d((x - 0.5) / 0.25, 2)
        x = functional.gelu(self.first(x), approximate="tanh")
        x = functional.avg_pool2d(torch.sigmoid(x), kernel_size=2, padding=1)
        if self.kind == "size":
            x = x.view(x.size(0), -1)
        elif self.kind == "shape":
            x = torch.reshape(x, (x.shape[0], -1))
        elif self.kind == "width":
            x = x.view(-1, 36)
        else:
            x = torch.flatten(x, start_dim=1)
        return -1.0 + self.last(torch.tanh(x)) * 2


CHAINS = {
    "image net": (ImageNet(3, 10), (3, 12, 12)),
    "tabular net": (TabularNet(5, 2, centre=20.0, scale=3.0), (5,)),
    "linear model": (TabularNet(5, 2, hidden=()), (5,)),
    "one layer": (nn.Linear(5, 2), (5,)),
    "by size": (Functional("size"), (1, 9, 9)),
    "by shape": (Functional("shape"), (1, 9, 9)),
    "by width": (Functional("width"), (1, 9, 9)),
    "by flatten": (Functional("flatten"), (1, 9, 9)),
    "sequential": (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, groups=2, dilation=2),
            nn.GroupNorm(2, 4, affine=False),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((None, 2)),
            nn.Dropout(0.0),
            nn.Identity(),
            nn.Flatten(),
            nn.Linear(48, 2),
        ),
        (2, 15, 15),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_computes_what_its_model_does(name):
    model, example = CHAINS[name]
    chain = chain_of(model)
    assert isinstance(chain, Chain), chain
    x = torch.randn(3, *example, generator=torch.Generator().manual_seed(1))
    weights = trainable(model)
    torch.testing.assert_close(chain.forward(x, weights), model(x), rtol=1e-6, atol=1e-6)
    shapes = chain.shapes(model, example)
    assert len(shapes) == len(chain.layers)
    assert shapes[-1] == tuple(model(x).shape[1:])


def test_the_layers_of_an_image_net():
    chain = chain_of(ImageNet(1, 3, widths=(8,), groups=4))
    assert isinstance(chain, Chain)
    assert chain.layers == (
        Conv("body.0.weight", "body.0.bias", (1, 1), (1, 1), (1, 1), 1),
        GroupNorm("body.1.weight", "body.1.bias", 4, 1e-5),
        Activation(Kind.RELU),
        AdaptiveAvgPool((2, 2)),
        Flatten(),
        Linear("head.weight", "head.bias"),
    )


def test_constants_are_layers():
    chain = chain_of(TabularNet(5, 1, hidden=(), centre=20.0, scale=3.0))
    assert isinstance(chain, Chain)
    assert chain.layers[1:] == (Affine(3.0, 0.0), Affine(1.0, 20.0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Branching(Residual):
    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


class Twice(Residual):
    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Lazy(Residual):
    def forward(self, x):
        return torch.tanh(x)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Pair(Residual):
    def forward(self, x):
        return self.inner(x), x


def frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    return model


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


NO_CHAINS = {
    "residual": (Residual(), "used more than once"),
    "branching": (Branching(), "cannot be followed"),
    "shared layer": (Twice(), "inner.weight is used twice"),
    "tied weights": (tied(), "0.weight is used twice"),
    "idle parameter": (Lazy(), "inner.weight is not used"),
    "subclass": (nn.Sequential(OwnLinear(4, 4)), "0.weight is used outside a known layer"),
    "two outputs": (Pair(), "used more than once"),
    "frozen": (frozen(), "0.weight is frozen"),
    "hooked": (hooked(), "0 has hooks"),
    "dropout": (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)), "dropout 0.3"),
    "batch norm": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), "BatchNorm2d"),
    "recurrent": (nn.Sequential(nn.LSTM(4, 4)), "LSTM"),
    "reflecting": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "reflect"),
    "lopsided": (nn.Sequential(nn.Conv2d(1, 2, 2, padding="same")), "two sides"),
    "joining flatten": (nn.Sequential(nn.Linear(4, 4), nn.Flatten(0)), "flattens 0"),
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain_says_why(name):
    model, reason = NO_CHAINS[name]
    chain = chain_of(model)
    assert isinstance(chain, NotAChain)
    assert reason in chain.reason


def test_a_model_keeps_its_mode():
    model = ImageNet(1, 3).eval()
    chain_of(model)
    assert not model.training


def test_examples_that_do_not_fit_are_refused():
    chain = chain_of(Functional("width"))
    assert isinstance(chain, Chain)
    with pytest.raises(ValueError, match="expected 36"):
        chain.shapes(Functional("width"), (1, 13, 13))
