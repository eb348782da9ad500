"""Any model, many clients at a time: torch.func's vmap over a leading client dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlearn.learning.local import trainable
from fedlearn.simulation.blocks import Layout, Stacked, StackedOptimizer, turn

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import Block, IntArray, StepPlan
    from fedlearn.study import TrainTable


class GeneralTrainer:
    """Per-client gradients by `vmap(grad(...))`: exact for every model whose layers draw nothing and keep no state.

    Args:
        task: gives the loss of each example.
        model: of the task's architecture, on the device to train on.
        train: local hyper-parameters.
    """

    def __init__(self, task: Task, model: torch.nn.Module, train: TrainTable) -> None:
        parameters = trainable(model)
        self.layout = Layout.of(parameters)
        self._train = train
        first = next(iter(parameters.values()))
        # An operator without a batching rule is done in a loop: exact, and of no use to a user to be told.
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]  # noqa: SLF001  # no public way
        self._device, self._dtype = first.device, first.dtype
        model.train()

        def loss(
            weights: Tensors, x: torch.Tensor, y: torch.Tensor, share: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            losses = task.loss(torch.func.functional_call(model, dict(weights), (x,)), y)
            return (losses * share).sum(), losses

        self._gradients = torch.func.vmap(torch.func.grad(loss, has_aux=True))

    def run(self, initial: Tensors, direction: Direction | None, block: Block, plan: StepPlan) -> Stacked:
        x, y = block.tensors(self._device, self._dtype)
        weights = torch.empty(len(block.clients), self.layout.size, dtype=self._dtype, device=self._device)
        self.layout.fill(weights, initial)
        optimizer = StackedOptimizer(self._train, weights)
        gradient = torch.zeros_like(weights)
        loss_sums = np.zeros(len(block.clients))
        for step in range(plan.rows.shape[1]):
            k = plan.active(step)
            rows = torch.from_numpy(plan.rows[:k, step]).to(self._device)
            share = shares(plan.sizes[:k, step], rows.shape[1], self._dtype, self._device)
            now = self.layout.views(weights[:k])
            found, losses = self._gradients(now, x[rows], y[rows], share)
            self.layout.fill(gradient[:k], found)
            turn(direction, self.layout, gradient, weights, k)
            optimizer.step(weights[:k], gradient[:k])
            loss_sums[:k] += (losses.detach().double() * (share > 0)).sum(1).cpu().numpy()
        return Stacked(weights, loss_sums, plan.sizes.sum(1))


def shares(sizes: IntArray, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Each row's share in its client's mean loss, shape (clients, width): 1 / size, and 0 for what fills a batch up."""
    inside = np.arange(width) < sizes[:, None]
    return torch.from_numpy(inside / sizes[:, None]).to(device, dtype)
