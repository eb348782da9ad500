"""Convolutional chains on a CPU: client by client where weights differ, together where they are shared, without autograd.

Stacked or grouped convolutions are slower than one client after another here: oneDNN runs a batch of ten at the machine's floating-point
limit. What costs is everything else, so this leaves it out: no autograd graph, channels last, pooling before ReLU, no copies of
parameters beyond one row a client. Under plain SGD the matrices of wide linear layers are never formed (`factored`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlearn.errors import UnsupportedError
from fedlearn.learning.local import trainable
from fedlearn.learning.strategy import Pass, Pull
from fedlearn.simulation.blocks import Layout, Stacked, StackedOptimizer, SummedPass, is_common, turn
from fedlearn.simulation.factored import wide_layers
from fedlearn.simulation.gradients import Rows, backward_all, forward_all, loss_gradient, pool_first
from fedlearn.simulation.lockstep import FactoredCohort, Sum

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import Block, StepPlan
    from fedlearn.simulation.chain import Chain
    from fedlearn.study import TrainTable


class ConvTrainer:
    """Exact local training of a chain's clients on a CPU.

    Args:
        task: gives the loss of each example.
        model: of the task's architecture, on the CPU, in the precision to train in.
        chain: the model's layers.
        train: local hyper-parameters.

    Raises:
        UnsupportedError: the model is not on the CPU, or trains under autocast.
    """

    def __init__(self, task: Task, model: torch.nn.Module, chain: Chain, train: TrainTable) -> None:
        parameters = trainable(model)
        first = next(iter(parameters.values()))
        if first.device.type != "cpu" or train.precision == "bfloat16":
            raise UnsupportedError(
                f"convolution trainer: got {train.precision} on {first.device}, expected float32 or float64 on the CPU"
            )
        self.layout = Layout.of(parameters)
        self._task, self._train, self._dtype = task, train, first.dtype
        self._layers = pool_first(chain.layers)

    @torch.no_grad()
    def run(self, initial: Tensors, direction: Direction | None, block: Block, plan: StepPlan) -> Stacked:
        _keep_freed_memory()
        rows = Rows.of(block, self._dtype)
        weights = torch.empty(len(block.clients), self.layout.size, dtype=self._dtype)
        if self._is_one(initial) and is_common(Pass("", initial, direction)) and (wide := self._wide(plan)):
            pull = direction.strength if isinstance(direction, Pull) else 0.0
            cohort = FactoredCohort(self._task, self._layers, self._train, initial, wide, plan, pull)
            loss_sums = cohort.run(rows)
            cohort.write(self.layout.views(weights))
            return Stacked(weights, loss_sums, plan.sizes.sum(1))
        self.layout.fill(weights, initial)
        # What a rule holds of each client has a row for every client. Else a client's weights stay in the cache from step to step.
        alone = direction is None or (isinstance(direction, Pull) and self._is_one(direction.anchor))
        width = 1 if alone else len(weights)
        gradient = torch.zeros_like(weights[:width])
        loss_sums = np.zeros(len(weights))
        for first in range(0, len(weights), width):
            one = slice(first, first + width)
            loss_sums[one] = self._train_rows(weights[one], gradient, one, direction, rows, plan)
        return Stacked(weights, loss_sums, plan.sizes.sum(1))

    @torch.no_grad()
    def run_sum(
        self,
        initial: Tensors,
        direction: Pull | None,
        block: Block,
        plan: StepPlan,
        shares: npt.NDArray[np.float64],
    ) -> SummedPass:
        rows = Rows.of(block, self._dtype)
        total = torch.zeros(self.layout.size, dtype=self._dtype)
        if wide := self._wide(plan):
            pull = direction.strength if direction is not None else 0.0
            into = Sum(shares, self.layout.views(total))
            cohort = FactoredCohort(self._task, self._layers, self._train, initial, wide, plan, pull, into)
            loss_sums = cohort.run(rows)
            return SummedPass(total, loss_sums, plan.sizes.sum(1))
        loss_sums = np.zeros(len(shares))
        start, row, gradient = (torch.empty(1, len(total), dtype=self._dtype) for _ in range(3))
        self.layout.fill(start, initial)
        for i, share in enumerate(shares):
            one = slice(i, i + 1)
            loss_sums[one] = self._train_rows(row.copy_(start), gradient, one, direction, rows, plan)
            total.add_(row.sub_(start)[0], alpha=float(share))
        return SummedPass(total, loss_sums, plan.sizes.sum(1))

    def _is_one(self, weights: Tensors) -> bool:
        """Whether these are one model's weights, without a client dimension."""
        return all(weights[name].shape == shape for name, shape in self.layout.shapes.items())

    def _wide(self, plan: StepPlan) -> frozenset[str]:
        """Names of the matrices that are cheaper as thin products; none under another rule than SGD's."""
        rank = int(plan.sizes.sum(1).max())
        return wide_layers(self._layers, self.layout, rank) if self._train.optimizer == "sgd" else frozenset()

    def _train_rows(
        self,
        weights: Tensor,
        gradient: Tensor,
        clients: slice,
        direction: Direction | None,
        rows: Rows,
        plan: StepPlan,
    ) -> npt.NDArray[np.float64]:
        """Train some clients of the block, each with a row of `weights` and of `gradient`; returns their loss sums."""
        optimizer = StackedOptimizer(self._train, weights)
        views = [(self.layout.views(w), self.layout.views(g)) for w, g in zip(weights, gradient, strict=True)]
        numbers, sizes = plan.rows[clients], plan.sizes[clients]
        loss_sums = np.zeros(len(weights))
        for step in range(int(plan.steps[clients].max())):
            active = min(plan.active(step) - clients.start, len(weights))
            for i in range(active):
                x, y = rows.take(numbers[i, step, : sizes[i, step]])
                loss_sums[i] += self._gradient(x, y, *views[i])
            turn(direction, self.layout, gradient, weights, active)
            optimizer.step(weights[:active], gradient[:active])
        return loss_sums

    def _gradient(self, x: Tensor, y: Tensor, weights: Tensors, gradients: Tensors) -> float:
        """Write the gradient of a batch's mean loss into `gradients`; returns the sum of the losses."""
        outputs, tape = forward_all(self._layers, x, weights)
        losses, back = loss_gradient(self._task, outputs, y, outputs.new_full((len(y),), 1 / len(y)))
        backward_all(self._layers, back, tape, weights, gradients, wants_input=False)
        return float(losses.sum())


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors of up to 31 MiB, which it else returns to the system.

    A client rule makes temporaries of the model's size in every step; to have the system map and clear them anew each time costs more than
    the rule's arithmetic. glibc raises its threshold to the largest mapped block that was ever freed, up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD), so allocating and freeing one is all that it takes.
    """
    torch.empty(31 * 1024**2, dtype=torch.uint8)
