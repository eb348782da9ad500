"""The rule that FedAdagrad, FedAdam and FedYogi share: a step scaled coordinate by coordinate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlearn.arrays import Arrays
from fedlearn.learning.strategy import ServerState, apply_step
from fedlearn.learning.update import DELTA, Aggregate
from strategies.memory import constant, pack, unpack
from strategies.options import Configured, number

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Adaptive(Configured):
    """Base of the adaptive server rules.

    Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2:

        m_t = beta1 m_{t-1} + (1 - beta1) Delta_t,    m = 0 at first
        v_t = one of three rules (`second_moment`),   v >= tau^2 at first
        x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau)

    Delta_t is the mean of the clients' differences, weighted by examples (as in the paper's experiments; its algorithm writes the plain
    mean). There is no bias correction in the paper, and none here. v starts at tau^2, the smallest value that the paper allows;
    `v0` sets another.

    Flower's FedAdam, FedYogi and FedAdagrad start v at 0, which makes the first steps larger: `v0 = 0` gives theirs.
    """

    server_lr: float = number(0.01, "server learning rate eta", above=0)
    beta1: float = number(0.9, "decay of the first moment", low=0, below=1)
    tau: float = number(1e-3, "adaptivity: the smaller, the more the steps of coordinates are evened out", above=0)
    v0: float | None = number(None, "second moment before the first round; none for tau squared", low=0)

    @abstractmethod
    def second_moment(self, v: Doubles, squared: Doubles) -> Doubles:
        """v_t from v_{t-1} and Delta_t^2."""

    def server_init(self, model: Arrays) -> ServerState:
        v = self.tau**2 if self.v0 is None else self.v0
        return ServerState(model=model, memory=pack(m=constant(model, 0.0), v=constant(model, v)))

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        delta = {name: array.astype(np.float64) for name, array in aggregate.means[DELTA].items()}
        m = {
            name: self.beta1 * old + (1 - self.beta1) * delta[name]
            for name, old in unpack(state.memory, "m", state.model).items()
        }
        v = {
            name: self.second_moment(old, np.square(delta[name]))
            for name, old in unpack(state.memory, "v", state.model).items()
        }
        step = {name: self.server_lr * m[name] / (np.sqrt(v[name]) + self.tau) for name in m}
        return ServerState(apply_step(state.model, step), state.shared, pack(m=m, v=v), state.round + 1)
