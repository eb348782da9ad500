"""hospital/blood-smear: which white blood cell is this? Synthetic cells, or the user's own file in MedMNIST's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedlearn.data.images import NPZ_SCHEMA, read_npz
from fedlearn.data.synthetic.blood_smear import CLASSES, blood_smear_synthetic
from fedlearn.learning.task import Examples, TaskCard
from fedlearn.tasks.classify import ImageClassification

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BloodSmearTask(ImageClassification):
    """Four classes of synthetic cells, each hospital with its own scanner and its own mix of classes.

    Args:
        hospitals: how many.
        images: at each hospital.
        size: height and width, pixels.
        shift: how much the scanners differ: 0 not at all, 1 clearly.
        alpha: Dirichlet concentration of the class mix; large means the same mix everywhere.
        data_seed: of the generator, so that data stays while a study's seed changes.
        classes: for a file of your own (8 for BloodMNIST).
    """

    hospitals: Annotated[int, Field(ge=1, le=10_000)] = 6
    images: Annotated[int, Field(ge=2)] = 300
    size: Annotated[int, Field(ge=16, le=256)] = 28
    shift: Annotated[float, Field(ge=0, le=1)] = 1.0
    alpha: Annotated[float, Field(gt=0)] = 2.0
    data_seed: Annotated[int, Field(ge=0)] = 1
    classes: Annotated[int, Field(ge=2)] = 4

    name: ClassVar[str] = "hospital/blood-smear"
    card: ClassVar[TaskCard] = TaskCard(
        title="White blood cells seen through each hospital's scanner (synthetic)",
        data="synthetic: drawn by fedlearn.data.synthetic.blood_smear from a seed; or your own MedMNIST .npz",
        licence="Apache-2.0, as fedlearn",
        synthetic=True,
        clients="one hospital; as many as the option hospitals says (6)",
        metric="accuracy",
        obtain="included (made from a seed)",
        schema=(*NPZ_SCHEMA, "images in colour; for BloodMNIST set the option classes = 8"),
    )

    @property
    def label_names(self) -> tuple[str, ...]:
        return CLASSES if self.classes == len(CLASSES) else ()

    def load(self, source: Path | None = None) -> Examples:
        if source is not None:
            return read_npz(source, channels=3, classes=self.classes)
        x, y, hospital = blood_smear_synthetic(
            self.hospitals, self.images, self.data_seed, size=self.size, strength=self.shift, alpha=self.alpha
        )
        width = max(2, len(str(self.hospitals)))
        names = np.array([f"hospital-{number + 1:0{width}d}" for number in range(self.hospitals)])
        return Examples(x, y, names[hospital])

    def model(self) -> torch.nn.Module:
        from fedlearn.models.cnn import ImageNet

        return ImageNet(channels=3, classes=self.classes)


TASK = BloodSmearTask
