"""A strategy is two pure rules: what a client does besides plain SGD, and what becomes of the aggregate.

Both rules take named arrays and return named arrays; randomness, state and hyper-parameters are arguments; there is no I/O. So one
definition serves the sequential oracle, batched engines, the gRPC link and Flower.

Client rules are written with element-wise operations on torch tensors only. A leading client dimension on any of them
therefore broadcasts, and many clients can train as one batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedlearn.arrays import Arrays
from fedlearn.learning.update import DELTA, Aggregate, Release

if TYPE_CHECKING:
    import torch

    from fedlearn.aggregation.stack import UpdateStack

    Tensors = Mapping[str, torch.Tensor]
    Direction = Callable[[Tensors, Tensors], Tensors]


@dataclass(frozen=True)
class ClientStart:
    """What a client has before its first local step.

    Args:
        model: the global weights.
        shared: what the server sent beside them (SCAFFOLD's control variate).
        state: this client's own memory from earlier rounds; empty the first time. It never leaves the client.
    """

    model: Tensors
    shared: Tensors = field(default_factory=dict)
    state: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """One run of local training: where it starts, and how its gradient is turned.

    Args:
        name: `MAIN` for the pass whose result is released, and which a plan for records or groups makes noisy; the name also seeds the
            order of batches.
        initial: weights before the first step.
        direction: (gradient, weights) -> what the optimiser steps along. None for the plain gradient.
    """

    name: str
    initial: Tensors
    direction: Direction | None = None


@dataclass(frozen=True)
class Pull:
    """A direction in a known form: gradient + strength (weights - anchor).

    It is called like any other; a trainer that knows the form can do better than calling it.

    Args:
        anchor: the weights that training is pulled towards, by name.
        strength: how strongly; 0 for plain training.
    """

    anchor: Tensors
    strength: float

    def __call__(self, gradient: Tensors, weights: Tensors) -> Tensors:
        """The gradient of loss + strength / 2 ||weights - anchor||^2, from the gradient of the loss."""
        return {name: g + self.strength * (weights[name] - self.anchor[name]) for name, g in gradient.items()}


@dataclass(frozen=True)
class Trained:
    """A finished pass.

    Args:
        weights: after the last step.
        steps: optimiser steps taken; shape (clients,) where many clients trained as one batch.
        lr: the local learning rate; shape (clients,) likewise.
    """

    weights: Tensors
    steps: int | torch.Tensor
    lr: float | torch.Tensor


@dataclass(frozen=True)
class ClientFinish:
    """What a client has after its last local step: what is released, and what it keeps."""

    releases: Mapping[str, Tensors]
    state: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """Everything the server must keep between rounds; its arrays are the checkpoint.

    Args:
        model: global weights.
        shared: broadcast beside the model.
        memory: the server rule's own (momenta); never leaves the server.
        round: rounds committed so far.
    """

    model: Arrays = field(repr=False)
    shared: Arrays = field(default_factory=dict, repr=False)
    memory: Arrays = field(default_factory=dict, repr=False)
    round: int = 0


MAIN = "global"
"""The pass whose result is released."""


@dataclass(frozen=True)
class Strategy(ABC):
    """Base of all strategies: a frozen dataclass whose fields are its hyper-parameters.

    The defaults here are FedAvg's client rule: train from the global weights, release the difference.

    Class attributes:
        name: as in a study.
        paper: authors, year, and the equation or algorithm that is implemented.
        linear: True when the aggregate is a weighted sum, so that it composes with secure aggregation and central noise.
        releases: everything that leaves a client, in order. A privacy plan clips them jointly.
        stateful: True when a client keeps memory between rounds (`ClientFinish.state`).
        raw_gradient_state: True when something that is released depends on raw gradients by way of the client's state, or of another pass
            than `MAIN` (refused under a plan for records or groups). Only `MAIN` is trained by DP-SGD then; every other pass takes
            plain steps on raw rows, and so is raw whatever this says. That is allowed as long as its weights, its number of steps and
            all state that follows from them stay at the client: where MAIN starts, how its gradients are turned, and what is
            released must not depend on them, in any round. So for Ditto it is False: its own model is raw, and never leaves. For
            SCAFFOLD it is False: its state follows from MAIN's noisy steps alone. tests/unit/privacy/test_taint.py holds every strategy to it.
        plain_sgd: True when the client rule is only right for SGD without momentum at a constant learning rate.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    linear: ClassVar[bool] = True
    releases: ClassVar[tuple[Release, ...]] = (Release(DELTA),)
    stateful: ClassVar[bool] = False
    raw_gradient_state: ClassVar[bool] = False
    plain_sgd: ClassVar[bool] = False

    # The client rule.

    def client_passes(self, start: ClientStart) -> tuple[Pass, ...]:
        """The passes of local training, in order; exactly one is named `MAIN`."""
        return (Pass(MAIN, start.model),)

    def client_finish(self, start: ClientStart, trained: Mapping[str, Trained]) -> ClientFinish:
        """What is released and kept, from the finished passes by name."""
        return ClientFinish({DELTA: subtract(trained[MAIN].weights, start.model)})

    def client_model(self, start: ClientStart) -> Tensors:
        """The weights that this client would use and evaluate: the global ones, unless the strategy personalises.

        Under a privacy plan an evaluation is of the global ones in any case: these may be raw.
        """
        return start.model

    # The server rule.

    def server_init(self, model: Arrays) -> ServerState:
        """The state before the first round."""
        return ServerState(model=model)

    @abstractmethod
    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The state after a round. Computes in float64 and returns the model in its own dtypes."""

    def aggregate_stack(self, stack: UpdateStack) -> Arrays:  # noqa: ARG002  # linear strategies have no use for it
        """For strategies with `linear = False`: the robust centre of the clients' deltas."""
        raise TypeError(f"{self.name} is linear: its updates are summed, not stacked")

    @property
    def min_clients(self) -> int:
        """Fewest updates that the server rule can work with; a round with fewer is void."""
        return 1

    @property
    def options(self) -> Mapping[str, Any]:
        """Hyper-parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def subtract(a: Tensors, b: Tensors) -> Tensors:
    """a - b, array by array."""
    return {name: a[name] - b[name] for name in b}


def per_client(value: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """A number, or one number for each client, shaped so that it broadcasts against `like`, shape (clients, ...)."""
    if isinstance(value, int | float):
        return value
    return value.to(like.dtype).reshape(value.shape + (1,) * (like.ndim - value.ndim))


def apply_step(model: Arrays, step: Arrays) -> Arrays:
    """model + step, computed in float64 and returned in the model's dtypes; integers are rounded, half to even."""
    return {name: _cast(w.astype(np.float64) + step[name].astype(np.float64), w.dtype) for name, w in model.items()}


def _cast(values: npt.NDArray[np.float64], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    # numpy makes a bare number of a sum of arrays without dimensions; a model holds arrays.
    return np.asarray(np.rint(values) if dtype.kind in "iu" else values, dtype=dtype)
