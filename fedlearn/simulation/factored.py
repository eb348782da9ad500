"""Linear layers of many clients without many matrices: what they share, minus a product of two thin ones each.

After t steps of SGD client i's matrix is

    W_i = p_t W_0 + sum over s < t of q_{t,s} G_{i,s}^T A_{i,s}

with A_{i,s} the layer's inputs in step s, shape (batch, in), G_{i,s} the loss's gradient with respect to its outputs, shape (batch,
out), and numbers p and q that the hyper-parameters give: the chain rule for a linear layer, summed over steps. So x W_i^T is a product with
the W_0 of all, taken for everybody's examples at once, and two thin products. Exact up to rounding, and no W_i is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlearn.simulation.blocks import Layout, StackedOptimizer
from fedlearn.simulation.gradients import backward_all, forward_all, has_parameters, loss_gradient
from fedlearn.simulation.layers import Layer, Linear

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import StepPlan
    from fedlearn.simulation.gradients import Rows, Saved
    from fedlearn.study import TrainTable

Coefficients = npt.NDArray[np.float64]


def sgd_course(train: TrainTable, steps: int, pull: float = 0.0) -> Coefficients:
    """Weights after each step of SGD as combinations of the first weights and the gradients so far.

    torch's rule, v <- momentum v + (g + pull (w - w_0) + decay w), w <- w - lr v, followed on coefficients.

    Returns:
        Shape (steps + 1, 1 + steps): row t holds p_t and then q_{t,s} for each step s, 0 for s >= t.
    """
    course = np.zeros((steps + 1, 1 + steps))
    course[0, 0] = 1.0
    velocity = np.zeros(1 + steps)
    for step in range(steps):
        velocity = train.momentum * velocity + train.weight_decay * course[step] + pull * (course[step] - course[0])
        velocity[1 + step] += 1.0
        course[step + 1] = course[step] - train.lr * velocity
    return course


@dataclass(frozen=True)
class Sum:
    """A sum over clients of share (weights - initial weights), taken while they train.

    Args:
        shares: shape (clients,).
        total: by name, what the sum is added to.
    """

    shares: Coefficients
    total: Tensors


class FactoredLinear:
    """One linear layer's matrix in a block of clients, from a common start.

    Args:
        weight: the common W_0, shape (out, in); only read.
        course: of `sgd_course`.
        sizes: examples of each client at each step, shape (clients, steps); 0 once a client has finished.
        into: shares, shape (clients,), and a tensor, shape (out, in), to which the sum of share (W_i - W_0) is added; None when
            every client's matrix is asked for.
    """

    def __init__(
        self,
        weight: Tensor,
        course: Coefficients,
        sizes: npt.NDArray[np.int64],
        into: tuple[Coefficients, Tensor] | None = None,
    ) -> None:
        self._weight, self._course, self._sizes, self._into = weight, course, sizes, into
        self._steps = (sizes > 0).sum(1)
        self._inputs: list[Tensor] = []
        self._backs: list[Tensor] = []
        self._turned: list[Tensor] = []
        for i, steps in enumerate(self._steps):
            # Nobody asks for the last step's factors again where they went straight into a sum.
            rank = int(sizes[i, : steps if into is None else max(steps - 1, 0)].sum())
            self._inputs.append(weight.new_empty(rank, weight.shape[1]))
            self._backs.append(weight.new_empty(rank, weight.shape[0]))
        self._filled = [0] * len(sizes)
        if into is not None and (decay := float(into[0] @ (course[self._steps, 0] - 1.0))):
            into[1].add_(weight, alpha=decay)

    def forward(self, x: Tensor, step: int, counts: list[int]) -> Tensor:
        """x W_i^T for each client's rows; shape (rows, out).

        Args:
            x: the active clients' inputs one after another, shape (rows, in).
            step: which step this is, from 0.
            counts: how many rows are whose.
        """
        y = x @ self._weight.t()
        if self._course[step, 0] != 1.0:
            y.mul_(self._course[step, 0])
        self._turned = [self._scaled(i, step) for i in range(len(counts))]
        if step:
            for i, (mine, rows) in enumerate(zip(torch.split(y, counts), torch.split(x, counts), strict=True)):
                mine.addmm_(rows @ self._past(self._inputs, i).t(), self._turned[i])
        return y

    def backward(self, g: Tensor, x: Tensor, step: int, counts: list[int], *, wants_input: bool) -> Tensor | None:
        """Remember a step's factors; the gradient with respect to its inputs, shape (rows, in), if it is wanted.

        Args:
            g: gradient with respect to what `forward` returned, shape (rows, out).
            x: as in `forward`.
            step: as in `forward`.
            counts: as in `forward`.
            wants_input: whether anything before this layer is trained.
        """
        back = None
        if wants_input:
            back = g @ self._weight
            if self._course[step, 0] != 1.0:
                back.mul_(self._course[step, 0])
            if step:
                for i, (mine, rows) in enumerate(zip(torch.split(back, counts), torch.split(g, counts), strict=True)):
                    mine.addmm_(rows @ self._turned[i].t(), self._past(self._inputs, i))
        self._remember(g, x, step, counts)
        return back

    def row(self, client: int, out: Tensor) -> None:
        """Write one client's matrix, shape (out, in)."""
        steps = int(self._steps[client])
        out.copy_(self._weight)
        out.addmm_(self._scaled(client, steps).t(), self._inputs[client], beta=float(self._course[steps, 0]))

    def _remember(self, g: Tensor, x: Tensor, step: int, counts: list[int]) -> None:
        if self._into is not None:
            shares, total = self._into
            last = self._course[self._steps[: len(counts)], 1 + step] * shares[: len(counts)]
            total.addmm_((g * torch.from_numpy(np.repeat(last, counts)).to(g.dtype)[:, None]).t(), x)
        for i, (back, rows) in enumerate(zip(torch.split(g, counts), torch.split(x, counts), strict=True)):
            if self._filled[i] < len(self._inputs[i]):
                now = slice(self._filled[i], self._filled[i] + len(rows))
                self._inputs[i][now] = rows
                self._backs[i][now] = back
                self._filled[i] = now.stop

    def _past(self, factors: list[Tensor], client: int) -> Tensor:
        return factors[client][: self._filled[client]]

    def _scaled(self, client: int, step: int) -> Tensor:
        """The output factor so far times its coefficients after `step` steps, shape (rank, out)."""
        each = np.repeat(self._course[step, 1 : 1 + step], self._sizes[client, :step])
        return self._past(self._backs, client) * torch.from_numpy(each).to(self._weight.dtype)[:, None]


class ChannelsLast(Layout):
    """A layout in which weights of convolutions lie in memory as oneDNN wants them beside images with their channels last."""

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        views = super().views(flat)
        for name, shape in self.shapes.items():
            if len(shape) == 4:
                out, channels, height, width = shape
                views[name] = views[name].view(*flat.shape[:-1], out, height, width, channels).movedim(-1, -3)
        return views


def wide_layers(layers: Sequence[Layer], layout: Layout, rank: int) -> frozenset[str]:
    """Names of the matrices for which thin products of a rank cost less than the matrix itself."""
    matrices = {layer.weight: layout.shapes[layer.weight] for layer in layers if isinstance(layer, Linear)}
    return frozenset(name for name, (out, width) in matrices.items() if rank * (out + width) < out * width)


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
