"""Noise that clients add together, as a plan knows it: before there is a model, and so before the number of parameters is known.

`DistributedPlan` has everything for vectors of one length. What it costs depends on that length, but hardly: the steps are so fine that the L2 sensitivity
is at least `LEAST_SENSITIVITY` of them for every length, and the published bound (`rdp._skellam`) with l1 = l2^2 falls with it. So the event at that
sensitivity costs at least what any length costs: a site can be charged, and a study be calibrated, without its model. It is 1e-4 / z^2 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fedlearn.privacy.events import Skellam

LEAST_SENSITIVITY: Final = 100.0
"""Integer units; the smallest is 127, of a single number."""
LEVELS: Final = 3
"""The most at which surplus noise is taken off: each is drawn and, for each client, taken off apart."""


@dataclass(frozen=True)
class NoiseShares:
    """Who adds noise.

    Args:
        clients: the most of a round.
        survivors: the fewest whose sum is opened.
        adversarial: the fraction that may work with the server, and adds no noise.
        dropout: the fraction that may vanish.
        surplus: whether noise is taken off where more survive.
        malicious: whether the survivors are agreed upon, so that nobody is told of others than are in the sum.

    Raises:
        StudyError: nobody honest is sure to be in a sum.
    """

    clients: int
    survivors: int
    adversarial: float
    dropout: float
    surplus: bool = False
    malicious: bool = False

    def __post_init__(self) -> None:
        _ = self.honest

    @cached_property
    def honest(self) -> int:
        """Honest clients that are sure to be in any sum that can be opened."""
        return self._honest(0)

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Numbers of survivors from which on noise is taken off: up to `LEVELS`, evenly spread, each with more honest clients than the one before."""
        more = self.clients - self.survivors
        count = min(LEVELS, more) if self.surplus else 0
        found, before = [], self.honest
        for number in range(1, count + 1):
            level = self.survivors + more * number // count
            if (honest := self._honest(level)) > before:
                found.append(level)
                before = honest
        return tuple(found)

    @property
    def excess(self) -> float:
        """How many times the variance that is paid for is left in a sum of all clients."""
        return self.clients / (self._honest(self.levels[-1]) if self.levels else self.honest)

    def _honest(self, survivors: int) -> int:
        from fedlearn.secagg.floor import honest_floor
        from fedlearn.secagg.plan import Profile

        known = Profile.MALICIOUS if self.malicious else Profile.SEMI_MALICIOUS
        return honest_floor(self.clients, self.survivors, self.adversarial, self.dropout, known, survivors)

    @property
    def premise(self) -> str:
        """What a claim rests on, in words."""
        from fedlearn.secagg.floor import colluding

        return premise(self.honest, colluding(self.clients, self.adversarial))

    @property
    def in_words(self) -> str:
        """Who adds how much."""
        return (
            f"each client adds 1/{self.honest} of its variance before its update is masked, sums of fewer than {self.survivors} clients are not opened, "
            f"and {self.clients} together leave a variance {self.excess:.2f} times as large"
        )

    @staticmethod
    def event(noise_multiplier: float) -> Skellam:
        """One attempt at a round, of a model of any size.

        Args:
            noise_multiplier: of what honest clients add together / L2 sensitivity after rounding.
        """
        squared = LEAST_SENSITIVITY**2
        return Skellam(noise_multiplier**2 * squared, LEAST_SENSITIVITY, squared)


def premise(honest: int, colluding: int) -> str:
    """What a claim rests on, in words."""
    return (
        "neighbours: one client's updates are zeros or are not; "
        f"at least {honest} honest clients add their noise, in integers, to every sum that is opened, whatever"
        f" {colluding} other{'' if colluding == 1 else 's'} and the server do together; who takes part is public, and nothing is gained by sampling"
    )
