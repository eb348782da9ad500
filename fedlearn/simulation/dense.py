"""Fully connected nets, many clients at a time: stacked matrices, with the backward pass written out.

For small nets a step is all overhead. One batched product a layer serves every client of the block, and writing the backward pass out
spares autograd's graph: only the task's loss, a function of the outputs, is differentiated by torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlearn.errors import UnsupportedError
from fedlearn.learning.local import trainable
from fedlearn.simulation.blocks import Layout, Stacked, StackedOptimizer, turn
from fedlearn.simulation.chain import Chain
from fedlearn.simulation.general import shares
from fedlearn.simulation.gradients import loss_gradient
from fedlearn.simulation.layers import FUNCTIONS, Activation, Affine, Flatten, Kind, Linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import Block, StepPlan
    from fedlearn.study import TrainTable


class DenseTrainer:
    """Linear layers and element-wise functions.

    Args:
        task: gives the loss of each example.
        model: of the task's architecture, on the device to train on.
        chain: the model's layers.
        train: local hyper-parameters.

    Raises:
        UnsupportedError: another layer is among them.
    """

    def __init__(self, task: Task, model: torch.nn.Module, chain: Chain, train: TrainTable) -> None:
        if not is_dense(chain):
            raise UnsupportedError("dense trainer: expected linear layers and element-wise functions only")
        parameters = trainable(model)
        first = next(iter(parameters.values()))
        self.layout = Layout.of(parameters)
        self._task, self._train = task, train
        self._device, self._dtype = first.device, first.dtype
        self._flat = not isinstance(chain.layers[0], Flatten)
        self._layers = tuple(layer for layer in chain.layers if isinstance(layer, Linear | Activation | Affine))

    def run(self, initial: Tensors, direction: Direction | None, block: Block, plan: StepPlan) -> Stacked:
        x, y = block.tensors(self._device, self._dtype)
        x = x if self._flat else x.flatten(1)
        weights = torch.empty(len(block.clients), self.layout.size, dtype=self._dtype, device=self._device)
        self.layout.fill(weights, initial)
        train = self._train
        # Plain SGD needs no gradient but for the moment in which a layer's own is known.
        direct = direction is None and train.optimizer == "sgd" and not (train.momentum or train.weight_decay)
        optimizer = StackedOptimizer(train, weights)
        gradient = torch.zeros(0 if direct else len(weights), self.layout.size, dtype=self._dtype, device=self._device)
        loss_sums = torch.zeros(len(block.clients), dtype=torch.float64, device=self._device)
        for step in range(plan.rows.shape[1]):
            k = plan.active(step)
            rows = torch.from_numpy(plan.rows[:k, step]).to(self._device)
            share = shares(plan.sizes[:k, step], rows.shape[1], self._dtype, self._device)
            now = self.layout.views(weights[:k])
            found = now if direct else self.layout.views(gradient[:k])

            def take(name: str, value: torch.Tensor, found: Tensors = found) -> None:
                if direct:
                    found[name].sub_(value, alpha=train.lr)
                else:
                    found[name].copy_(value)  # computed in one piece: a product into a row's slice is twice as slow

            losses = self._backward(x[rows], y[rows], share, now, take)
            if not direct:
                turn(direction, self.layout, gradient, weights, k)
                optimizer.step(weights[:k], gradient[:k])
            loss_sums[:k] += (losses.double() * (share > 0)).sum(1)
        return Stacked(weights, loss_sums.cpu().numpy(), np.sum(plan.sizes, axis=1))

    def _backward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        share: torch.Tensor,
        weights: Tensors,
        take: Callable[[str, torch.Tensor], None],
    ) -> torch.Tensor:
        """Hand every client's gradient to `take`, a parameter at a time, once its weights are no longer needed.

        Returns:
            The losses, shape (clients, batch).
        """
        values = self._forward(x, weights)
        outputs = values[-1]
        losses, slope = loss_gradient(self._task, outputs.flatten(0, 1), y.flatten(0, 1), share.flatten())
        back = slope.view_as(outputs)
        for i in range(len(self._layers) - 1, -1, -1):
            layer, entered = self._layers[i], values[i]
            if isinstance(layer, Linear):
                before = torch.bmm(back, weights[layer.weight]) if i else back
                take(layer.weight, torch.bmm(back.transpose(1, 2), entered))
                if layer.bias is not None:
                    take(layer.bias, back.sum(1))
                back = before
            elif isinstance(layer, Affine):
                back = back * layer.scale
            else:
                back = _through(layer.kind, back, entered, values[i + 1])
        return losses.view_as(share)

    def _forward(self, x: torch.Tensor, weights: Tensors) -> list[torch.Tensor]:
        """What enters each layer, and the outputs."""
        values = [x]
        for layer in self._layers:
            entered = values[-1]
            if isinstance(layer, Linear):
                matrix = weights[layer.weight].transpose(1, 2)
                if layer.bias is None:
                    values.append(torch.bmm(entered, matrix))
                else:
                    values.append(torch.baddbmm(weights[layer.bias][:, None], entered, matrix))
            elif isinstance(layer, Affine):
                values.append(layer.scale * entered + layer.shift)
            else:
                values.append(FUNCTIONS[layer.kind](entered))
        return values


def is_dense(chain: Chain) -> bool:
    """True when a `DenseTrainer` can train it: a leading flatten, then linear layers and element-wise functions."""
    rest = chain.layers[1:] if isinstance(chain.layers[0], Flatten) else chain.layers
    return all(isinstance(layer, Linear | Activation | Affine) for layer in rest)


def _through(kind: Kind, back: torch.Tensor, entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The gradient before an element-wise function, from the one after it."""
    match kind:
        case Kind.RELU:
            return torch.ops.aten.threshold_backward(back, left, 0)  # type: ignore[no-any-return]
        case Kind.TANH:
            return torch.ops.aten.tanh_backward(back, left)  # type: ignore[no-any-return]
        case Kind.SIGMOID:
            return torch.ops.aten.sigmoid_backward(back, left)  # type: ignore[no-any-return]
        case Kind.GELU:
            return torch.ops.aten.gelu_backward(back, entered)  # type: ignore[no-any-return]
        case Kind.GELU_TANH:
            return torch.ops.aten.gelu_backward(back, entered, approximate="tanh")  # type: ignore[no-any-return]
