"""A site's side of DP-SGD but for the gradients: which rows a step draws, and what is released of their clipped sum.

One definition for everybody who computes gradients, one client at a time or many at once: from the same `Chance` they get the same
batches and the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import DataError, UnsupportedError
from fedlearn.privacy.clipping import denominator, next_clip
from fedlearn.privacy.plan import AdaptiveClip, FixedClip, PoissonSampling, PrivacyPlan, Unit

if TYPE_CHECKING:
    from fedlearn.privacy.mechanisms import Chance

IntArray = npt.NDArray[np.int64]
AHEAD: Final = 1 << 15
"""Numbers that are drawn at once, for several steps: a call for every step of every small client would cost more than the drawing."""


@dataclass
class Tally:
    """What happened at this site. Facts about people: they never leave."""

    steps: int = 0
    empty: int = 0
    examples: int = 0
    not_finite: int = 0


class NoisySteps:
    """Batches and noise of one client, `draw` and `release` in turns, once a step.

    Args:
        rows: how many there are; without any, every batch is empty, and what is released is noise.
        plan: a record- or group-level plan.
        chance: of batches and noise.
        groups: the group of each row, shape (rows,), for a group-level plan.

    Raises:
        DataError: a row without a group.
        UnsupportedError: the plan is not for a site's own training.
    """

    def __init__(self, rows: int, plan: PrivacyPlan, chance: Chance, *, groups: npt.NDArray[Any] | None = None) -> None:
        if plan.unit is Unit.CLIENT or not isinstance(plan.sampling, PoissonSampling):
            raise UnsupportedError(
                f"DP-SGD: got a {plan.unit.value}-level plan, expected Poisson batches of records or groups"
            )
        self.rows, self.plan = rows, plan
        self._chance, self._rate, self._denominator = chance, plan.sampling.rate, denominator(plan)
        self._groups = _members(rows, groups) if plan.unit is Unit.GROUP else None
        self._units = rows if self._groups is None else len(self._groups)
        self._drawn = 0
        self._coins = np.empty((0, self._units), dtype=np.bool_)
        self._normals = np.empty((0, 0))
        clipping = plan.clipping
        self.clip_l2 = clipping.clip_l2 if isinstance(clipping, FixedClip) else clipping.initial_l2
        self.tally = Tally()

    def draw(self) -> IntArray:
        """A batch: every unit by a coin of its own; of a group, one of its rows."""
        if not len(self._coins):
            steps = self._ahead(self._units)
            self._coins = self._chance.coins(steps * self._units, self._rate).reshape(steps, self._units)
        units, self._coins = np.flatnonzero(self._coins[0]), self._coins[1:]
        self._drawn = len(units)
        if self._groups is None:
            return units
        picks = self._chance.uniform(len(units))
        members = [self._groups[unit] for unit in units]
        chosen = [rows[int(pick * len(rows))] for rows, pick in zip(members, picks, strict=True)]
        return np.array(chosen, dtype=np.int64)

    def release(self, sums: Sequence[npt.NDArray[Any]], *, unclipped: int, not_finite: int) -> None:
        """Make the sums of a batch's clipped gradients into what the step releases, in place: noise, and a public denominator.

        Args:
            sums: of the batch drawn last, zeros where it was empty; float32 or float64, contiguous, in the order of the model's parameters.
            unclipped: examples whose gradient was within `clip_l2`.
            not_finite: examples that contributed zero because a number was not finite, or something raised.
        """
        self._add_noise(sums, self.plan.sum_noise_multiplier * self.clip_l2)
        for array in sums:
            np.divide(array, self._denominator, out=array)
        self.tally.steps += 1
        self.tally.empty += not self._drawn
        self.tally.examples += self._drawn
        self.tally.not_finite += not_finite
        if isinstance(self.plan.clipping, AdaptiveClip):
            self.clip_l2 = next_clip(self.plan, self.plan.clipping, self.clip_l2, unclipped, self._drawn, self._chance)

    def _ahead(self, numbers: int) -> int:
        """For how many steps to draw, each of which takes so many numbers."""
        return min(self.plan.steps, max(1, AHEAD // max(1, numbers)))

    def _add_noise(self, sums: Sequence[npt.NDArray[Any]], std: float) -> None:
        size, dtype = sum(array.size for array in sums), sums[0].dtype
        steps = self._ahead(size)
        if steps == 1:
            self._chance.add_normals(sums, std)
            return
        if self._normals.shape[1:] != (size,) or self._normals.dtype != dtype or not len(self._normals):
            self._normals = self._chance.normal(steps * size, dtype=dtype).reshape(steps, size)
        noise, self._normals = self._normals[0], self._normals[1:]
        noise *= dtype.type(std)
        first = 0
        for array in sums:
            np.add(array, noise[first : first + array.size].reshape(array.shape), out=array)
            first += array.size


def _members(rows: int, groups: npt.NDArray[Any] | None) -> list[IntArray]:
    """The rows of each group."""
    if groups is None or len(groups) != rows:
        got = "none" if groups is None else str(len(groups))
        raise DataError(f"group column: got {got} ids for {rows} rows", hint="name the group of every row")
    missing = [row for row, group in enumerate(groups) if group is None or group != group or str(group).strip() == ""]  # noqa: PLR0124  # NaN
    if missing:
        raise DataError(
            f"group column: {len(missing)} of {rows} rows have no id, the first is row {missing[0]}",
            hint="a row without an owner cannot be protected: fill it in, or leave the row out",
        )
    found: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        found.setdefault(str(group), []).append(row)
    return [np.array(one, dtype=np.int64) for one in found.values()]
