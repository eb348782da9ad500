"""FedYogi: as FedAdam, with a second moment that moves by bounded steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from strategies.adaptive import Adaptive, Doubles
from strategies.options import number


@dataclass(frozen=True)
class FedYogi(Adaptive):
    """Yogi at the server.

    Reddi et al. 2021, algorithm 2, line FedYogi; everything else in `Adaptive`:

        v_t = v_{t-1} - (1 - beta2) Delta_t^2 sign(v_{t-1} - Delta_t^2)

    Flower's FedYogi starts v at 0; `v0 = 0` gives its steps.
    """

    name: ClassVar[str] = "fedyogi"
    paper: ClassVar[str] = "Reddi et al. 2021, algorithm 2"

    beta2: float = number(0.99, "decay of the second moment", low=0, below=1)

    def second_moment(self, v: Doubles, squared: Doubles) -> Doubles:
        return v - (1 - self.beta2) * squared * np.sign(v - squared)
