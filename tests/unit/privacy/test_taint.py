"""Under a plan for records only the MAIN pass is noisy: nothing of the other passes may reach what is released, in no round.

Two federations of one client in step: the same noisy MAIN passes, but in the second the other passes end wherever they like. Whatever
a strategy keeps may differ between the two; what it starts MAIN from, how it turns MAIN's gradients, and what it releases may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import strategies
from fedlearn.errors import UnsupportedError
from fedlearn.learning.strategy import MAIN, ClientFinish, ClientStart, Pass, Strategy, Trained, subtract
from fedlearn.learning.update import DELTA, Aggregate
from fedlearn.privacy.plan import FixedClip, PoissonSampling, PrivacyPlan, Unit
from strategies.ditto import PERSONAL, Ditto
from strategies.fedavg import FedAvg

MODEL = {"layer.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "layer.bias": np.ones(2, np.float32)}
PLAN = PrivacyPlan(Unit.RECORD, PoissonSampling(0.1), FixedClip(1.0), 1.0, 1e-5, 100, 4, 3)
STEPS, ROUNDS = 3, 4


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def train(one: Pass, noise: torch.Generator) -> Trained:
    """The steps of a pass: gradients that depend on the weights, and noise; both turned by the strategy."""
    weights = {name: w.clone() for name, w in one.initial.items()}
    for _ in range(STEPS):
        gradient = {n: 0.3 * w + torch.randn(w.shape, generator=noise) for n, w in weights.items()}
        step = gradient if one.direction is None else one.direction(gradient, weights)
        weights = {name: w - 0.1 * step[name] for name, w in weights.items()}
    return Trained(weights, STEPS, 0.1)


def released(strategy: Strategy, others: int) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """What a client releases, round after round; `others` seeds the passes that are not MAIN, and how many steps they take."""
    state, server = {}, strategy.server_init(MODEL)
    for number in range(ROUNDS):
        start = ClientStart(tensors(server.model), tensors(server.shared), state)
        trained = {}
        for one in strategy.client_passes(start):
            seed = number if one.name == MAIN else 1_000 * others + number
            done = train(one, torch.Generator().manual_seed(seed))
            trained[one.name] = done if one.name == MAIN else Trained(done.weights, STEPS + others, done.lr)
        finish = strategy.client_finish(start, trained)
        sent = {
            release: {n: t.numpy().copy() for n, t in arrays.items()} for release, arrays in finish.releases.items()
        }
        yield sent
        state = finish.state
        if strategy.linear:
            server = strategy.server_step(server, Aggregate(sent, 1, 1, 2))


def differ(strategy: Strategy) -> bool:
    pairs = zip(released(strategy, 1), released(strategy, 2), strict=True)
    return any(
        one[release][name].tobytes() != other[release][name].tobytes()
        for one, other in pairs
        for release in one
        for name in one[release]
    )


@pytest.mark.parametrize("name", strategies.names())
def test_nothing_that_is_released_depends_on_another_pass(name):
    strategy = strategies.create(name)
    PLAN.check_strategy(strategy)
    assert not differ(strategy)


@dataclass(frozen=True)
class Releases(Ditto):
    """Releases its own model."""

    name: ClassVar[str] = "releases"

    def client_finish(self, start, trained):
        return ClientFinish({DELTA: subtract(trained[PERSONAL].weights, start.model)}, trained[PERSONAL].weights)


@dataclass(frozen=True)
class Remembers(Ditto):
    """Starts the next round's MAIN pass from its own model: a round later it is released."""

    name: ClassVar[str] = "remembers"

    def client_passes(self, start):
        _, personal = super().client_passes(start)
        return (Pass(MAIN, self.client_model(start)), personal)


@dataclass(frozen=True)
class Counts(FedAvg):
    """Divides by another pass's steps."""

    name: ClassVar[str] = "counts"

    def client_passes(self, start):
        return (Pass(MAIN, start.model), Pass("beside", start.model))

    def client_finish(self, start: ClientStart, trained: Mapping[str, Trained]) -> ClientFinish:
        delta = subtract(trained[MAIN].weights, start.model)
        return ClientFinish({DELTA: {n: d / trained["beside"].steps for n, d in delta.items()}})


@pytest.mark.parametrize("leaky", [Releases(), Remembers(), Counts()], ids=lambda s: s.name)
def test_a_planted_leak_is_found(leaky):
    assert differ(leaky)


def test_a_strategy_that_says_so_is_refused():
    @dataclass(frozen=True)
    class Raw(Remembers):
        name: ClassVar[str] = "raw"
        raw_gradient_state: ClassVar[bool] = True

    with pytest.raises(UnsupportedError, match="memory made of raw gradients"):
        PLAN.check_strategy(Raw())
