"""vision/digits: handwritten digits, 8 x 8 pixels. Small, real, and there with scikit-learn: the task for trying things out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedlearn.data.images import NPZ_SCHEMA, read_npz
from fedlearn.learning.task import Examples, TaskCard
from fedlearn.tasks.classify import ImageClassification

if TYPE_CHECKING:
    import torch

DARKEST = 16
"""scikit-learn's pixels are counts from 0 to 16."""


@dataclass(frozen=True)
class DigitsTask(ImageClassification):
    """Ten classes, 1,797 images of 43 writers (the file does not say who wrote which)."""

    name: ClassVar[str] = "vision/digits"
    card: ClassVar[TaskCard] = TaskCard(
        title="Handwritten digits, 8 x 8 pixels",
        data="Optical Recognition of Handwritten Digits: E. Alpaydin, C. Kaynak (UCI, doi 10.24432/C50P49), test part",
        licence="CC BY 4.0",
        synthetic=False,
        clients="none by nature: choose a partition (dirichlet, shards, iid ...)",
        metric="accuracy",
        obtain="included (with scikit-learn)",
        schema=(*NPZ_SCHEMA, "images are grey, labels 0 to 9"),
    )

    def load(self, source: Path | None = None) -> Examples:
        if source is not None:
            return read_npz(source, channels=1, classes=10)
        from sklearn.datasets import load_digits

        images, y = load_digits(return_X_y=True)
        pixels = np.rint(images * (255 / DARKEST)).astype(np.uint8)
        return Examples(pixels.reshape(-1, 1, 8, 8), y.astype(np.int64))

    def model(self) -> torch.nn.Module:
        from fedlearn.models.cnn import ImageNet

        return ImageNet(channels=1, classes=10, widths=(32, 64))


TASK = DigitsTask
