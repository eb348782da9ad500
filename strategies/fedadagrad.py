"""FedAdagrad: steps shrink as squared updates add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.adaptive import Adaptive, Doubles
from strategies.options import number


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """Adagrad at the server.

    Reddi et al. 2021, algorithm 2, line FedAdagrad; everything else in `Adaptive`:

        v_t = v_{t-1} + Delta_t^2

    beta1 is 0 by default, as in the paper's experiments. Flower's FedAdagrad has beta1 = 0 always and starts v at 0.
    """

    name: ClassVar[str] = "fedadagrad"
    paper: ClassVar[str] = "Reddi et al. 2021, algorithm 2"

    server_lr: float = number(0.1, "server learning rate eta", above=0)
    beta1: float = number(0.0, "decay of the first moment", low=0, below=1)

    def second_moment(self, v: Doubles, squared: Doubles) -> Doubles:
        return v + squared
