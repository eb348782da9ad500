"""Blocks: some clients of a round that train together, one row of a stacked array each.

A block's clients stand in the order of falling step counts, so that those still training at any step are its first rows. How a
cohort is cut into blocks depends on the cohort, the model and the device alone, never on the number of workers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from fedlearn.learning.local import Place, epoch_orders
from fedlearn.learning.strategy import Pull

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Direction, Pass, Tensors
    from fedlearn.learning.task import Batch
    from fedlearn.privacy.site import SitePlan
    from fedlearn.study import TrainTable

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Named parameters as slices of one flat vector.

    Args:
        shapes: by name, in the model's order.
    """

    shapes: Mapping[str, tuple[int, ...]]
    slices: Mapping[str, slice] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        ends = list(itertools.accumulate((math.prod(shape) for shape in self.shapes.values()), initial=0))
        pairs = zip(self.shapes, itertools.pairwise(ends), strict=True)
        object.__setattr__(self, "slices", {name: slice(first, end) for name, (first, end) in pairs})
        object.__setattr__(self, "size", ends[-1])

    @classmethod
    def of(cls, parameters: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of named tensors."""
        return cls({name: tuple(p.shape) for name, p in parameters.items()})

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shape (..., size) as named tensors of shape (..., *shape) that share its memory."""
        lead = flat.shape[:-1]
        return {name: flat[..., part].view(*lead, *self.shapes[name]) for name, part in self.slices.items()}

    def fill(self, flat: torch.Tensor, tensors: Tensors) -> None:
        """Copy named tensors into `flat`; what has no leading client dimension goes to every row."""
        for name, view in self.views(flat).items():
            view.copy_(tensors[name])


@dataclass(frozen=True)
class Block:
    """Clients that train together.

    Args:
        seed: the study's.
        round: which round.
        clients: ids, in the order of falling step counts.
        data: each one's prepared training rows, none without rows.
    """

    seed: int
    round: int
    clients: tuple[str, ...]
    data: tuple[Batch, ...] = field(repr=False)

    @property
    def counts(self) -> IntArray:
        """Training rows of each client, shape (clients,)."""
        return np.array([len(batch) for batch in self.data], dtype=np.int64)

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Everybody's rows one after another, floats in `dtype`: x of shape (rows, ...) and y of shape (rows, ...)."""
        x = np.concatenate([batch.x for batch in self.data])
        y = np.concatenate([batch.y for batch in self.data])
        return _tensor(x, device, dtype), _tensor(y, device, dtype)


@dataclass(frozen=True)
class StepPlan:
    """Which rows each client of a block uses at each step of one pass.

    Args:
        rows: row numbers in the block's rows, shape (clients, steps, batch); a short batch is filled up with the client's first row.
        sizes: how many of them count, shape (clients, steps); 0 once a client has finished.
        steps: steps of each client, shape (clients,), falling.
        name: of the pass.
    """

    rows: IntArray
    sizes: IntArray
    steps: IntArray
    name: str

    @classmethod
    def of(cls, train: TrainTable, block: Block, pass_name: str) -> StepPlan:
        """The same batches as the sequential oracle's, client by client."""
        counts = block.counts
        size = min(train.batch_size, int(counts.max()))
        per_epoch = -(-counts // train.batch_size)
        steps = np.minimum(per_epoch * train.epochs, train.max_steps or np.iinfo(np.int64).max)
        first = np.cumsum(counts) - counts
        rows = np.empty((len(counts), int(per_epoch.max()) * train.epochs, size), dtype=np.int64)
        rows[:] = first[:, None, None]
        for i, client in enumerate(block.clients):
            n, each = int(counts[i]), int(per_epoch[i])
            mine = rows[i, : each * train.epochs].reshape(train.epochs, each * size)
            for epoch, order in enumerate(epoch_orders(train, Place(block.seed, block.round, client), pass_name, n)):
                mine[epoch, :n] += order
        rows = rows[:, : int(steps.max())]
        step = np.arange(rows.shape[1])
        left = counts[:, None] - train.batch_size * (step % per_epoch[:, None])
        sizes = np.where(step < steps[:, None], np.minimum(left, size), 0)
        return cls(rows, sizes, steps, pass_name)

    def active(self, step: int) -> int:
        """How many clients take this step: the first so many of the block."""
        return int(np.searchsorted(-self.steps, -step, side="left"))


@dataclass(frozen=True)
class Stacked:
    """What a pass of a block gives.

    Args:
        weights: each client's after its last step, flat, shape (clients, parameters).
        loss_sums: sum of the losses of all examples of all steps, shape (clients,), float64.
        loss_counts: how many those were, shape (clients,).
    """

    weights: torch.Tensor
    loss_sums: npt.NDArray[np.float64]
    loss_counts: IntArray


class BlockTrainer(Protocol):
    """Trains the clients of a block."""

    layout: Layout

    def run(self, initial: Tensors, direction: Direction | None, block: Block, plan: StepPlan) -> Stacked:
        """One pass of every client of a block.

        Args:
            initial: weights before the first step, by name, with or without a leading client dimension.
            direction: as in `strategy.Pass`; given and expected to return tensors with a leading client dimension.
            block: who, with their rows.
            plan: which rows at which step.
        """
        ...


@dataclass(frozen=True)
class SummedPass:
    """What a pass of a block gives where only the sum over its clients is asked for.

    Args:
        total: sum over clients of share times (weights after the last step - initial weights), flat, shape (parameters,).
        loss_sums: as in `Stacked`.
        loss_counts: as in `Stacked`.
    """

    total: torch.Tensor
    loss_sums: npt.NDArray[np.float64]
    loss_counts: IntArray


@runtime_checkable
class SummingTrainer(BlockTrainer, Protocol):
    """A trainer that is faster where nobody needs the clients' own updates."""

    def run_sum(
        self,
        initial: Tensors,
        direction: Pull | None,
        block: Block,
        plan: StepPlan,
        shares: npt.NDArray[np.float64],
    ) -> SummedPass:
        """One pass of every client of a block, summed; each client's update is not kept.

        Args:
            initial: weights before the first step, by name, without a client dimension.
            direction: None for the plain gradient, or a pull towards the initial weights.
            block: who, with their rows.
            plan: which rows at which step.
            shares: each client's factor in the sum, shape (clients,).
        """
        ...


@runtime_checkable
class PrivateTrainer(BlockTrainer, Protocol):
    """A trainer that does DP-SGD."""

    def run_private(
        self, initial: Tensors, direction: Direction | None, block: Block, sites: Sequence[SitePlan]
    ) -> Stacked:
        """DP-SGD for every client of a block, as `privacy.dpsgd.DpSgd` does it for one.

        It makes no claim: whoever makes the sites' plans knows whether their chance is secret, and what they cost. Losses and counts of the
        result are facts about people.

        Args:
            initial: weights before the first step, by name, with or without a leading client dimension.
            direction: what a noisy gradient is turned to; see `BlockTrainer.run`.
            block: who, with their rows.
            sites: each client's plan and chance, in the block's order. A client takes its plan's steps; they must not rise along the block.

        Raises:
            ValueError: there are not as many sites as clients, or their steps rise.
            DataError: a row without a group, under a group-level plan.
        """
        ...


class StackedOptimizer:
    """torch's SGD, Adam and AdamW on the rows of a stack; the rows that still train are its first ones.

    Args:
        train: which optimiser, and its hyper-parameters.
        like: the stack of weights, shape (clients, parameters).
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, train: TrainTable, like: torch.Tensor) -> None:
        self._train, self._steps = train, 0
        adam = train.optimizer != "sgd"
        self._first = torch.zeros_like(like) if adam or train.momentum else like.new_empty(0)
        self._second = torch.zeros_like(like) if adam else like.new_empty(0)

    def step(self, weights: torch.Tensor, gradient: torch.Tensor) -> None:
        """Move `weights`, the first rows of the stack, along `gradient`, which is overwritten."""
        self._steps += 1
        train, active = self._train, len(weights)
        if train.weight_decay and train.optimizer == "adamw":
            weights.mul_(1 - train.lr * train.weight_decay)
        elif train.weight_decay:
            gradient.add_(weights, alpha=train.weight_decay)
        if train.optimizer == "sgd":
            if train.momentum:
                gradient = self._first[:active].mul_(train.momentum).add_(gradient)
            weights.sub_(gradient, alpha=train.lr)
            return
        beta1, beta2 = self.BETAS
        first = self._first[:active].lerp_(gradient, 1 - beta1)
        second = self._second[:active].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = math.sqrt(1 - beta2**self._steps)
        denominator = second.sqrt().div_(scale).add_(self.EPSILON)
        weights.addcdiv_(first, denominator, value=-train.lr / (1 - beta1**self._steps))


def turn(
    direction: Direction | None, layout: Layout, gradient: torch.Tensor, weights: torch.Tensor, active: int
) -> None:
    """Replace the gradient of the first `active` clients by a client rule's direction, in place.

    The rule sees every row, since what it holds of each client (a control variate, say) has a row for every client.
    """
    if direction is not None:
        turned = direction(layout.views(gradient), layout.views(weights))
        layout.fill(gradient[:active], {name: tensor[:active] for name, tensor in turned.items()})


def is_common(one: Pass) -> bool:
    """Whether a pass is the same for all clients: along the plain gradient, or pulled towards where it starts."""
    return one.direction is None or (isinstance(one.direction, Pull) and one.direction.anchor is one.initial)


def steps_of(train: TrainTable, count: int) -> int:
    """How many steps a client with `count` training rows takes in one pass."""
    steps = train.epochs * -(-count // train.batch_size)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def by_steps(train: TrainTable, clients: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Positions of a block's clients in the order of falling step counts; equals stay in their order."""
    return sorted(range(len(clients)), key=lambda i: -steps_of(train, counts[i]))


def _tensor(array: npt.NDArray[Any], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array).to(device)
    return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
