"""SCAFFOLD: control variates correct each client's drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from fedlearn.arrays import Arrays
from fedlearn.learning.strategy import (
    MAIN,
    ClientFinish,
    ClientStart,
    Pass,
    ServerState,
    Trained,
    apply_step,
    per_client,
    subtract,
)
from fedlearn.learning.update import DELTA, Aggregate, Release, Weighting
from strategies.options import Configured, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fedlearn.learning.strategy import Tensors

CONTROL: Final = "control"
"""The second release: how far the client's control variate has moved."""


@dataclass(frozen=True)
class Scaffold(Configured):
    """Stochastic controlled averaging.

    Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", algorithm 1 with option II for the control
    variates. x are the global weights, c the server's control variate, c_i that of client i, both 0 at first:

        local step   y <- y - eta_l (g_i(y) - c_i + c),  K times from y = x
        client end   c_i+ = c_i - c + (x - y) / (K eta_l)
        released     y - x   and   c_i+ - c_i
        server       x <- x + eta_g / |S| sum (y_i - x),   c <- c + |S| / N * mean (c_i+ - c_i)

    S are the clients of the round, N all clients of the study. Both means count each client once, as in the paper: N's c is the mean of
    all c_i only then.

    Option II needs plain SGD at a constant rate: only then is (x - y) / (K eta_l) the mean of the directions taken (`plain_sgd`). A
    client that took no step leaves its control variate as it is.

    What it means for privacy. c_i is made from differences of weights, not from gradients: under record-level DP-SGD it is
    computed from noised steps only, so keeping and releasing it is post-processing and `raw_gradient_state` is False (option I would
    need a pass of plain gradients, which is why it is not offered). Under a client-level plan the two releases are one vector and are
    clipped together; c_i itself is not clipped, never leaves the client, and the server's c is then no longer the mean of all c_i.
    """

    name: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "Karimireddy et al. 2020, algorithm 1, option II"
    releases: ClassVar[tuple[Release, ...]] = (Release(DELTA, Weighting.UNIFORM), Release(CONTROL, Weighting.UNIFORM))
    stateful: ClassVar[bool] = True
    raw_gradient_state: ClassVar[bool] = False
    plain_sgd: ClassVar[bool] = True

    server_lr: float = number(1.0, "server learning rate eta_g", above=0)

    def client_passes(self, start: ClientStart) -> tuple[Pass, ...]:
        correction = subtract(start.shared, _own_control(start))

        def direction(gradient: Tensors, weights: Tensors) -> Tensors:  # noqa: ARG001  # the pull is constant
            return {name: g + correction[name] for name, g in gradient.items()}

        return (Pass(MAIN, start.model, direction),)

    def client_finish(self, start: ClientStart, trained: Mapping[str, Trained]) -> ClientFinish:
        main = trained[MAIN]
        delta = subtract(main.weights, start.model)
        moved = {name: _control_change(d, start.shared[name], main) for name, d in delta.items()}
        own = _own_control(start)
        return ClientFinish({DELTA: delta, CONTROL: moved}, {name: own[name] + moved[name] for name in moved})

    def server_init(self, model: Arrays) -> ServerState:
        return ServerState(model=model, shared={name: np.zeros_like(weights) for name, weights in model.items()})

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        share = aggregate.clients / aggregate.population
        return ServerState(
            model=apply_step(state.model, _scaled(aggregate.means[DELTA], self.server_lr)),
            shared=apply_step(state.shared, _scaled(aggregate.means[CONTROL], share)),
            memory=state.memory,
            round=state.round + 1,
        )


def _own_control(start: ClientStart) -> Tensors:
    return start.state or {name: weights.new_zeros(weights.shape) for name, weights in start.model.items()}


def _control_change(delta: torch.Tensor, server_control: torch.Tensor, main: Trained) -> torch.Tensor:
    """c_i+ - c_i = -c - delta / (K eta_l); zero where K is 0."""
    steps, lr = per_client(main.steps, delta), per_client(main.lr, delta)
    idle = steps == 0
    # As few passes over memory as there can be: with many clients at once these are the largest arrays of a round.
    change: torch.Tensor = (delta / (-(steps + idle) * lr)).sub_(server_control)
    if isinstance(idle, bool):
        return change * (1 - int(idle))
    return change * ~idle if bool(idle.any()) else change


def _scaled(arrays: Arrays, factor: float) -> Arrays:
    return {name: array.astype(np.float64) * factor for name, array in arrays.items()}
