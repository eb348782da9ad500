"""Rewritten models: the same outputs and gradients where they should be, and record-level privacy where there was none."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import fedlearn.privacy
from fedlearn.errors import UnsupportedError
from fedlearn.privacy.ghost import GhostGradients
from fedlearn.privacy.layers import Attention, Recurrent
from fedlearn.privacy.model_check import Path, check_model
from fedlearn.privacy.rewriting import rewrite

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> torch.Tensor:
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))


RECURRENT = [
    (kind, more)
    for kind, layers, bidirectional, first in itertools.product(
        (nn.LSTM, nn.GRU, nn.RNN), (1, 2), (False, True), (False, True)
    )
    for more in [{"num_layers": layers, "bidirectional": bidirectional, "batch_first": first}]
] + [
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"bias": False}),
    (nn.GRU, {"bias": False, "batch_first": True}),
]


@pytest.mark.parametrize(("kind", "more"), RECURRENT, ids=str)
@pytest.mark.parametrize("started", [False, True])
def test_recurrent_layers_give_the_same_outputs_states_and_gradients(kind, more, started):
    torch.manual_seed(0)
    layer = kind(5, 7, **more)
    ours = Recurrent.of(layer)
    batch, time = 3, 6
    x = numbers(*((batch, time) if layer.batch_first else (time, batch)), 5)
    hx = None
    if started:
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        hx = numbers(count, batch, layer.proj_size or 7, seed=1)
        hx = (hx, numbers(count, batch, 7, seed=2)) if kind is nn.LSTM else hx
    found, end = ours(x, hx)
    expected, last = layer(x, hx)
    pairs = zip((found, *_tuple(end)), (expected, *_tuple(last)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    inputs = torch.zeros_like(x, requires_grad=True)
    (one,) = torch.autograd.grad(ours(x + inputs, hx)[0].square().sum(), inputs)
    (two,) = torch.autograd.grad(layer(x + inputs, hx)[0].square().sum(), inputs)
    assert torch.allclose(one, two, atol=1e-5)


def _tuple(states):
    return states if isinstance(states, tuple) else (states,)


def test_dropout_between_layers_is_torchs():
    torch.manual_seed(0)
    layer = nn.LSTM(5, 7, num_layers=2, dropout=0.5, batch_first=True)
    ours, x = Recurrent.of(layer), numbers(400, 3, 5)
    assert torch.allclose(ours.eval()(x)[0], layer.eval()(x)[0], atol=1e-6)
    first, second = ours.train()(x)[0], ours(x)[0]
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(float(layer.train()(x)[0].std()), rel=0.1)


@pytest.mark.parametrize(
    "more", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 4, "vdim": 3, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("masked", ["", "causal", "bool", "per-head", "padding"])
def test_attention_gives_the_same_outputs_and_weights(more, masked):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **more)
    ours, batch, places = Attention.of(layer), 3, 5

    def sequence(width: int, seed: int) -> torch.Tensor:
        x = numbers(batch, places, width, seed=seed)
        return x if layer.batch_first else x.transpose(0, 1)

    q, k, v = sequence(8, 1), sequence(layer.kdim, 2), sequence(layer.vdim, 3)
    masks = {
        "": {},
        "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(places), "is_causal": True},
        "bool": {"attn_mask": torch.triu(torch.ones(places, places, dtype=torch.bool), 1)},
        "per-head": {"attn_mask": numbers(batch * 2, places, places)},
        "padding": {"key_padding_mask": torch.arange(places).expand(batch, -1) >= torch.tensor([[5], [3], [1]])},
    }[masked]
    for shown in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        found, expected = ours(q, k, v, **masks, **shown), layer(q, k, v, **masks, **shown)
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert (found[1] is None) == (expected[1] is None)
        assert found[1] is None or torch.allclose(found[1], expected[1], atol=1e-6)


def test_attention_with_keys_of_its_own_stays():
    model = nn.ModuleList(
        [nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, add_zero_attn=True)]
    )
    assert rewrite(model).changes == ()


def test_what_is_no_batch_is_refused():
    lstm = Recurrent.of(nn.LSTM(5, 7))
    with pytest.raises(UnsupportedError, match="batch of sequences"):
        lstm(numbers(6, 5))
    with pytest.raises(UnsupportedError, match="packed sequence"):
        lstm(nn.utils.rnn.pack_sequence([numbers(6, 5)]))
    with pytest.raises(UnsupportedError, match="batch of sequences"):
        Attention.of(nn.MultiheadAttention(8, 2))(numbers(6, 8), numbers(6, 8), numbers(6, 8))


def test_frozen_weights_stay_frozen():
    lstm, attention = nn.LSTM(5, 7), nn.MultiheadAttention(8, 2)
    lstm.weight_hh_l0.requires_grad_(requires_grad=False)
    attention.in_proj_weight.requires_grad_(requires_grad=False)
    new = rewrite(nn.ModuleList([lstm, attention])).model
    frozen = {name for name, p in new.named_parameters() if not p.requires_grad}
    assert frozen == {
        "0.cells.0.from_state.weight",
        "1.from_query.weight",
        "1.from_key.weight",
        "1.from_value.weight",
    }


# Whole models.


class Words(nn.Module):
    """Tied, fused, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.cell = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x, _ = self.cell(self.tokens(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.relu(x))


def test_a_model_with_everything_wrong_trains_privately_when_rewritten():
    torch.manual_seed(0)
    model = Words()
    before = copy.deepcopy(model.state_dict())
    assert not check_model(model, tokens()).ok
    found = rewrite(model, tokens())
    assert {change.where for change in found.changes} == {"head.weight", "cell", "attention", "relu"}
    assert all(change.equal for change in found.changes)
    assert found.difference is not None
    assert found.difference < 1e-6
    # Untied, the table counts twice; two biases of the LSTM are one.
    assert found.parameters_after == found.parameters_before + 11 * 8 - 4 * 8
    report = check_model(found.model, tokens())
    assert (report.path, report.findings) == (Path.FAST, ())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), (
        "the first one is as it was"
    )
    summed = GhostGradients(found.model)(lambda: found.model(tokens()).square().flatten(1).sum(1), 1e-3)
    assert summed.count == 4


def test_a_bare_layer_is_rewritten_too():
    assert isinstance(rewrite(nn.LSTM(3, 4)).model, Recurrent)
    assert isinstance(fedlearn.privacy.rewrite(nn.GRU(3, 4)).model, Recurrent)
    with pytest.raises(AttributeError, match="no attribute 'rewritten'"):
        _ = fedlearn.privacy.rewritten


@pytest.mark.parametrize("training", [True, False])
def test_torchs_transformer_encoder_goes_on(training):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    new = rewrite(encoder).model
    x, padding = numbers(3, 5, 8), torch.arange(5).expand(3, -1) >= torch.tensor([[5], [3], [4]])
    encoder.train(training)
    new.train(training)
    with torch.no_grad():
        found, expected = new(x, src_key_padding_mask=padding), encoder(x, src_key_padding_mask=padding)
    kept = ~padding
    assert torch.allclose(found[kept], expected[kept], atol=1e-5)
    assert check_model(nn.Sequential(new, nn.Flatten(), nn.Linear(40, 2)), x).path is Path.FAST


def test_norms_become_others_and_say_so():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(432, 2))
    )
    nn.init.normal_(model[1].weight)
    x = numbers(4, 2, 8, 8)
    found = rewrite(model, x)
    assert [(c.where, c.before.partition("(")[0], c.after.partition("(")[0], c.equal) for c in found.changes] == [
        ("1", "BatchNorm2d", "GroupNorm", False)
    ]
    assert found.difference is None, "there is nothing that should be equal"
    assert found.parameters_before == found.parameters_after
    assert torch.equal(found.model[1].weight, model[1].weight)
    assert check_model(found.model, x).path is Path.FAST
    assert isinstance(model[1], nn.BatchNorm2d)


def test_only_changes_that_should_be_equal_are_compared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 6, batch_first=True), Last(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    found = rewrite(model, numbers(4, 3, 5))
    assert [change.equal for change in found.changes] == [True, False]
    assert found.difference is not None
    assert found.difference < 1e-6
    assert check_model(found.model, numbers(4, 3, 5)).path is Path.FAST


class Last(nn.Module):
    def forward(self, found):
        return found[0][:, -1]


def test_a_norm_of_a_tables_channels_keeps_something_of_them():
    """Eight channels in eight groups would be eight zeros."""
    for affine in (True, False):
        (norm,) = rewrite(nn.Sequential(nn.BatchNorm1d(8, affine=affine))).model
        assert isinstance(norm, nn.GroupNorm)
        assert norm(numbers(3, 8)).abs().min() > 0
        assert (norm.weight is not None) == affine


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(
            nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(128, 2)
        ),
        lambda: nn.Sequential(nn.SyncBatchNorm(2), nn.Flatten(), nn.Linear(128, 2)),
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Hardswish(inplace=True), nn.Dropout(0.1, inplace=True), nn.Flatten()
        ),
    ],
)
def test_other_layers_are_rewritten(model):
    found = rewrite(model(), numbers(4, 2, 8, 8))
    assert found.changes
    assert check_model(found.model, numbers(4, 2, 8, 8)).ok


def test_an_embedding_without_a_longest_norm():
    model = nn.Sequential(nn.Embedding(11, 4, max_norm=0.1), nn.Linear(4, 2))
    assert check_model(rewrite(model).model, tokens()).path is Path.FAST


def test_a_layer_in_two_places_stays_one():
    shared = nn.GRU(5, 5, batch_first=True)
    model = nn.Sequential(shared, Whole(), shared, Whole(), nn.Linear(5, 2))
    found = rewrite(model, numbers(4, 3, 5))
    assert len(found.changes) == 1
    assert found.model[0] is found.model[2]
    assert check_model(found.model, numbers(4, 3, 5)).path is Path.FAST


class Whole(nn.Module):
    def forward(self, found):
        return found[0]
