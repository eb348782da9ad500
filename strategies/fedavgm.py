"""FedAvgM: the server takes its steps with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlearn.arrays import Arrays
from fedlearn.learning.strategy import ServerState, apply_step
from fedlearn.learning.update import DELTA, Aggregate
from strategies.memory import constant, pack, unpack
from strategies.options import Configured, number


@dataclass(frozen=True)
class FedAvgM(Configured):
    """FedAvg with server momentum.

    Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification" (FedAvgM); with a
    server learning rate eta as in Reddi et al. 2021, algorithm 1 with SGD with momentum as the server's optimiser:

        v <- beta v + Delta,    x <- x + eta v,    v = 0 at first

    Delta is the weighted mean of the clients' differences. With beta = 0 and eta = 1 this is FedAvg.

    Flower's FedAvgM computes the same, but pairs tensors by position: replies whose tensors come in another order than the model's are mixed
    up. Here they are paired by name.
    """

    name: ClassVar[str] = "fedavgm"
    paper: ClassVar[str] = "Hsu et al. 2019; Reddi et al. 2021, algorithm 1"

    server_lr: float = number(1.0, "server learning rate eta", above=0)
    momentum: float = number(0.9, "server momentum beta", low=0, below=1)

    def server_init(self, model: Arrays) -> ServerState:
        return ServerState(model=model, memory=pack(momentum=constant(model, 0.0)))

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        velocity = {
            name: self.momentum * v + aggregate.means[DELTA][name].astype(np.float64)
            for name, v in unpack(state.memory, "momentum", state.model).items()
        }
        step = {name: self.server_lr * v for name, v in velocity.items()}
        return ServerState(apply_step(state.model, step), state.shared, pack(momentum=velocity), state.round + 1)
