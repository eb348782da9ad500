"""FedProx: local training is pulled back towards the global weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedlearn.learning.strategy import MAIN, ClientStart, Pass, Pull
from strategies.fedavg import FedAvg
from strategies.options import number


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term.

    Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2 and algorithm 2. Client k minimises

        h_k(w; x) = F_k(w) + mu / 2 * ||w - x||^2,    so each step goes along    grad F_k(w) + mu (w - x)

    with x the global weights as they were broadcast. With mu = 0 this is FedAvg. Clients are weighted by their examples, as in the
    paper's objective (its equation 1); the paper's own sampling scheme draws them with that probability instead.
    """

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al. 2020 (MLSys), equation 2 and algorithm 2"

    mu: float = number(0.01, "strength of the pull towards the global weights", low=0)

    def client_passes(self, start: ClientStart) -> tuple[Pass, ...]:
        return (Pass(MAIN, start.model, Pull(start.model, self.mu)),)
