"""Linear layers of many clients without many matrices: what they share, minus a product of two thin ones each.

After t steps of SGD client i's matrix is

    W_i = p_t W_0 + sum over s < t of q_{t,s} G_{i,s}^T A_{i,s}

with A_{i,s} the layer's inputs in step s, shape (batch, in), G_{i,s} the loss's gradient with respect to its outputs, shape (batch,
out), and numbers p and q that the hyper-parameters give: the chain rule for a linear layer, summed over steps. So x W_i^T is a product with
the W_0 of all, taken for everybody's examples at once, and two thin products. Exact up to rounding, and no W_i is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlearn.simulation.layers import Layer, Linear

if TYPE_CHECKING:
    from fedlearn.simulation.blocks import Layout
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


def wide_layers(layers: Sequence[Layer], layout: Layout, rank: int) -> frozenset[str]:
    """Names of the matrices for which thin products of a rank cost less than the matrix itself."""
    matrices = {layer.weight: layout.shapes[layer.weight] for layer in layers if isinstance(layer, Linear)}
    return frozenset(name for name, (out, width) in matrices.items() if rank * (out + width) < out * width)
