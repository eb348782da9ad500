"""A task whose code raises for one client: in training, in preparing its data or in scoring it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tests.support.tiny_task import TinyTask

NAME = "tests.support.raising_task:RaisingTask"
ROWS_OF_BOB = range(9, 23)


@dataclass(frozen=True)
class RaisingTask(TinyTask):
    where: str = "loss"

    name: ClassVar[str] = NAME

    def load(self, source=None):
        examples = super().load(source)
        examples.x[ROWS_OF_BOB.start] = 77.0  # a mark: the code below raises where it sees it
        return examples

    def prepare(self, train, test):
        if self.where == "prepare" and 77.0 in train.x:
            raise KeyError("bob's row")
        return super().prepare(train, test)

    def loss(self, outputs, y):
        if self.where == "loss" and float(outputs.detach().abs().max()) > 15:
            raise ZeroDivisionError("bob's loss")
        return super().loss(outputs, y)

    def metrics(self, outputs, y):
        if self.where == "metrics" and np.abs(outputs).max() > 15:
            raise OverflowError("bob's metrics")
        return super().metrics(outputs, y)
