"""Frozen layers and low-rank adapters under DP: what is frozen is in no norm, gets no noise and goes nowhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedlearn.data.population import build_population
from fedlearn.learning.backend import Fitted, Work
from fedlearn.learning.local import initial_weights
from fedlearn.learning.task import build_model
from fedlearn.models.cnn import ImageNet
from fedlearn.models.recurrent import RecurrentNet
from fedlearn.models.transformer import CausalTransformer
from fedlearn.privacy.dpsgd import DpSgd
from fedlearn.privacy.ghost import GhostGradients
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.model_check import Path, check_model
from fedlearn.privacy.opacus import OpacusGradients
from fedlearn.privacy.plan import FixedClip, PoissonSampling, PrivacyPlan, Unit
from fedlearn.simulation.run import simulate
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.study import Study, parse_study
from strategies.fedavg import FedAvg
from tests.support.adapter_task import NAME, Adapted, AdaptedNet, AdapterTask

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
ADAPTERS = {"first.down.weight", "first.up.weight", "last.down.weight", "last.up.weight"}


def study_of(*overrides: str) -> Study:
    text = f"""
        name = "adapters"
        seed = 3
        rounds = 6
        task.name = "{NAME}"
        train.lr = 2.0
        [privacy]
        unit = "record"
        epsilon = 3.0
        delta = 1e-4
        units = 240
        sampling_rate = 0.2
        steps = 10
    """
    return parse_study(text, overrides)


def adapted_attention() -> nn.Module:
    """A transformer whose linear layers are frozen, each with an adapter; norms and tables are frozen too."""
    model = CausalTransformer(11, 6, width=8, heads=2, blocks=1).requires_grad_(requires_grad=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(module, 2))
    return model


def freeze(model: nn.Module, frozen: Callable[[str], bool]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad=not frozen(name))
    return model


def woken(model: nn.Module) -> nn.Module:
    """Adapters that are no longer zero, so that gradients go through both of their layers."""
    for name, parameter in model.named_parameters():
        if name.endswith("up.weight"):
            nn.init.normal_(parameter, std=0.3)
    return model


def biased_norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Unflatten(1, (8, 1)), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8, 3)
    )


def tokens() -> torch.Tensor:
    return torch.randint(11, (7, 6))


CASES = {
    "adapters": (lambda: woken(AdaptedNet()), lambda: torch.randn(7, 6)),
    "adapted attention": (lambda: woken(adapted_attention()), tokens),
    "head only": (
        lambda: freeze(ImageNet(1, 3, widths=(8, 16)), lambda n: not n.startswith("head")),
        lambda: torch.randn(7, 1, 8, 8),
    ),
    "biases only, of a CNN": (
        lambda: freeze(ImageNet(1, 3, widths=(8, 16)), lambda n: not n.endswith("bias")),
        lambda: torch.randn(7, 1, 8, 8),
    ),
    "weights only, of a CNN": (
        lambda: freeze(ImageNet(1, 3, widths=(8, 16)), lambda n: n.endswith("bias")),
        lambda: torch.randn(7, 1, 8, 8),
    ),
    "biases only, of sequences": (
        lambda: freeze(CausalTransformer(11, 6, width=8, heads=2, blocks=1), lambda n: not n.endswith("bias")),
        tokens,
    ),
    "weights only, of sequences": (lambda: freeze(RecurrentNet(11, 4, 6), lambda n: n.endswith("bias")), tokens),
    "biases only, of norms": (
        lambda: freeze(biased_norms(), lambda n: not n.endswith("bias")),
        lambda: torch.randn(7, 6),
    ),
    "weights only, of norms": (lambda: freeze(biased_norms(), lambda n: n.endswith("bias")), lambda: torch.randn(7, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_are_opacus_own(name):
    """Opacus' per-example gradients, clipped here by hand: norms are over what is trained alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule

    torch.manual_seed(7)
    make, data = CASES[name]
    model, x = make(), data()
    direction = torch.randn(model(x).shape)

    def losses() -> torch.Tensor:
        return (model(x) * direction).flatten(1).sum(1)

    wrapped = GradSampleModule(model, loss_reduction="sum")
    losses().sum().backward()
    each = {n: p.grad_sample.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    wrapped.to_standard_module()
    for p in model.parameters():
        p.grad = None
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    clip = float(norms.sort().values[3:5].mean())  # between the fourth and the fifth
    expected = {n: torch.tensordot((clip / norms).clamp(max=1.0), g, 1) for n, g in each.items()}
    for engine in (GhostGradients, OpacusGradients):
        found = engine(model)(losses, clip)
        assert found.unclipped == 4
        assert found.gradients.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(found.gradients[key], value, rtol=1e-5, atol=1e-5 * clip), (engine, key)


def test_only_what_trains_gets_noise_and_it_is_the_plans():
    plan = PrivacyPlan(Unit.RECORD, PoissonSampling(1e-9), FixedClip(0.5), 1.2, 1e-4, units=40, rounds=3, steps=4)
    model = Adapted(nn.Linear(300, 200), 64)
    before = model.base.weight.clone()
    noise = DpSgd(model, lambda _: torch.zeros(0), 5, plan, seeded_chance(1)).gradient()
    assert noise.keys() == {"down.weight", "up.weight"}
    drawn = torch.cat([n.flatten() for n in noise.values()]) * 1e-9 * 40
    assert float(drawn.std()) == pytest.approx(1.2 * 0.5, rel=0.02)
    assert torch.equal(model.base.weight, before)
    assert model.base.weight.grad is None


@pytest.mark.parametrize("unit", ["record", "client"])
def test_what_is_frozen_travels_nowhere(unit):
    extra = (
        ()
        if unit == "record"
        else ("privacy.sampling_rate=0.1", "privacy.steps=10", "privacy.unit=client", "privacy.units=3")
    )
    study, task = study_of("rounds=1", *extra), AdapterTask()
    backend = SequentialBackend(study, build_population(study, task), FedAvg())
    model = initial_weights(task, study)
    assert model.keys() == ADAPTERS
    replies = [*backend.fit(Work(1, 1, ("ada", "bob"), model, {}, "digest", {}, 1.0))]
    assert len(replies) == 2
    for reply in replies:
        assert isinstance(reply, Fitted)
        assert {key for arrays in reply.update.private.values() for key in arrays} == ADAPTERS


def test_adapters_learn_under_dp_in_a_study_and_the_rest_stays_to_the_bit():
    study = study_of()
    assert check_model(AdaptedNet(), torch.randn(4, 6)).path is Path.FAST
    result = simulate(study, backend="sequential")
    assert result.weights.keys() == ADAPTERS
    start = build_model(AdapterTask(), study.seed)
    for name, parameter in result.model.named_parameters():
        same = torch.equal(parameter, dict(start.named_parameters())[name])
        assert same == (name not in ADAPTERS), name
    rows = list(result.outcome.history)
    assert rows[-1]["metrics"]["accuracy"] > 0.8
    # Much more noise teaches nothing: it is the adapters' own training that is measured.
    noisy = simulate(study_of("privacy.epsilon=0.01"), backend="sequential")
    assert list(noisy.outcome.history)[-1]["metrics"]["accuracy"] < rows[-1]["metrics"]["accuracy"] - 0.1


def test_a_client_level_plan_noises_adapters_alone():
    more = ("privacy.sampling_rate=0.1", "privacy.steps=10", "privacy.unit=client", "privacy.units=3", "rounds=2")
    result = simulate(study_of(*more), backend="sequential")
    assert result.weights.keys() == ADAPTERS
    assert all(np.isfinite(array).all() for array in result.weights.values())
