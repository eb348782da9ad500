"""A federation of linear regressions, small enough to check by eye: our rules, torch gradients, the real sum and stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlearn.aggregation.linear import IntegerSum
from fedlearn.aggregation.stack import UpdateStack
from fedlearn.arrays import Array, Arrays, specs_of
from fedlearn.learning.strategy import ClientStart, Pass, ServerState, Strategy, Trained
from fedlearn.learning.update import DELTA, Aggregate, Weighting

FINE_BITS = 44
"""A quantum of 6e-14: its rounding does not show at 1e-10."""


@dataclass(frozen=True)
class Toy:
    """Clients with x of shape (n_k, features) and y of shape (n_k,); the loss is the mean of squares, halved."""

    x: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]

    @property
    def examples(self) -> list[int]:
        return [len(y) for y in self.y]


def make_toy(clients: int = 7, features: int = 3, seed: int = 1) -> Toy:
    """Clients that disagree: each has its own true weights, scale and number of examples."""
    rng = np.random.default_rng(seed)
    xs, ys = [], []
    for k in range(clients):
        x = rng.normal(size=(5 + 3 * k, features)) * (0.5 + 0.2 * k)
        xs.append(x)
        ys.append(x @ rng.normal(size=features) + rng.normal() + 0.1 * rng.normal(size=len(x)))
    return Toy(tuple(xs), tuple(ys))


def start_model(features: int = 3, dtype: str = "float64") -> dict[str, Array]:
    rng = np.random.default_rng(9)
    return {"w": rng.normal(size=features).astype(dtype), "b": np.array(rng.normal()).astype(dtype)}


def flat(model: Arrays) -> np.ndarray:
    """The named model as one vector: weights, then the intercept."""
    return np.append(model["w"], model["b"]).astype(np.float64)


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}


def arrays(mapping: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: t.detach().numpy().copy() for name, t in mapping.items()}


@dataclass
class Federation:
    """Runs a strategy on the toy, round by round.

    Args:
        strategy: the rules.
        toy: the clients' data.
        state: the server's state.
        clients: each client's memory by number.
        steps: local steps for each client; the local batch is all of its data.
        lr: local learning rate.
    """

    strategy: Strategy
    toy: Toy
    state: ServerState
    clients: dict[int, dict[str, Array]]
    steps: Sequence[int]
    lr: float

    @classmethod
    def of(cls, strategy: Strategy, toy: Toy, dtype: str = "float64", lr: float = 0.1) -> Federation:
        model = start_model(toy.x[0].shape[1], dtype)
        steps = [3 + k % 3 for k in range(len(toy.x))]
        return cls(strategy, toy, strategy.server_init(model), {k: {} for k in range(len(toy.x))}, steps, lr)

    def client_start(self, k: int) -> ClientStart:
        return ClientStart(tensors(self.state.model), tensors(self.state.shared), tensors(self.clients[k]))

    def fit(self, k: int) -> dict[str, dict[str, Array]]:
        """One client's releases; its memory is updated."""
        start = self.client_start(k)
        trained = {one.name: self._train(k, one) for one in self.strategy.client_passes(start)}
        finish = self.strategy.client_finish(start, trained)
        self.clients[k] = arrays(finish.state)
        return {name: arrays(release) for name, release in finish.releases.items()}

    def _train(self, k: int, one: Pass) -> Trained:
        weights = {name: w.clone() for name, w in one.initial.items()}
        x, y = torch.from_numpy(self.toy.x[k]).to(weights["w"].dtype), torch.from_numpy(self.toy.y[k])
        for _ in range(self.steps[k]):
            leaf = {name: w.clone().requires_grad_() for name, w in weights.items()}
            loss = ((x @ leaf["w"] + leaf["b"] - y.to(x.dtype)) ** 2).mean() / 2
            gradient = dict(zip(leaf, torch.autograd.grad(loss, list(leaf.values())), strict=True))
            along = gradient if one.direction is None else one.direction(gradient, weights)
            weights = {name: w - self.lr * along[name] for name, w in weights.items()}
        return Trained(weights, self.steps[k], self.lr)

    def round(self, cohort: Sequence[int]) -> None:
        """One round with these clients, in this order of arrival."""
        releases = {k: self.fit(k) for k in cohort}
        examples = self.toy.examples
        aggregate = combine(
            self.strategy, self.state.model, releases, {k: examples[k] for k in cohort}, population=len(self.toy.x)
        )
        self.state = self.strategy.server_step(self.state, aggregate)


def combine(
    strategy: Strategy,
    model: Arrays,
    releases: Mapping[int, Mapping[str, Arrays]],
    examples: Mapping[int, int],
    *,
    population: int,
    quantum_bits: int = FINE_BITS,
) -> Aggregate:
    """The aggregate of some clients' releases, through the real sum or the real stack."""
    total = sum(examples.values())
    if not strategy.linear:
        with UpdateStack(specs_of(model), block_bytes=64) as stack:
            for k, release in releases.items():
                stack.add(f"client-{k:03d}", release[DELTA], examples[k])
            return Aggregate({DELTA: strategy.aggregate_stack(stack)}, len(releases), population, total)
    means = {}
    for release in strategy.releases:
        running = IntegerSum(specs_of(model), quantum_bits)
        for k, update in releases.items():
            running.add(update[release.name], examples[k] if release.weighting is Weighting.EXAMPLES else 1)
        means[release.name] = running.mean()
    return Aggregate(means, len(releases), population, total)


def checkpointed(state: ServerState, through: Callable[[Arrays], dict[str, Array]]) -> ServerState:
    """The server's state after its arrays went to bytes and came back."""
    return replace(state, model=through(state.model), shared=through(state.shared), memory=through(state.memory))
