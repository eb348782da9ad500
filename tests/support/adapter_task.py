"""A frozen network with low-rank adapters (LoRA, Hu et al. 2022): what is learnt is the adapters alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fedlearn import seeds
from fedlearn.learning.metrics import accuracy
from fedlearn.learning.task import Examples, Task, TaskCard

NAME = "tests.support.adapter_task:AdapterTask"
CLIENTS = ("ada", "bob", "cyd")


class Adapted(nn.Module):
    """A frozen linear layer, and beside it one of low rank that begins as zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class AdaptedNet(nn.Module):
    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6).requires_grad_(requires_grad=False)
        self.first = Adapted(nn.Linear(6, 16), rank)
        self.last = Adapted(nn.Linear(16, 2), rank)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.norm(x))))


@dataclass(frozen=True)
class AdapterTask(Task):
    name: ClassVar[str] = NAME
    card: ClassVar[TaskCard] = TaskCard("adapters", "made here", "none", True, "a letter", "accuracy", "included")

    def load(self, source=None):
        generator = seeds.numpy_generator(7, "adapters", str(source or ""))
        client = np.repeat(np.array(CLIENTS), 300)
        x = generator.normal(size=(len(client), 6)).astype(np.float32)
        return Examples(x, (x @ np.array([1.0, -2.0, 0.5, 0.0, 1.0, -1.0]) > 0).astype(np.int64), client)

    def model(self):
        return AdaptedNet()

    def loss(self, outputs, y):
        return nn.functional.cross_entropy(outputs, y, reduction="none")

    def metrics(self, outputs, y):
        return {"accuracy": accuracy(outputs.argmax(axis=1), y)}
