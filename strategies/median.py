"""Coordinate median: half of the clients may lie about a coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedlearn.aggregation.robust import coordinate_median
from strategies.robust import Robust

if TYPE_CHECKING:
    from fedlearn.aggregation.robust import Vector
    from fedlearn.aggregation.stack import UpdateStack


@dataclass(frozen=True)
class Median(Robust):
    """The median of each coordinate of the clients' differences.

    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", definition 1 and algorithm 1, option I:

        x <- x + med_k (y_k - x)

    Each client counts once, whatever number of examples it claims. With an even number of clients the median is the mean of the two
    middle values, as in Flower's FedMedian, which gives the same result.
    """

    name: ClassVar[str] = "median"
    paper: ClassVar[str] = "Yin et al. 2018, algorithm 1, option I"

    def centre(self, stack: UpdateStack) -> Vector:
        return coordinate_median(stack)
