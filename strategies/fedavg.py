"""FedAvg: the mean of what the clients learnt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fedlearn.learning.strategy import ServerState, apply_step
from fedlearn.learning.update import DELTA, Aggregate
from strategies.options import Configured


@dataclass(frozen=True)
class FedAvg(Configured):
    """Federated averaging.

    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1:

        x <- sum_k (n_k / n) y_k  =  x + sum_k (n_k / n) (y_k - x)

    with y_k the weights of client k after its local epochs, n_k its training examples and n their sum over the clients of the
    round. Clients release the difference, which is what can be clipped, noised and masked.
    """

    name: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "McMahan et al. 2017, algorithm 1"

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        return replace(state, model=apply_step(state.model, aggregate.means[DELTA]), round=state.round + 1)
