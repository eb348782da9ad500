"""What the robust strategies share: one vote a client, and a refusal where there are too few for the promise."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedlearn.errors import UpdateError
from fedlearn.learning.update import DELTA, Release, Weighting
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedlearn.aggregation.robust import Vector
    from fedlearn.aggregation.stack import UpdateStack
    from fedlearn.arrays import Arrays


@dataclass(frozen=True)
class Robust(FedAvg):
    """Base of the strategies whose aggregate is no sum: x <- x + centre {y_k - x}.

    Each client counts once, whatever number of examples it claims.

    Class attributes:
        fewest: why `min_clients` is what it is, for the message that refuses fewer.
    """

    linear: ClassVar[bool] = False
    releases: ClassVar[tuple[Release, ...]] = (Release(DELTA, Weighting.UNIFORM),)
    fewest: ClassVar[str] = ""

    @abstractmethod
    def centre(self, stack: UpdateStack) -> Vector:
        """The robust centre of at least `min_clients` updates, shape (d,)."""

    def aggregate_stack(self, stack: UpdateStack) -> Arrays:
        if len(stack) < self.min_clients:
            raise UpdateError(
                f"{self.name}: got {len(stack)} updates, expected at least {self.min_clients}"
                + (f" ({self.fewest})" if self.fewest else ""),
                hint="let more clients take part, or change the strategy's options",
            )
        return stack.unflatten(self.centre(stack))
