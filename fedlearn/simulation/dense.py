"""Fully connected nets, many clients at a time: stacked matrices, with the backward pass written out.

For small nets a step is all overhead. One batched product a layer serves every client of the block, and writing the backward pass out
spares autograd's graph: only the task's loss, a function of the outputs, is differentiated by torch. It also brings out what enters a
layer and the gradient of what leaves it, of which DP-SGD's clipped sums are made (`clipped.py`).
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from fedlearn.errors import UnsupportedError
from fedlearn.learning.local import trainable
from fedlearn.privacy.steps import NoisySteps
from fedlearn.simulation.blocks import Layout, Stacked, StackedOptimizer, turn
from fedlearn.simulation.chain import Chain
from fedlearn.simulation.clipped import Clipped, Factors, clip
from fedlearn.simulation.drawn import Drawn, PrivateStacked
from fedlearn.simulation.general import shares
from fedlearn.simulation.gradients import loss_gradient
from fedlearn.simulation.layers import FUNCTIONS, Activation, Affine, Flatten, Kind, Linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.learning.task import Task
    from fedlearn.privacy.site import SitePlan
    from fedlearn.simulation.blocks import Block, StepPlan
    from fedlearn.study import TrainTable

PART_ROWS: Final = 1 << 14
"""Rows of all clients together that DP-SGD works off at a time: a Poisson batch has no largest size."""


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
        x, y = self._rows(block)
        weights = self._start(initial, len(block.clients))
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
            losses, factors = self._backward(x[rows], y[rows], share, now)
            for one in factors:
                for name, value in one.sums().items():
                    if direct:
                        found[name].sub_(value, alpha=train.lr)
                    else:
                        found[name].copy_(value)  # computed in one piece: a product into a row's slice is twice as slow
            if not direct:
                turn(direction, self.layout, gradient, weights, k)
                optimizer.step(weights[:k], gradient[:k])
            loss_sums[:k] += (losses.double() * (share > 0)).sum(1)
        return Stacked(weights, loss_sums.cpu().numpy(), np.sum(plan.sizes, axis=1))

    def run_private(
        self, initial: Tensors, direction: Direction | None, block: Block, sites: Sequence[SitePlan]
    ) -> PrivateStacked:
        steps = np.array([site.plan.steps for site in sites])
        if len(sites) != len(block.clients) or (np.diff(steps) > 0).any():
            raise ValueError("sites: expected one for each client of the block, in the order of falling steps")
        noisy = [
            NoisySteps(int(rows), site.plan, site.chance, groups=site.groups)
            for rows, site in zip(block.counts, sites, strict=True)
        ]
        x, y = self._rows(block)
        weights = self._start(initial, len(sites))
        optimizer = StackedOptimizer(self._train, weights)
        gradient = torch.zeros_like(weights)
        loss_sums, loss_counts = np.zeros(len(sites)), np.zeros(len(sites), dtype=np.int64)
        first = np.cumsum(block.counts) - block.counts
        for step in range(int(steps[0])):
            k = int((steps > step).sum())
            active, sums = noisy[:k], gradient[:k]
            drawn = Drawn.of(active, first[:k])
            clipped = self._clipped(x, y, drawn, [one.clip_l2 for one in active], self.layout.views(weights[:k]))
            self.layout.fill(sums, clipped.sums)
            loss_sums[:k] += clipped.loss_sums
            loss_counts[:k] += clipped.counts
            not_finite = drawn.sizes - clipped.counts
            here = sums.cpu()
            facts = zip(active, here.numpy(), clipped.unclipped.tolist(), not_finite.tolist(), strict=True)
            for one, mine, unclipped, broken in facts:
                one.release([mine], unclipped=unclipped, not_finite=broken)
            sums.copy_(here)
            turn(direction, self.layout, gradient, weights, k)
            optimizer.step(weights[:k], sums)
        return PrivateStacked(weights, loss_sums, loss_counts, tuple(one.tally for one in noisy))

    def _clipped(self, x: torch.Tensor, y: torch.Tensor, drawn: Drawn, clips: list[float], weights: Tensors) -> Clipped:
        """Every client's clipped sum over its batch, worked off in parts where batches are large."""
        bounds = torch.tensor(clips, dtype=self._dtype, device=self._device)
        parts = []
        for part in drawn.parts(max(1, PART_ROWS // len(clips))):
            rows, inside = (torch.from_numpy(a).to(self._device) for a in (part.rows, part.inside))
            losses, factors = self._backward(x[rows], y[rows], inside.to(self._dtype), weights)
            parts.append(clip(list(factors), losses, inside, bounds))
        return reduce(Clipped.plus, parts)

    def _rows(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = block.tensors(self._device, self._dtype)
        return (x if self._flat else x.flatten(1)), y

    def _start(self, initial: Tensors, clients: int) -> torch.Tensor:
        weights = torch.empty(clients, self.layout.size, dtype=self._dtype, device=self._device)
        self.layout.fill(weights, initial)
        return weights

    def _backward(
        self, x: torch.Tensor, y: torch.Tensor, share: torch.Tensor, weights: Tensors
    ) -> tuple[torch.Tensor, Iterator[Factors]]:
        """The losses, shape (clients, batch), and what each linear layer's gradients are made of, last layer first.

        Args:
            x: shape (clients, batch, features).
            y: labels, shape (clients, batch, ...).
            share: each example's weight in the loss, shape (clients, batch).
            weights: every client's; a layer's are not needed any more once its factors are out.
        """
        values = self._forward(x, weights)
        outputs = values[-1]
        losses, slope = loss_gradient(self._task, outputs.flatten(0, 1), y.flatten(0, 1), share.flatten())
        return losses.view_as(share), self._factors(values, slope.view_as(outputs), weights)

    def _factors(self, values: list[torch.Tensor], back: torch.Tensor, weights: Tensors) -> Iterator[Factors]:
        for i in range(len(self._layers) - 1, -1, -1):
            layer, entered = self._layers[i], values[i]
            if isinstance(layer, Linear):
                before = torch.bmm(back, weights[layer.weight]) if i else back
                yield Factors(layer, entered, back)
                back = before
            elif isinstance(layer, Affine):
                back = back * layer.scale
            else:
                back = _through(layer.kind, back, entered, values[i + 1])

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
