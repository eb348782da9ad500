"""A task that trains in milliseconds: four clients, three features, two classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedlearn import seeds
from fedlearn.learning.metrics import accuracy
from fedlearn.learning.task import Examples, Task, TaskCard
from fedlearn.study import Study, parse_study

NAME = "tests.support.tiny_task:TinyTask"
CLIENTS = ("ada", "bob", "cyd", "dee")


@dataclass(frozen=True)
class TinyTask(Task):
    hidden: int = 0
    dropout: float = 0.0

    name: ClassVar[str] = NAME
    card: ClassVar[TaskCard] = TaskCard("tiny", "made here", "none", True, "a letter", "accuracy", "included")

    def load(self, source=None):
        generator = seeds.numpy_generator(7, "tiny", str(source or ""))
        client = np.repeat(np.array(CLIENTS), (9, 14, 20, 11))
        x = generator.normal(size=(len(client), 3)).astype(np.float32)
        y = (x @ np.array([1.0, -2.0, 0.5]) + generator.normal(size=len(client)) > 0).astype(np.int64)
        return Examples(x, y, client)

    def model(self):
        if not self.hidden:
            return torch.nn.Linear(3, 2)
        return torch.nn.Sequential(
            torch.nn.Linear(3, self.hidden),
            torch.nn.Tanh(),
            torch.nn.Dropout(self.dropout),
            torch.nn.Linear(self.hidden, 2),
        )

    def loss(self, outputs, y):
        return torch.nn.functional.cross_entropy(outputs, y, reduction="none")

    def metrics(self, outputs, y):
        return {"accuracy": accuracy(outputs.argmax(axis=1), y)}


def tiny_study(*overrides: str) -> Study:
    """Three rounds of the tiny task, all four clients."""
    text = f"""
        name = "tiny"
        seed = 5
        rounds = 3
        [task]
        name = "{NAME}"
        [data]
        folds = 3
        [train]
        lr = 0.3
        batch_size = 4
        [cohort]
        wait_for = 4
        [runtime]
        wait_s = 2.0
        deadline_s = 2.0
    """
    return parse_study(text, overrides, origin="tiny.toml")
