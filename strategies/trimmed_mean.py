"""Trimmed mean: the extremes of each coordinate are left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar

from fedlearn.aggregation.robust import trimmed_mean
from strategies.options import number
from strategies.robust import Robust

if TYPE_CHECKING:
    from fedlearn.aggregation.robust import Vector
    from fedlearn.aggregation.stack import UpdateStack


@dataclass(frozen=True)
class TrimmedMean(Robust):
    """The mean of each coordinate without its smallest and largest values.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definition 2 and algorithm 1, option II:

        x <- x + trmean_beta {y_k - x},    floor(beta n) values left out on each side

    It withstands as many attackers as are left out on one side. Each client counts once. beta n is taken of beta as it is written in
    the study: 0.29 of 100 clients is 29. Where nothing would be left out although beta > 0, the round is refused, because a plain mean
    under this name protects nobody.

    Flower's FedTrimmedAvg takes beta n in binary floating point (0.29 of 100 is 28), and trims nothing without a word where n < 1 / beta.
    """

    name: ClassVar[str] = "trimmed_mean"
    paper: ClassVar[str] = "Yin et al. 2018, algorithm 1, option II"
    fewest: ClassVar[str] = "1 / beta: of fewer, none would be left out"

    beta: float = number(0.2, "fraction of the clients left out on each side of each coordinate", low=0, below=0.5)

    @property
    def min_clients(self) -> int:
        return math.ceil(1 / self._fraction) if self.beta > 0 else 1

    def centre(self, stack: UpdateStack) -> Vector:
        return trimmed_mean(stack, math.floor(self._fraction * len(stack)))

    @property
    def _fraction(self) -> Fraction:
        return Fraction(repr(self.beta))
