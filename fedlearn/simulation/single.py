"""A block of one client, trained as the sequential oracle does: for models that gain nothing from a batch, on every core."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlearn.learning.local import LocalTrainer, Place, trainable
from fedlearn.simulation.blocks import Layout, Stacked

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import Block, StepPlan
    from fedlearn.study import TrainTable


class SingleTrainer:
    """`local.LocalTrainer` behind the interface of a block. Not for models that draw: torch's generator is shared by all threads.

    Args:
        task: gives the loss of each example.
        model: of the task's architecture, on the device to train on.
        train: local hyper-parameters.
    """

    def __init__(self, task: Task, model: torch.nn.Module, train: TrainTable) -> None:
        self.layout = Layout.of(trainable(model))
        self._task, self._model, self._train = task, model, train

    def run(self, initial: Tensors, direction: Direction | None, block: Block, plan: StepPlan) -> Stacked:
        """As `BlockTrainer.run`, for a block of one client.

        Raises:
            ValueError: more clients.
        """
        (client,) = block.clients
        (data,) = block.data
        trainer = LocalTrainer(
            self._task, self._model, self._train, data, Place(block.seed, block.round, client), plan.name
        )
        start = {
            name: tensor[0] if tensor.ndim > len(self.layout.shapes[name]) else tensor
            for name, tensor in initial.items()
        }
        trainer.init(start, None if direction is None else _for_one(direction))
        for rows, size in zip(plan.rows[0], plan.sizes[0], strict=True):
            trainer.step(rows[:size])
        trained = trainer.final().weights
        weights = torch.cat([trained[name].flatten() for name in self.layout.shapes])[None]
        count = int(plan.sizes.sum())
        return Stacked(weights, np.array([trainer.mean_loss * count]), np.array([count]))


def _for_one(direction: Direction) -> Direction:
    """A rule that speaks of stacks, for one client's tensors."""

    def turned(gradient: Tensors, weights: Tensors) -> Tensors:
        stacks = ({name: tensor[None] for name, tensor in part.items()} for part in (gradient, weights))
        return {name: tensor[0] for name, tensor in direction(*stacks).items()}

    return turned
