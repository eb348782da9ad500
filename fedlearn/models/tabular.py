"""Small nets for tables: linear layers with a smooth activation between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class TabularNet(nn.Module):
    """Features to outputs through fully connected hidden layers.

    tanh, because a smooth bounded activation keeps small tables from being memorised by a few kinks, and because bounded
    activations lose less under clipping (Papernot et al. 2021, "Tempered sigmoid activations").

    Args:
        features: width of the input.
        outputs: width of the output: 1 logit, one logit a class, or one value a target.
        hidden: widths of the hidden layers; none at all makes this a linear model.
        centre: of the target, a public constant: the head's 0 means this value.
        scale: of the target, a public constant: the head's 1 means this much more.
    """

    def __init__(
        self, features: int, outputs: int, hidden: Sequence[int] = (16,), *, centre: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = features
        for size in hidden:
            layers += [nn.Linear(width, size), nn.Tanh()]
            width = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)
        self.centre, self.scale = centre, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of shape (batch, outputs) from features of shape (batch, features)."""
        out: torch.Tensor = self.head(self.body(x))
        return out if (self.centre, self.scale) == (0.0, 1.0) else self.centre + self.scale * out


class RareEventNet(TabularNet):
    """A `TabularNet` with one logit that starts at the events' prior, so that the first steps are not spent on learning it.

    Lin et al. 2017, "Focal loss for dense object detection", section 4.1.

    Args:
        features: width of the input.
        hidden: widths of the hidden layers.
        prior: the events' share, a public guess.
    """

    def __init__(self, features: int, hidden: Sequence[int], prior: float) -> None:
        super().__init__(features, 1, hidden)
        with torch.no_grad():
            self.head.bias.fill_(math.log(prior / (1 - prior)))
