"""Krum and Multi-Krum: keep the updates that have the most company."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedlearn.aggregation.robust import mean_of_rows, select_krum
from strategies.options import integer
from strategies.robust import Robust

if TYPE_CHECKING:
    from fedlearn.aggregation.robust import Vector
    from fedlearn.aggregation.stack import UpdateStack


@dataclass(frozen=True)
class Krum(Robust):
    """The one update that is closest to its neighbours.

    Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", section 4. With n updates V_i of
    which f may be an attacker's,

        s(i) = sum of ||V_i - V_j||^2 over the n - f - 2 closest other updates j,    x <- x + V_i* with the lowest s(i*)

    Ties go to the smallest client id. n >= 2 f + 3 must hold; fewer updates are refused.

    Flower's Krum gives the same choice on well-conditioned replies, but does not check n; it takes the first of the sorted distances to be a
    reply's own; and it computes distances between whole models as ||a||^2 + ||b||^2 - 2ab in the model's precision, which in float32 loses
    updates that are small beside the weights.
    """

    name: ClassVar[str] = "krum"
    paper: ClassVar[str] = "Blanchard et al. 2017, section 4"
    fewest: ClassVar[str] = "2 byzantine + 3"

    byzantine: int = integer(1, "f: how many clients may be an attacker's", low=0)

    @property
    def min_clients(self) -> int:
        return 2 * self.byzantine + 3

    def centre(self, stack: UpdateStack) -> Vector:
        (best,) = select_krum(stack, self.byzantine, 1)
        return stack.row(best)


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the updates with the lowest Krum scores.

    Blanchard et al. 2017, Multi-Krum (experimental evaluation): scores as in Krum, then the plain mean of the m best. m = 1 is Krum; m = n - f by default,
    as in the paper's experiments. m above n - f is refused: it must include an attacker's update where there are f.

    Flower's MultiKrum weights the m replies by the number of examples that they claim, which hands the choice back to who claims most.
    """

    name: ClassVar[str] = "multi_krum"
    paper: ClassVar[str] = "Blanchard et al. 2017, Multi-Krum"
    fewest: ClassVar[str] = "2 byzantine + 3, and select + byzantine"

    select: int | None = integer(None, "m: how many updates are averaged; none for n - byzantine", low=1)

    @property
    def min_clients(self) -> int:
        return max(super().min_clients, (self.select or 0) + self.byzantine)

    def centre(self, stack: UpdateStack) -> Vector:
        select = len(stack) - self.byzantine if self.select is None else self.select
        return mean_of_rows(stack, select_krum(stack, self.byzantine, select))
