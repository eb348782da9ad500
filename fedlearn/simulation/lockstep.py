"""Clients of a block in step: their wide matrices factored, what they share computed once, everything else a row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlearn.simulation.blocks import Layout, StackedOptimizer
from fedlearn.simulation.factored import Coefficients, FactoredLinear, sgd_course
from fedlearn.simulation.gradients import backward_all, forward_all, has_parameters, loss_gradient
from fedlearn.simulation.layers import Layer, Linear

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import StepPlan
    from fedlearn.simulation.gradients import Rows, Saved
    from fedlearn.study import TrainTable


@dataclass(frozen=True)
class Sum:
    """A sum over clients of share (weights - initial weights), taken while they train.

    Args:
        shares: shape (clients,).
        total: by name, what the sum is added to.
    """

    shares: Coefficients
    total: Tensors


class ChannelsLast(Layout):
    """A layout in which weights of convolutions lie in memory as oneDNN wants them beside images with their channels last."""

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        views = super().views(flat)
        for name, shape in self.shapes.items():
            if len(shape) == 4:
                out, channels, height, width = shape
                views[name] = views[name].view(*flat.shape[:-1], out, height, width, channels).movedim(-1, -3)
        return views


class FactoredCohort:
    """A block's clients under plain SGD, in step: their wide matrices factored, all other parameters a row each.

    Args:
        task: gives the loss of each example.
        layers: the model's.
        train: local hyper-parameters; SGD.
        initial: the common weights by name.
        wide: names of the matrices to factor.
        plan: which rows at which step.
        pull: strength of the pull towards the common weights.
        into: the sum that is asked for; None when it is every client's weights.
    """

    def __init__(
        self,
        task: Task,
        layers: Sequence[Layer],
        train: TrainTable,
        initial: Tensors,
        wide: frozenset[str],
        plan: StepPlan,
        pull: float = 0.0,
        into: Sum | None = None,
    ) -> None:
        self._task, self._plan, self._pull, self._into = task, plan, pull, into
        course = sgd_course(train, int(plan.steps.max()), pull)
        parts = {name: None if into is None else (into.shares, into.total[name]) for name in wide}
        self._wide = {name: FactoredLinear(initial[name], course, plan.sizes, parts[name]) for name in wide}
        self._segments = _segments(layers, wide)
        start = {name: tensor for name, tensor in initial.items() if name not in wide}
        self._layout = ChannelsLast.of(start)
        self._first = torch.empty(self._layout.size, dtype=next(iter(initial.values())).dtype)
        self._layout.fill(self._first, start)
        self._own = self._first.repeat(len(plan.steps), 1)
        self._gradient = torch.zeros_like(self._own)
        self._views = [
            (self._layout.views(w), self._layout.views(g)) for w, g in zip(self._own, self._gradient, strict=True)
        ]
        self._optimizer = StackedOptimizer(train, self._own)

    def run(self, rows: Rows) -> npt.NDArray[np.float64]:
        """All steps of all clients; returns each client's sum of losses, shape (clients,)."""
        loss_sums = torch.zeros(len(self._own), dtype=torch.float64)
        for step in range(self._plan.rows.shape[1]):
            active = self._plan.active(step)
            counts = self._plan.sizes[:active, step].tolist()
            batches = [rows.take(self._plan.rows[i, step, :n]) for i, n in enumerate(counts)]
            losses = self._backward([x for x, _ in batches], torch.cat([y for _, y in batches]), step, counts)
            own, gradient = self._own[:active], self._gradient[:active]
            if self._pull:
                gradient.add_(own - self._first, alpha=self._pull)
            self._optimizer.step(own, gradient)
            loss_sums[:active] += torch.stack([part.sum() for part in torch.split(losses.double(), counts)])
        if self._into is not None:
            shares = torch.from_numpy(self._into.shares).to(self._own.dtype)
            start = self._layout.views(self._first)
            for name, own in self._layout.views(self._own).items():
                self._into.total[name].add_(torch.tensordot(shares, own - start[name], dims=1))
        return loss_sums.numpy()

    def write(self, weights: Tensors) -> None:
        """Every client's weights, by name, into tensors of shape (clients, ...)."""
        for name, own in self._layout.views(self._own).items():
            weights[name].copy_(own)
        for name, factored in self._wide.items():
            for i, out in enumerate(weights[name]):
                factored.row(i, out)

    def _backward(self, xs: list[Tensor], y: Tensor, step: int, counts: list[int]) -> Tensor:
        """One step's gradients of all active clients into their rows; returns all examples' losses."""
        tape: list[Tensor | list[list[Saved]]] = []
        for segment in self._segments:
            if isinstance(segment, Linear):
                xs, joint = self._wide_forward(segment, xs, step, counts)
                tape.append(joint)
            else:
                done = [forward_all(segment, x, self._views[i][0]) for i, x in enumerate(xs)]
                xs = [x for x, _ in done]
                tape.append([saved for _, saved in done])
        share = torch.cat([y.new_full((n,), 1 / n, dtype=self._own.dtype) for n in counts])
        losses, back = loss_gradient(self._task, torch.cat(xs), y, share)
        for at in range(len(self._segments) - 1, -1, -1):
            wants_input = any(_trained(segment) for segment in self._segments[:at])
            found = self._back(self._segments[at], back, tape[at], step, counts, wants_input=wants_input)
            if found is None:
                break
            back = found
        return losses

    def _wide_forward(
        self, layer: Linear, xs: list[Tensor], step: int, counts: list[int]
    ) -> tuple[list[Tensor], Tensor]:
        joint = torch.cat(xs)
        outputs = list(torch.split(self._wide[layer.weight].forward(joint, step, counts), counts))
        if layer.bias is not None:
            for i, out in enumerate(outputs):
                out.add_(self._views[i][0][layer.bias])
        return outputs, joint

    def _back(
        self,
        segment: _Segment,
        back: Tensor,
        saved: Tensor | list[list[Saved]],
        step: int,
        counts: list[int],
        *,
        wants_input: bool,
    ) -> Tensor | None:
        parts = torch.split(back, counts)
        if isinstance(segment, Linear):
            assert isinstance(saved, Tensor)
            if segment.bias is not None:
                for i, part in enumerate(parts):
                    torch.sum(part, 0, out=self._views[i][1][segment.bias])
            return self._wide[segment.weight].backward(back, saved, step, counts, wants_input=wants_input)
        assert not isinstance(saved, Tensor)
        found = [
            backward_all(segment, part, saved[i], *self._views[i], wants_input=wants_input)
            for i, part in enumerate(parts)
        ]
        return torch.cat([part for part in found if part is not None]) if wants_input else None


_Segment = Linear | tuple[Layer, ...]


def _segments(layers: Sequence[Layer], wide: frozenset[str]) -> tuple[_Segment, ...]:
    """The layers cut at the wide ones."""
    segments: list[_Segment] = []
    between: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Linear) and layer.weight in wide:
            segments += [tuple(between), layer]
            between = []
        else:
            between.append(layer)
    return tuple(segment for segment in (*segments, tuple(between)) if segment)


def _trained(segment: _Segment) -> bool:
    return isinstance(segment, Linear) or any(has_parameters(layer) for layer in segment)
