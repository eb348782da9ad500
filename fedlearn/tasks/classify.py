"""What tasks with one class an example have in common: cross entropy, accuracy, balanced accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from fedlearn.data.images import scaled
from fedlearn.learning.metrics import accuracy, balanced_accuracy
from fedlearn.learning.task import Batch, ClientData, Examples, Task

if TYPE_CHECKING:
    import torch


class Classification(Task):
    """Logits of shape (n, classes) against class ids of shape (n,)."""

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs, y, reduction="none")

    def metrics(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        predicted = outputs.argmax(axis=1)
        return {"accuracy": accuracy(predicted, y), "balanced_accuracy": balanced_accuracy(predicted, y)}


class ImageClassification(Classification):
    """uint8 images, fed to the model as values from -1 to 1."""

    prepares_rows: ClassVar[bool] = True

    def prepare(self, train: Examples, test: Examples) -> ClientData:
        return ClientData(Batch(scaled(train.x), train.y), Batch(scaled(test.x), test.y))
