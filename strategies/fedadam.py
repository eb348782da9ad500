"""FedAdam: the server takes its steps with Adam's scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.adaptive import Adaptive, Doubles
from strategies.options import number


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """Adam at the server.

    Reddi et al. 2021, algorithm 2, line FedAdam; everything else in `Adaptive`:

        v_t = beta2 v_{t-1} + (1 - beta2) Delta_t^2

    Flower's FedAdam multiplies its steps by sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)) in round t = 1, 2, ..., which is neither in this paper nor
    Adam's own bias correction (that one has t in both exponents), and starts v at 0.
    """

    name: ClassVar[str] = "fedadam"
    paper: ClassVar[str] = "Reddi et al. 2021, algorithm 2"

    beta2: float = number(0.99, "decay of the second moment", low=0, below=1)

    def second_moment(self, v: Doubles, squared: Doubles) -> Doubles:
        return self.beta2 * v + (1 - self.beta2) * squared
