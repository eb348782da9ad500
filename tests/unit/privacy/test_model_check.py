"""Which models can train under record-level privacy: also what Opacus' own validator lets through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlearn.errors import DataError
from fedlearn.models.cnn import ImageNet
from fedlearn.models.recurrent import RecurrentNet
from fedlearn.models.tabular import RareEventNet, TabularNet
from fedlearn.models.transformer import CausalTransformer
from fedlearn.privacy.model_check import Path, check_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def table() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def picture() -> torch.Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """A layer and something around it."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self._forward = forward

    def forward(self, x):
        return self._forward(self.layer, x)


class NoBatchPlaces(nn.Module):
    """Places without a batch dimension: their embedding has no gradient for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(11, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.tokens(x) + self.places(torch.arange(x.shape[1])))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.tokens(x))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x.unsqueeze(1))[0][:, 0])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.head(self.attention(x, x, x)[0][:, 0])


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: TabularNet(6, 1), table),
        (lambda: RareEventNet(6, (8,), 0.01), table),
        (lambda: ImageNet(2, 3, widths=(8, 16)), picture),
        (lambda: RecurrentNet(11, 4, 6), tokens),
        (lambda: CausalTransformer(11, 6, width=8, heads=2, blocks=1), tokens),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 1)), table),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(144, 2)), picture),
    ],
)
def test_models_of_the_house_take_the_fast_path(model, x):
    report = check_model(model(), x())
    assert (report.path, report.findings) == (Path.FAST, ())


@pytest.mark.parametrize(
    ("model", "x", "where", "says"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)), table, "1", "over the batch"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)), table, "1", "over the batch"),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten()),
            picture,
            "1.running_mean",
            "statistics",
        ),
        (Counts, table, "mean", "statistics"),
        (Tied, tokens, "head.weight", "tied to tokens.weight"),
        (First, table, "cell", "fused"),
        (Attends, table, "attention", "fused"),
        (
            lambda: nn.Sequential(nn.Embedding(11, 4, max_norm=0.1), nn.Linear(4, 2)),
            tokens,
            "0.weight",
            "forward pass changes them",
        ),
        (lambda: Around(lambda layer, x: layer(x) - layer(x).mean(0)), table, "", "mixes examples"),
        (lambda: Around(lambda layer, x: layer(x).softmax(0)), table, "", "mixes examples"),
        (lambda: Around(lambda layer, x: layer(x).mean(0)), table, "", "give an output of"),
        (
            lambda: Around(lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias)),
            table,
            "",
            "layer.weight: its per-example gradient is not",
        ),
        (
            lambda: Around(lambda layer, x: layer(x) + 0.1 * layer.weight.sum()),
            table,
            "",
            "layer.weight: its per-example gradient is not",
        ),
        (NoBatchPlaces, tokens, "", "per-example gradients"),
    ],
)
def test_what_rules_privacy_out_is_named(model, x, where, says):
    report = check_model(model(), x())
    assert not report.ok
    assert any(says in f.why and f.fatal and f.where == where for f in report.findings), report.findings


def test_other_layers_take_the_general_path():
    report = check_model(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 2)), picture())
    assert report.path is Path.GENERAL
    assert report.ok
    assert "Opacus computes" in report.findings[0].why


def test_checking_leaves_the_model_as_it_was():
    model = Counts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_model(model, table())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_that_does_not_run_says_so():
    with pytest.raises(DataError, match="does not run"):
        check_model(nn.Linear(5, 1), table())
    with pytest.raises(DataError, match="at least 2"):
        check_model(nn.Linear(6, 1), table()[:1])
