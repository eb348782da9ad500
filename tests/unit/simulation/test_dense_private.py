"""DP-SGD on stacked matrices: the same batches, noise, clips and weights as one client at a time, and as Opacus."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedlearn.learning.local import trainable
from fedlearn.learning.strategy import Pull
from fedlearn.learning.task import Batch
from fedlearn.privacy.clipping import denominator
from fedlearn.privacy.dpsgd import DpSgd
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import AdaptiveClip, FixedClip, PoissonSampling, PrivacyPlan, Unit
from fedlearn.privacy.site import SitePlan
from fedlearn.privacy.steps import NoisySteps
from fedlearn.simulation import dense
from fedlearn.simulation.blocks import Block
from fedlearn.simulation.chain import Chain, chain_of
from fedlearn.simulation.dense import DenseTrainer
from fedlearn.study import TrainTable

FEATURES, CLASSES, LR = 5, 3, 0.3
PLAN = PrivacyPlan(Unit.RECORD, PoissonSampling(0.4), FixedClip(0.5), 0.8, 1e-3, units=12, rounds=1, steps=3)


class Classes:
    """The part of a task that a trainer needs."""

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, y, reduction="none")


@dataclass
class World:
    """A block of clients, a model, and both ways to train it."""

    model: nn.Module
    block: Block
    plans: tuple[PrivacyPlan, ...]
    groups: bool = False
    direction: Pull | None = None

    def sites(self) -> list[SitePlan]:
        return [
            SitePlan(plan, self.chance(client), self.group(batch))
            for client, batch, plan in zip(self.block.clients, self.block.data, self.plans, strict=True)
        ]

    def chance(self, client: str):
        return seeded_chance(self.block.seed, "dp", self.block.round, client)

    def group(self, batch: Batch):
        return np.arange(len(batch)) // 3 if self.groups else None

    def stacked(self, **options):
        chain = chain_of(self.model)
        assert isinstance(chain, Chain)
        trainer = DenseTrainer(Classes(), self.model, chain, TrainTable(lr=LR, **options))
        initial = {name: p.detach() for name, p in trainable(self.model).items()}
        return trainer.run_private(initial, self.direction, self.block, self.sites())

    def one(self, i: int, momentum: float = 0.0):
        """The oracle: a client's final weights in one vector, and its tally."""
        model, batch = copy.deepcopy(self.model), self.block.data[i]
        dtype = next(model.parameters()).dtype
        x, y = torch.from_numpy(batch.x).to(dtype), torch.from_numpy(batch.y)
        dp = DpSgd(
            model,
            lambda rows: Classes().loss(model(x[rows]), y[rows]),
            len(batch),
            self.plans[i],
            self.chance(self.block.clients[i]),
            groups=self.group(batch),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
        for _ in range(self.plans[i].steps):
            gradient = dp.gradient()
            if self.direction is not None:
                gradient = self.direction(gradient, {name: p.detach() for name, p in model.named_parameters()})
            for name, parameter in model.named_parameters():
                parameter.grad = gradient[name]
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]), dp.tally


def world(sizes, plans, *, seed=1, hidden=(4,), activation=nn.Tanh, bias=True, flat=True, dtype=torch.float32, **more):
    torch.manual_seed(seed)
    layers: list[nn.Module] = [] if flat else [nn.Flatten()]
    widths = [FEATURES if flat else 2 * FEATURES, *hidden]
    for before, after in zip(widths, hidden, strict=False):
        layers += [nn.Linear(before, after, bias=bias), activation()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES, bias=bias)).to(dtype)
    g = np.random.default_rng(seed)
    shape = (FEATURES,) if flat else (2, FEATURES)
    data = tuple(Batch(g.standard_normal((n, *shape), dtype=np.float32), g.integers(CLASSES, size=n)) for n in sizes)
    block = Block(seed, 2, tuple(f"c{i}" for i in range(len(sizes))), data)
    return World(model, block, tuple(plans), **more)


def assert_as_one_at_a_time(made: World, momentum: float = 0.0) -> None:
    found = made.stacked(momentum=momentum)
    bound = 1e-10 if found.weights.dtype == torch.float64 else 1e-5
    for i in range(len(made.plans)):
        weights, tally = made.one(i, momentum)
        assert float((found.weights[i] - weights).norm() / weights.norm()) <= bound
        assert found.tallies[i] == tally
        assert found.loss_counts[i] == tally.examples - tally.not_finite


CLIPS = (FixedClip(1e-3), FixedClip(0.5), FixedClip(1e6), AdaptiveClip(0.7, count_share=0.3))


@given(
    clients=st.lists(
        st.tuples(
            st.integers(1, 14), st.integers(1, 4), st.sampled_from([1e-9, 0.05, 0.5, 1.0]), st.sampled_from(CLIPS)
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 50),
    hidden=st.lists(st.integers(1, 7), max_size=2),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU]),
    bias=st.booleans(),
    flat=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    noise=st.sampled_from([1e-6, 0.8]),
    groups=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_client_is_trained_as_if_alone(clients, noise, groups, **options):
    clients = sorted(clients, key=lambda one: -one[1])
    unit = Unit.GROUP if groups else Unit.RECORD
    plans = [
        replace(
            PLAN, unit=unit, units=n, steps=steps, sampling=PoissonSampling(rate), clipping=clip, noise_multiplier=noise
        )
        for n, steps, rate, clip in clients
    ]
    assert_as_one_at_a_time(world([n for n, *_ in clients], plans, groups=groups, **options))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("row", [0, 3])
def test_what_is_not_finite_contributes_zero(bad, row):
    made = world([6, 6, 4], [replace(PLAN, units=6, sampling=PoissonSampling(0.7))] * 3, activation=nn.ReLU)
    clean = made.stacked()
    made.block.data[1].x[row, 2] = bad
    found = made.stacked()
    assert_as_one_at_a_time(made)
    assert found.weights.isfinite().all()
    assert found.tallies[1].not_finite > 0 == found.tallies[0].not_finite
    torch.testing.assert_close(found.weights[[0, 2]], clean.weights[[0, 2]])
    assert np.isfinite(found.loss_sums).all()


def test_nobody_drawn_is_a_step_of_noise():
    made = world([5, 3], [replace(PLAN, sampling=PoissonSampling(1e-9))] * 2)
    found = made.stacked()
    assert [t.empty for t in found.tallies] == [3, 3]
    assert found.loss_counts.tolist() == [0, 0]
    assert len(found.weights.unique()) == found.weights.numel(), "everybody's noise is its own"
    assert_as_one_at_a_time(made)


def test_momentum_runs_over_noisy_gradients():
    made = world([8, 8], [replace(PLAN, units=8)] * 2)
    assert_as_one_at_a_time(made, momentum=0.9)
    assert float((made.stacked().weights - made.stacked(momentum=0.9).weights).norm()) > 0.01


def test_a_rule_turns_the_noisy_gradient():
    made = world([8, 5], [replace(PLAN, units=8)] * 2)
    plain = made.stacked()
    made.direction = Pull({name: p.detach() + 1.0 for name, p in made.model.named_parameters()}, 0.5)
    assert_as_one_at_a_time(made)
    assert float((made.stacked().weights - plain.weights).norm()) > 0.01


def test_a_batch_of_any_size_is_worked_off_in_parts(monkeypatch):
    made = world([40, 31, 2], [replace(PLAN, units=30, clipping=AdaptiveClip(0.3))] * 3, dtype=torch.float64)
    whole = made.stacked()
    monkeypatch.setattr(dense, "PART_ROWS", 9)
    parts = made.stacked()
    torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-12, atol=1e-12)
    assert parts.tallies == whole.tallies
    np.testing.assert_array_equal(parts.loss_counts, whole.loss_counts)
    np.testing.assert_allclose(parts.loss_sums, whole.loss_sums)


@pytest.mark.parametrize("change", [slice(1, None), slice(None, None, -1)])
def test_sites_that_are_not_the_blocks_are_refused(change):
    made = world([5, 3], [replace(PLAN, steps=4), PLAN])
    chain = chain_of(made.model)
    trainer = DenseTrainer(Classes(), made.model, chain, TrainTable())
    with pytest.raises(ValueError, match="sites"):
        trainer.run_private(dict(made.model.named_parameters()), None, made.block, made.sites()[change])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_every_step_is_opacus_given_the_same_batches_and_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

    made = world([14, 9], [replace(PLAN, units=10)] * 2, hidden=(6, 4), activation=nn.ReLU)
    found = made.stacked()
    for i, (private, batch) in enumerate(zip(made.sites(), made.block.data, strict=True)):
        site = NoisySteps(len(batch), private.plan, private.chance)

        class Given(DPOptimizer):
            """Opacus' own clipping and step, with noise that is handed to it."""

            def add_noise(self, site=site) -> None:
                zeros = [np.zeros(p.shape, np.float32) for p in self.params]
                site.release(zeros, unclipped=0, not_finite=0)  # noise / denominator
                for p, noise in zip(self.params, zeros, strict=True):
                    p.grad = p.summed_grad.view_as(p) + torch.from_numpy(noise) * denominator(site.plan)

        model = GradSampleModule(copy.deepcopy(made.model))
        sgd = torch.optim.SGD(model.parameters(), lr=LR)
        optimizer = Given(sgd, noise_multiplier=1.0, max_grad_norm=0.5, expected_batch_size=denominator(site.plan))
        x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        for _ in range(site.plan.steps):
            rows = site.draw()
            assert len(rows)
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert float((found.weights[i] - weights).norm() / weights.norm()) <= 1e-5
