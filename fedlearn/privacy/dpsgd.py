"""DP-SGD at a site (Abadi et al. 2016, algorithm 1): Poisson batches, clipped gradients, noise, a public denominator.

Batches are really drawn by Poisson sampling, so their size varies and may be zero; an empty batch is a step like any other: it releases
noise. Sums are divided by rate x units, which the plan fixes: the real size of a batch is private. A large batch is worked off in parts
(virtual steps) that give the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedlearn.errors import DataError, UnsupportedError
from fedlearn.privacy.clipping import denominator, next_clip
from fedlearn.privacy.ghost import ClippedSum, GhostGradients, Gradients, unsupported
from fedlearn.privacy.plan import AdaptiveClip, FixedClip, PoissonSampling, PrivacyPlan, Unit

if TYPE_CHECKING:
    from torch import nn

    from fedlearn.privacy.mechanisms import Chance

IntArray = npt.NDArray[np.int64]
Losses = Callable[[IntArray], torch.Tensor]


class GradientEngine(Protocol):
    """Something that sums clipped per-example gradients: `GhostGradients`, or `OpacusGradients` for other layers."""

    def __call__(self, losses: Callable[[], torch.Tensor], clip_l2: float) -> ClippedSum: ...


@dataclass
class Tally:
    """What happened at this site. Facts about people: they never leave."""

    steps: int = 0
    empty: int = 0
    examples: int = 0
    not_finite: int = 0


class DpSgd:
    """Noisy gradients of one client, one for each step of a plan.

    Args:
        model: trains; its parameters' order is the noise's.
        losses: row numbers to one loss an example, shape (rows,); runs the model.
        rows: how many there are.
        plan: a record- or group-level plan.
        chance: of batches and noise.
        groups: the group of each row, shape (rows,), for a group-level plan.
        part_rows: the most rows at a time.
        engine: sums clipped gradients; the fast one where the model's layers allow it.

    Raises:
        DataError: no rows, or a row without a group.
        UnsupportedError: the plan is not for a site's own training.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        rows: int,
        plan: PrivacyPlan,
        chance: Chance,
        *,
        groups: npt.NDArray[Any] | None = None,
        part_rows: int = 512,
        engine: GradientEngine | None = None,
    ) -> None:
        if plan.unit is Unit.CLIENT or not isinstance(plan.sampling, PoissonSampling):
            raise UnsupportedError(
                f"DP-SGD: got a {plan.unit.value}-level plan, expected Poisson batches of records or groups"
            )
        if rows < 1:
            raise DataError("DP-SGD: no training rows", hint="a site without data takes no part in the run")
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._losses, self._plan, self._chance = losses, plan, chance
        self._rate = plan.sampling.rate
        self._members = _members(rows, plan.unit, groups)
        self._part_rows = part_rows
        self._engine = engine if engine is not None else engine_for(model)
        clipping = plan.clipping
        self.clip_l2 = clipping.clip_l2 if isinstance(clipping, FixedClip) else clipping.initial_l2
        self.tally = Tally()

    def draw(self) -> IntArray:
        """A batch: every unit by a coin of its own; of a group, one of its rows."""
        units = np.flatnonzero(self._chance.coins(len(self._members), self._rate))
        if self._plan.unit is Unit.RECORD:
            return units
        picks = self._chance.uniform(len(units))
        chosen = [
            self._members[unit][int(pick * len(self._members[unit]))] for unit, pick in zip(units, picks, strict=True)
        ]
        return np.array(chosen, dtype=np.int64)

    def gradient(self) -> Gradients:
        """The noisy mean gradient of a fresh batch, by parameter name."""
        rows = self.draw()
        total: Gradients | None = None
        unclipped = 0
        for first in range(0, len(rows), self._part_rows):
            part = rows[first : first + self._part_rows]
            found = self._engine(lambda part=part: self._losses(part), self.clip_l2)  # type: ignore[misc]  # part is bound now
            unclipped += found.unclipped
            self.tally.not_finite += found.not_finite
            total = found.gradients if total is None else {n: g + found.gradients[n] for n, g in total.items()}
        if total is None:
            total = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
            self.tally.empty += 1
        self.tally.steps += 1
        self.tally.examples += len(rows)
        noisy = self._noised(total)
        if isinstance(self._plan.clipping, AdaptiveClip):
            self.clip_l2 = next_clip(self._plan, self._plan.clipping, self.clip_l2, unclipped, len(rows), self._chance)
        return noisy

    def _noised(self, total: Gradients) -> Gradients:
        size, std = denominator(self._plan), self._plan.sum_noise_multiplier * self.clip_l2
        noisy = {}
        for name in self._parameters:
            gradient = total[name].detach().contiguous()
            if gradient.device.type == "cpu":
                self._chance.add_normal(gradient.numpy(), std)
            else:
                noise = np.zeros(tuple(gradient.shape), dtype=np.float32)
                self._chance.add_normal(noise, std)
                gradient += torch.from_numpy(noise).to(gradient.device)
            noisy[name] = gradient.div_(size)
        return noisy


def engine_for(model: nn.Module) -> GradientEngine:
    """The fast engine where every layer has a rule, Opacus otherwise.

    Raises:
        UnsupportedError: neither can.
    """
    if not unsupported(model):
        return GhostGradients(model)
    from fedlearn.privacy.opacus import OpacusGradients

    return OpacusGradients(model)


def _members(rows: int, unit: Unit, groups: npt.NDArray[Any] | None) -> list[IntArray]:
    if unit is Unit.RECORD:
        return [np.array([row]) for row in range(rows)]
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
