"""Clipped sums of per-example gradients for stacked linear layers, many clients at a time.

The gradient of a linear layer's weights for one example is the product of what entered the layer and the gradient of what left it, so its
squared norm is |a|^2 |g|^2 (Goodfellow 2015, "Efficient per-example gradient computations"), and a clip factor goes into either of the
two before they are multiplied. `fedlearn.privacy.ghost` is the same for one client and any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy.typing as npt
import torch

if TYPE_CHECKING:
    import numpy as np

    from fedlearn.simulation.blocks import IntArray
    from fedlearn.simulation.layers import Linear


@dataclass(frozen=True)
class Factors:
    """What a linear layer's gradients are made of.

    Args:
        layer: which.
        entered: what went in, shape (clients, batch, in).
        back: gradient with respect to what came out, shape (clients, batch, out).
    """

    layer: Linear
    entered: torch.Tensor
    back: torch.Tensor

    def sums(self, factors: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Every client's sum of its examples' gradients by parameter name, each times its factor, shape (clients, batch)."""
        back = self.back if factors is None else self.back * factors[:, :, None]
        sums = {self.layer.weight: torch.bmm(back.transpose(1, 2), self.entered)}
        return sums if self.layer.bias is None else {**sums, self.layer.bias: back.sum(1)}

    def squared_norms(self) -> torch.Tensor:
        """Of each example's gradient, shape (clients, batch)."""
        inner = _squares(self.entered)
        return _squares(self.back) * (inner if self.layer.bias is None else inner + 1)

    def only(self, good: torch.Tensor) -> Factors:
        """The same with zeros for the other examples: zero times NaN is NaN, so a factor of zero would not do."""
        mask = good[:, :, None]
        return Factors(self.layer, self.entered.masked_fill(~mask, 0.0), self.back.masked_fill(~mask, 0.0))


@dataclass(frozen=True)
class Clipped:
    """Every client's sum of clipped gradients, and facts about its examples, each of shape (clients,).

    Args:
        sums: by parameter name, with a leading client dimension.
        counts: examples that contributed; what is not finite contributes zero.
        unclipped: those among them whose gradient was within the clip.
        loss_sums: of those that contributed, float64.
    """

    sums: dict[str, torch.Tensor]
    counts: IntArray
    unclipped: IntArray
    loss_sums: npt.NDArray[np.float64]

    def plus(self, other: Clipped) -> Clipped:
        """Of both parts of a batch together."""
        return Clipped(
            {name: total + other.sums[name] for name, total in self.sums.items()},
            self.counts + other.counts,
            self.unclipped + other.unclipped,
            self.loss_sums + other.loss_sums,
        )


def clip(factors: Sequence[Factors], losses: torch.Tensor, inside: torch.Tensor, clips: torch.Tensor) -> Clipped:
    """Scale each example's gradient down to its client's clip where it is longer, and sum them up.

    Args:
        factors: of all layers; zero for what only fills a batch up.
        losses: shape (clients, batch).
        inside: True for examples, False for what fills a batch up, shape (clients, batch).
        clips: longest gradient of one example over all parameters together, shape (clients,).
    """
    squared = torch.stack([one.squared_norms() for one in factors]).sum(0)
    good = torch.isfinite(squared) & torch.isfinite(losses)
    if not bool(good.all()):
        factors = [one.only(good) for one in factors]
    norms = squared.sqrt()
    scale = torch.where(good, (clips[:, None] / norms).clamp(max=1.0), 0.0)
    sums: dict[str, torch.Tensor] = {}
    for one in factors:
        sums |= one.sums(scale)
    good &= inside
    return Clipped(
        sums,
        good.sum(1).cpu().numpy(),
        (good & (norms <= clips[:, None])).sum(1).cpu().numpy(),
        torch.where(good, losses, 0.0).double().sum(1).cpu().numpy(),
    )


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Squared norm along the last dimension."""
    return x.square().sum(-1)
