"""A client's optimiser: torch's own steps, without torch's `Optimizer`.

Making one of those loads torch's compiler, which takes longer than a small study's first round. The steps are the same functions with the
same arguments, so the bytes are those of `torch.optim.SGD`, `Adam` and `AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

if TYPE_CHECKING:
    from fedlearn.study import TrainTable

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class ClientOptimizer(Protocol):
    """Moves a client's parameters."""

    def step(self, directions: Sequence[torch.Tensor]) -> None:
        """One step, in place.

        Args:
            directions: one a parameter, shaped like it: a gradient, or what the client rule makes of it.
        """
        ...


def make_optimizer(train: TrainTable, parameters: Sequence[torch.Tensor]) -> ClientOptimizer:
    """A fresh optimiser, as [train] says."""
    return Sgd(train, parameters) if train.optimizer == "sgd" else Adam(train, parameters)


class Sgd:
    """Stochastic gradient descent with momentum (dampening 0) and an L2 penalty.

    Args:
        train: lr, momentum, weight_decay.
        parameters: to be moved.
    """

    def __init__(self, train: TrainTable, parameters: Sequence[torch.Tensor]) -> None:
        self._train, self._parameters = train, list(parameters)
        self._momenta: list[torch.Tensor | None] = [None] * len(self._parameters)

    @torch.no_grad()
    def step(self, directions: Sequence[torch.Tensor]) -> None:
        sgd(
            self._parameters,
            list(directions),
            self._momenta,
            lr=self._train.lr,
            momentum=self._train.momentum,
            weight_decay=self._train.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class Adam:
    """Adam (Kingma and Ba 2015), or AdamW (Loshchilov and Hutter 2019), with torch's default betas and epsilon.

    Args:
        train: optimizer, lr, weight_decay.
        parameters: to be moved.
    """

    def __init__(self, train: TrainTable, parameters: Sequence[torch.Tensor]) -> None:
        self._train, self._parameters = train, list(parameters)
        self._means = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self._parameters]
        self._squares = [torch.zeros_like(p, memory_format=torch.preserve_format) for p in self._parameters]
        self._steps = [torch.tensor(0.0) for _ in self._parameters]

    @torch.no_grad()
    def step(self, directions: Sequence[torch.Tensor]) -> None:
        adam(
            self._parameters,
            list(directions),
            self._means,
            self._squares,
            [],
            self._steps,
            decoupled_weight_decay=self._train.optimizer == "adamw",
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self._train.lr,
            weight_decay=self._train.weight_decay,
            eps=EPS,
            maximize=False,
        )
