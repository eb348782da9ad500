"""A small convolutional net for images of any size, with group normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ImageNet(nn.Module):
    """Blocks of convolution, group norm, ReLU and pooling, then a linear head on a 2 x 2 map.

    Group norm (Wu and He 2018) normalises each image by itself. Batch norm mixes the examples of a batch, which rules out
    per-example gradients, and its running statistics do not average over clients (Hsieh et al. 2020).

    Args:
        channels: of the image.
        classes: width of the output.
        widths: channels after each block; each block but the last halves the image.
        groups: of the group norms; divides every width.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (16, 32, 64), groups: int = 8) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = channels
        for i, size in enumerate(widths):
            last = i == len(widths) - 1
            blocks += [
                nn.Conv2d(width, size, kernel_size=3, padding=1),
                nn.GroupNorm(groups, size),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2) if last else nn.MaxPool2d(2),
            ]
            width = size
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(width * 4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, classes) from images of shape (batch, channels, height, width), values about -1 to 1."""
        logits: torch.Tensor = self.head(self.body(x).flatten(1))
        return logits
