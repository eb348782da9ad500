"""DP-SGD: per-example gradients equal Opacus' own, noise is the plan's, and nothing odd in a batch gets through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedlearn.errors import DataError, UnsupportedError
from fedlearn.models.cnn import ImageNet
from fedlearn.models.recurrent import RecurrentNet
from fedlearn.models.tabular import TabularNet
from fedlearn.models.transformer import CausalTransformer
from fedlearn.privacy.dpsgd import DpSgd, engine_for
from fedlearn.privacy.ghost import GhostGradients, unsupported
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.opacus import OpacusGradients
from fedlearn.privacy.plan import AdaptiveClip, FixedClip, FixedCohort, PoissonSampling, PrivacyPlan, Unit

PLAN = PrivacyPlan(Unit.RECORD, PoissonSampling(0.25), FixedClip(0.5), 1.2, 1e-4, units=40, rounds=3, steps=4)


class InPlace(nn.Module):
    """What a layer returned is changed in place, and one layer's result is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(6, 8), nn.Linear(6, 2), nn.Linear(8, 3)

    def forward(self, x):
        self.unused(x)
        return self.last(torch.relu_(self.first(x)))


class Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean(2))


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 8, (3, 2), stride=2, padding=(1, 0), bias=False), nn.ReLU(), nn.Conv2d(8, 16, 2)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def images(*shape):
    return torch.randn(7, *shape)


def tokens():
    return torch.randint(11, (7, 6))


CASES = {
    "tabular": (lambda: TabularNet(5, 3), lambda: images(5)),
    "wide": (lambda: nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3)), lambda: images(30)),
    "cnn": (lambda: ImageNet(1, 3, widths=(8, 16)), lambda: images(1, 8, 8)),
    "strided": (Strided, lambda: images(2, 9, 8)),
    "signal": (Signal, lambda: images(2, 12)),
    "recurrent": (lambda: RecurrentNet(11, 4, 6, layers=2), tokens),
    "transformer": (lambda: CausalTransformer(11, 6, width=8, heads=2, blocks=1), tokens),
    "in place": (InPlace, lambda: images(6)),
}


def case(name: str):
    torch.manual_seed(7)
    make, data = CASES[name]
    model, x = make(), data()
    with torch.no_grad():
        shape = model(x).shape
    y = torch.randint(shape[-1], shape[:-1])

    def losses() -> torch.Tensor:
        out = model(x)
        each = nn.functional.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="none").reshape(y.shape)
        return each.flatten(1).sum(1) if each.ndim > 1 else each

    return model, losses, x


def by_hand(model, losses, clip: float):
    """One backward pass an example."""
    parameters = dict(model.named_parameters())
    total, norms = {n: torch.zeros_like(p) for n, p in parameters.items()}, []
    for one in losses():
        found = torch.autograd.grad(
            one, parameters.values(), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        norm = torch.stack([g.norm() for g in found]).norm()
        norms.append(float(norm))
        for name, g in zip(parameters, found, strict=True):
            total[name] += g * min(1.0, clip / float(norm))
    return total, norms


@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_equal_one_backward_pass_an_example(name):
    model, losses, _ = case(name)
    _, norms = by_hand(model, losses, 1.0)
    clip = float(np.median(norms))
    total, _ = by_hand(model, losses, clip)
    found = GhostGradients(model)(losses, clip)
    assert (found.count, found.not_finite) == (7, 0)
    assert found.unclipped in {3, 4, 5}
    for key, gradient in total.items():
        np.testing.assert_allclose(found.gradients[key], gradient, atol=1e-5 * max(1.0, clip), rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [n for n in CASES if n != "in place"])
def test_clipped_sums_equal_opacus(name):
    model, losses, _ = case(name)
    ours, theirs = GhostGradients(model)(losses, 0.7), OpacusGradients(model)(losses, 0.7)
    assert (ours.count, ours.unclipped) == (theirs.count, theirs.unclipped)
    for key, gradient in theirs.gradients.items():
        np.testing.assert_allclose(ours.gradients[key], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", [GhostGradients, OpacusGradients])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_sample_that_is_not_finite_contributes_zero_and_is_counted(engine, bad):
    model, losses, x = case("tabular")
    total, _ = by_hand(model, lambda: losses()[[0, 1, 3, 4, 5, 6]], 0.5)
    with torch.no_grad():
        x[2] = bad
    found = engine(model)(losses, 0.5)
    assert all(bool(torch.isfinite(g).all()) for g in found.gradients.values())
    if bad != 1e30:  # tanh survives a huge input
        assert (found.count, found.not_finite) == (6, 1)
        for key, gradient in total.items():
            np.testing.assert_allclose(found.gradients[key], gradient, atol=1e-5)


def test_a_zero_gradient_divides_by_nothing():
    model, losses, _ = case("tabular")
    found = GhostGradients(model)(lambda: losses() * 0.0, 1.0)
    assert (found.count, found.unclipped) == (7, 7)
    assert all(float(g.abs().max()) == 0 for g in found.gradients.values())


def test_frozen_layers_do_not_count():
    model, losses, _ = case("wide")
    model[0].weight.requires_grad_(False)
    found = GhostGradients(model)(losses, 1e9)
    assert set(found.gradients) == {"0.bias", "2.weight", "2.bias"}
    plain = torch.autograd.grad(losses().sum(), [model[0].bias, model[2].weight])
    np.testing.assert_allclose(found.gradients["0.bias"], plain[0], rtol=1e-4, atol=1e-6)
    small = GhostGradients(model)(losses, 1e-3)
    norm = torch.stack([g.norm() for g in small.gradients.values()]).norm()
    assert float(norm) <= 7e-3


def test_models_without_a_rule_are_named():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert "tied" in unsupported(tied)[0]
    for layer in (
        nn.LSTM(3, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.PReLU(),
    ):
        assert unsupported(nn.Sequential(layer))
        with pytest.raises(UnsupportedError, match="per-example"):
            GhostGradients(nn.Sequential(layer))


class SharedPlaces(nn.Module):
    """As many places as the batch has examples: every shape fits, and the gradients are others."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(x.unsqueeze(1) + self.places(torch.arange(7))).mean(1)


class PastItsLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 3)

    def forward(self, x):
        return self.one(x) + nn.functional.linear(x, self.one.weight)


@pytest.mark.parametrize(("model", "name"), [(SharedPlaces, "places.weight"), (PastItsLayer, "one.weight")])
def test_a_model_that_would_be_clipped_wrongly_is_refused_when_it_is_checked(model, name):
    torch.manual_seed(0)
    model, x, y = model(), torch.randn(7, 5), torch.randint(3, (7,))
    with pytest.raises(UnsupportedError, match=name):
        GhostGradients(model).check(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(5),
        nn.BatchNorm1d(5, affine=False),
        nn.BatchNorm1d(5, affine=False, track_running_stats=False),
        nn.InstanceNorm1d(5, track_running_stats=True),
    ],
    ids=str,
)
def test_layers_that_mix_examples_are_refused_without_parameters_too(layer):
    # Opacus' validator lets a batch norm without parameters through: it trains, and exports the running mean of the data.
    model = nn.Sequential(layer, nn.Linear(5, 3))
    for engine in (GhostGradients, OpacusGradients, engine_for):
        with pytest.raises(UnsupportedError, match="not separate"):
            engine(model)


def test_a_forward_that_mixes_examples_is_refused_when_it_is_checked():
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(7, 5), torch.randint(3, (7,))

    def losses():
        out = model(x)
        return nn.functional.cross_entropy(out - out.mean(0), y, reduction="none")

    with pytest.raises(UnsupportedError, match="weight: its per-example gradient is not"):
        GhostGradients(model).check(losses)
    with pytest.raises(UnsupportedError, match="no loss is finite"):
        GhostGradients(model).check(lambda: losses() * torch.nan)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_layer_of_another_kind_takes_the_general_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(5, 4, 4, 4), torch.randint(3, (5,))
    engine = engine_for(model)
    assert isinstance(engine, OpacusGradients)

    def losses():
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    total, _ = by_hand(model, losses, 0.3)
    for _ in range(2):  # its hooks come and go
        found = engine(losses, 0.3)
        for key, gradient in total.items():
            np.testing.assert_allclose(found.gradients[key], gradient, atol=1e-5)
    assert isinstance(engine_for(nn.Linear(2, 2)), GhostGradients)


# Steps.


def trainer(plan: PrivacyPlan = PLAN, seed: int = 1, rows: int = 40, **kwargs) -> tuple[DpSgd, nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model, x, y = TabularNet(5, 3), torch.randn(rows, 5), torch.randint(3, (rows,))

    def losses(batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x[batch]), y[batch], reduction="none")

    return DpSgd(model, losses, rows, plan, seeded_chance(seed, "dp"), **kwargs), model, x


def test_batches_are_poisson():
    dp, _, _ = trainer(rows=400, plan=replace(PLAN, sampling=PoissonSampling(0.1), units=400))
    sizes = np.array([len(dp.draw()) for _ in range(2_000)])
    assert sizes.mean() == pytest.approx(40, abs=0.6)
    assert sizes.var() == pytest.approx(36, rel=0.15)  # q (1 - q) n; a fixed batch has none


def test_an_empty_batch_releases_noise():
    dp, model, _ = trainer(replace(PLAN, sampling=PoissonSampling(1e-9)))
    found = dp.gradient()
    assert dp.tally.empty == dp.tally.steps == 1
    assert {n: tuple(g.shape) for n, g in found.items()} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    values = torch.cat([g.flatten() for g in found.values()])
    assert len(values.unique()) == len(values)


def test_the_noise_is_the_plans():
    # The same batches and the same noise, of two sizes: what differs is the noise alone.
    plan = replace(PLAN, noise_multiplier=4.0)
    (one, _, _), (two, _, _) = trainer(plan), trainer(replace(plan, noise_multiplier=8.0))
    differences = []
    for _ in range(60):
        a, b = one.gradient(), two.gradient()
        differences += [(b[name] - a[name]).flatten() for name in a]
    std = float(torch.cat(differences).std())
    assert std == pytest.approx((8.0 - 4.0) * 0.5 / (0.25 * 40), rel=0.03)


def test_the_sum_is_over_a_public_denominator():
    # One row is all that differs: the gradient moves by at most clip / (rate x units), not by 1 / batch.
    plan = replace(PLAN, sampling=PoissonSampling(1.0), noise_multiplier=1e-9)
    dp, _, x = trainer(plan)
    before = torch.cat([g.flatten() for g in dp.gradient().values()])
    with torch.no_grad():
        x[5] = 100.0
    after = torch.cat([g.flatten() for g in dp.gradient().values()])
    assert 0 < float((after - before).norm()) <= 2 * 0.5 / 40 * 1.001


def test_virtual_steps_change_nothing():
    plan = replace(PLAN, sampling=PoissonSampling(0.9))
    (whole, _, _), (parts, _, _) = trainer(plan), trainer(plan, part_rows=7)
    for _ in range(3):
        a, b = whole.gradient(), parts.gradient()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-6)
    assert whole.tally == parts.tally


def test_an_adaptive_clip_follows_the_gradients():
    plan = replace(
        PLAN, sampling=PoissonSampling(1.0), clipping=AdaptiveClip(50.0, 0.5, count_share=0.5), noise_multiplier=0.5
    )
    dp, _, _ = trainer(plan)
    for _ in range(150):
        dp.gradient()
    assert 0.3 < dp.clip_l2 < 6.0


def test_a_group_gives_one_row_a_step_and_is_drawn_whole():
    groups = np.array([f"patient {i // 10}" for i in range(40)])
    plan = replace(PLAN, unit=Unit.GROUP, units=4, delta=1e-3, sampling=PoissonSampling(0.5))
    dp, _, _ = trainer(plan, groups=groups)
    sizes, seen = [], set()
    for _ in range(400):
        rows = dp.draw()
        assert len({groups[r] for r in rows}) == len(rows)
        sizes.append(len(rows))
        seen |= set(rows.tolist())
    assert np.mean(sizes) == pytest.approx(2.0, abs=0.2)
    assert seen == set(range(40))


@pytest.mark.parametrize(
    "groups", [None, np.array(["a"] * 39), np.array(["a"] * 39 + [" "]), np.array([1.0] * 39 + [np.nan])]
)
def test_a_group_column_with_missing_ids_is_refused(groups):
    with pytest.raises(DataError, match="group column"):
        trainer(replace(PLAN, unit=Unit.GROUP), groups=groups)


def test_no_rows_give_noise():
    dp = DpSgd(TabularNet(5, 3), lambda _: torch.zeros(0), 0, PLAN, seeded_chance(1))
    found = torch.cat([g.flatten() for _ in range(30) for g in dp.gradient().values()])
    assert float(found.std()) == pytest.approx(1.2 * 0.5 / (0.25 * 40), rel=0.1)
    assert (dp.tally.empty, dp.tally.examples) == (30, 0)


def test_other_units_are_refused():
    model = TabularNet(5, 3)
    clients = PrivacyPlan(Unit.CLIENT, FixedCohort(5, 40), FixedClip(0.5), 1.0, 1e-4, units=40, rounds=1)
    with pytest.raises(UnsupportedError, match="client-level"):
        DpSgd(model, lambda _: torch.zeros(1), 1, clients, seeded_chance(1))
