"""Noise that is not needed after all, taken off the sum: what more survivors than the floor have brought too much.

Clients must add so much noise that the fewest survivors' noise suffices; when more survive, the sum has more than it needs. So each client's noise is
made of parts, one that stays and one for each level of survivors, each from a key of its own; when a level is reached, that part's keys are opened and
the server draws the parts again and subtracts them (Jiang, Wang and Chen 2024, "Efficient federated learning with dropout-resilient differential
privacy", XNoise in Dordis). With h(s) honest clients sure to be in a sum that was opened for s survivors, v the variance that the sum needs, and levels
s_1 < s_2 < ... above the floor s_0, a client adds

    v / h(s_last)                        which stays
    v / h(s_(i-1)) - v / h(s_i)          which goes when s_i survive

so whatever is opened, h(s) clients leave v in the sum. Parts are Skellam: their sums are exactly of the kind that the plan accounts for.

A level's key gives those of the levels below it by a one-way function, so one key is opened for each client: for the highest level that was reached. Below
the first level lies the anchor, which is public: every key that is opened must lead to it. Each level's key is shared among the client's holders before
its vector leaves, and a holder gives one share, of the level that the survivors it was shown have reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedlearn.errors import StudyError
from fedlearn.secagg.noise import Noise, add_noise
from fedlearn.secagg.primitives import Draw, derive
from fedlearn.secagg.ring import Vector
from fedlearn.secagg.shamir import split


def level_keys(top: bytes, level: int) -> list[bytes]:
    """The keys of levels 1 to `level`.

    Args:
        top: the key of that level: of the highest one for a client, of the one that was opened for the server.
        level: at least 1.
    """
    found = [top]
    for _ in range(level - 1):
        found.append(derive(found[-1], b"surplus level below"))
    return found[::-1]


def anchor_of(key: bytes, level: int) -> bytes:
    """What a client promises about its keys, so that a false share shows: 32 bytes, the same from every level's key.

    Args:
        key: of that level.
        level: at least 1.
    """
    return derive(level_keys(key, level)[0], b"surplus anchor")


def share_keys(top: bytes, levels: int, threshold: int, holders: int, draw: Draw) -> list[bytes]:
    """What each holder keeps: a share of every level's key, the lowest level first, 33 bytes each.

    Args:
        top: key of the highest level's part, 32 bytes.
        levels: how many, at least 1.
        threshold: shares that open a key.
        holders: how many.
        draw: a CSPRNG.
    """
    by_level = [split(key, threshold, holders, draw) for key in level_keys(top, levels)]
    return [b"".join(shares) for shares in zip(*by_level, strict=True)]


@dataclass(frozen=True)
class Surplus:
    """The parts of one client's noise.

    Args:
        levels: survivors at which a part goes; rising.
        variances: of the part that stays, then of each level's; integer units squared.

    Raises:
        StudyError: levels that do not rise, or parts that are none.
    """

    levels: tuple[int, ...]
    variances: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in pairwise(self.levels))
        if not rising or len(self.variances) != len(self.levels) + 1 or min(self.variances) <= 0:
            raise StudyError(
                f"surplus noise: levels {self.levels} with variances {self.variances}: expected rising levels, each of which removes some"
            )

    @classmethod
    def over(cls, variance: float, floor: int, levels: Mapping[int, int]) -> Surplus:
        """The parts for a variance that any sum must have.

        Args:
            variance: v.
            floor: honest clients sure to be in any sum.
            levels: survivors to honest clients that are then sure to be in the sum.
        """
        honest = [floor, *(levels[at] for at in sorted(levels))]
        parts = [variance / fewer - variance / more for fewer, more in pairwise(honest)]
        return cls(tuple(sorted(levels)), (variance / honest[-1], *parts))

    @property
    def added(self) -> float:
        """The variance that a client adds."""
        return sum(self.variances)

    def reached(self, survivors: int) -> int:
        """How many levels so many survivors reach."""
        return sum(survivors >= level for level in self.levels)

    def left(self, survivors: int) -> float:
        """The variance that a client's noise has when the sum is open."""
        return self.added - sum(self.variances[1 : self.reached(survivors) + 1])

    def add(self, vector: Vector, base: bytes, top: bytes) -> None:
        """All of a client's noise, in place.

        Args:
            vector: ring elements without the weight.
            base: key of the part that stays; nobody else ever has it.
            top: key of the highest level's part.
        """
        for variance, key in zip(self.variances, [base, *level_keys(top, len(self.levels))], strict=True):
            add_noise(vector, Noise.SKELLAM, variance, derive(key, b"surplus part"))

    def remove(self, total: Vector, survivors: int, opened: Sequence[bytes]) -> None:
        """Take the parts of the reached levels off the sum, in place. Of clients whose key could not be opened everything stays.

        Args:
            total: ring elements without the weight.
            survivors: whose vectors are in the sum.
            opened: of those survivors, the keys of the highest level that was reached.
        """
        level = self.reached(survivors)
        for top in opened if level else ():
            for variance, key in zip(self.variances[1:], level_keys(top, level), strict=False):
                add_noise(total, Noise.SKELLAM, variance, derive(key, b"surplus part"), sign=-1)
