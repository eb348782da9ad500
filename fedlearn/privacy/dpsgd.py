"""DP-SGD at a site (Abadi et al. 2016, algorithm 1): Poisson batches, clipped gradients, noise, a public denominator.

Batches are really drawn by Poisson sampling, so their size varies and may be zero; an empty batch is a step like any other: it releases
noise. Sums are divided by rate x units, which the plan fixes: the real size of a batch is private. A large batch is worked off in parts
(virtual steps) that give the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt
import torch

from fedlearn.privacy.ghost import ClippedSum, GhostGradients, unsupported
from fedlearn.privacy.gradient_rules import Gradients
from fedlearn.privacy.plan import PrivacyPlan
from fedlearn.privacy.steps import IntArray, NoisySteps, Tally
from fedlearn.privacy.unfit import where_it_works

if TYPE_CHECKING:
    from torch import nn

    from fedlearn.privacy.mechanisms import Chance

Losses = Callable[[IntArray], torch.Tensor]


class GradientEngine(Protocol):
    """Something that sums clipped per-example gradients: `GhostGradients`, or `OpacusGradients` for other layers."""

    def __call__(self, losses: Callable[[], torch.Tensor], clip_l2: float) -> ClippedSum: ...

    def check(self, losses: Callable[[], torch.Tensor]) -> None: ...


class DpSgd:
    """Noisy gradients of one client, one for each step of a plan.

    Args:
        model: trains; its parameters' order is the noise's.
        losses: row numbers to one loss an example, shape (rows,); runs the model. A row that raises counts as nothing.
        rows: how many there are.
        plan: a record- or group-level plan.
        chance: of batches and noise.
        groups: the group of each row, shape (rows,), for a group-level plan.
        part_rows: the most rows at a time.
        engine: sums clipped gradients; the fast one where the model's layers allow it.

    Raises:
        DataError: a row without a group.
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
        self._steps = NoisySteps(rows, plan, chance, groups=groups)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._losses, self._part_rows = losses, part_rows
        self._engine = engine if engine is not None else engine_for(model)

    @property
    def clip_l2(self) -> float:
        """The clip of the next step."""
        return self._steps.clip_l2

    @property
    def tally(self) -> Tally:
        """What happened so far."""
        return self._steps.tally

    def draw(self) -> IntArray:
        """A batch: every unit by a coin of its own; of a group, one of its rows."""
        return self._steps.draw()

    def gradient(self) -> Gradients:
        """The noisy mean gradient of a fresh batch, by parameter name."""
        rows = self.draw()
        total: Gradients | None = None
        unclipped = unusable = 0
        for first in range(0, len(rows), self._part_rows):
            part, used = rows[first : first + self._part_rows], 0
            for _, found in where_it_works(part, self._clipped):
                unclipped += found.unclipped
                used += found.count
                total = found.gradients if total is None else {n: g + found.gradients[n] for n, g in total.items()}
            unusable += len(part) - used
        if total is None:
            total = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        here = {name: total[name].detach().cpu().contiguous() for name in self._parameters}
        self._steps.release([g.numpy() for g in here.values()], unclipped=unclipped, not_finite=unusable)
        return {name: g.to(self._parameters[name].device) for name, g in here.items()}

    def _clipped(self, rows: IntArray) -> ClippedSum:
        return self._engine(lambda: self._losses(rows), self.clip_l2)


def engine_for(model: nn.Module) -> GradientEngine:
    """The fast engine where every layer has a rule, Opacus otherwise.

    Raises:
        UnsupportedError: neither can.
    """
    if not unsupported(model):
        return GhostGradients(model)
    from fedlearn.privacy.opacus import OpacusGradients

    return OpacusGradients(model)
