"""Which way a study's clients are trained together: decided from the model, the device and the study, never from the machine's load."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from fedlearn.learning.local import trainable
from fedlearn.simulation.blocks import Block, StepPlan
from fedlearn.simulation.chain import Chain, NotAChain, chain_of
from fedlearn.simulation.dense import DenseTrainer, is_dense
from fedlearn.simulation.general import GeneralTrainer
from fedlearn.simulation.layers import Linear
from fedlearn.simulation.single import SingleTrainer

if TYPE_CHECKING:
    from fedlearn.learning.task import Batch, Task
    from fedlearn.simulation.blocks import BlockTrainer
    from fedlearn.study import Study


class Way(StrEnum):
    """How a block of clients is trained."""

    DENSE = "dense"
    CONVOLUTION = "convolution"
    GENERAL = "general"
    SINGLE = "single"
    SEQUENTIAL = "sequential"


STACK_BYTES: Final = 128 * 1024**2
"""What the stacked weights, gradients and optimiser state of one block may take."""
MOST_CLIENTS: Final = {Way.DENSE: 100, Way.CONVOLUTION: 10, Way.GENERAL: 32}
"""Clients of a block; measured in benchmarks/results/simulation.md."""
COPIES: Final = 6
"""Stacks of the weights' size that a block needs at most: weights, gradient, two moments, one temporary, the delta."""
VMAP_PARAMETERS: Final = 100_000
"""Above this, one client's step keeps a CPU core busy by itself, and vmap's larger stacks only leave the cache."""


@dataclass(frozen=True)
class TrainingPlan:
    """How blocks are trained.

    Args:
        way: by which trainer.
        block: clients of a block.
        reason: why this way, for a person.
        chain: the model's layers, for the ways that need them.
    """

    way: Way
    block: int
    reason: str
    chain: Chain | None = None

    def trainer(self, task: Task, model: torch.nn.Module, study: Study) -> BlockTrainer:
        """A trainer with a model of its own; one for each thread."""
        model = copy.deepcopy(model)
        if self.way is Way.DENSE:
            assert self.chain is not None
            return DenseTrainer(task, model, self.chain, study.train)
        if self.way is Way.CONVOLUTION:
            from fedlearn.simulation.convolution import ConvTrainer

            assert self.chain is not None
            return ConvTrainer(task, model, self.chain, study.train)
        return (GeneralTrainer if self.way is Way.GENERAL else SingleTrainer)(task, model, study.train)


def plan_training(
    task: Task, model: torch.nn.Module, study: Study, example: Batch, *, sums_only: bool = False
) -> TrainingPlan:
    """The plan for a study.

    Args:
        task: gives the loss.
        model: on the device to train on, in the study's precision.
        study: its [train] table matters.
        example: some training rows, at least one and better three different ones; the model is tried on them.
        sums_only: nobody needs a client's own update, see `runner.asks_for_sums_only`; no stack is then made for convolutions.
    """
    tried = _try(task, model, example)
    if tried.drew:
        return TrainingPlan(Way.SEQUENTIAL, 1, "the model draws random numbers in training, each client its own")
    if study.train.precision == "bfloat16":
        return TrainingPlan(Way.SINGLE, 1, "bfloat16 rounds differently in a batch of another shape")
    if tried.reason:
        return TrainingPlan(Way.SINGLE, 1, tried.reason)
    chain = _chain_for(model, example)
    device = next(model.parameters()).device
    if isinstance(chain, Chain) and is_dense(chain):
        return _plan(Way.DENSE, model, "linear layers and element-wise functions: stacked, own backward pass", chain)
    if study.privacy is not None and study.privacy.unit != "client":
        return TrainingPlan(Way.SINGLE, 1, "DP-SGD is written out for linear layers and element-wise functions alone")
    if isinstance(chain, Chain) and device.type == "cpu":
        each = _convolution_bytes(chain, model, study, example, sums_only=sums_only)
        block = max(1, min(MOST_CLIENTS[Way.CONVOLUTION], STACK_BYTES // each))
        return TrainingPlan(
            Way.CONVOLUTION, block, "a chain with convolutions on a CPU: client by client, fused", chain
        )
    count = sum(p.numel() for p in trainable(model).values())
    if device.type == "cpu" and count > VMAP_PARAMETERS:
        return TrainingPlan(Way.SINGLE, 1, f"{count} parameters: a client by itself keeps a CPU core busy")
    reason = _vmap_fails(task, model, study, example)
    if reason:
        return TrainingPlan(Way.SINGLE, 1, reason)
    return _plan(Way.GENERAL, model, chain.reason if isinstance(chain, NotAChain) else f"convolutions on {device}")


def _chain_for(model: torch.nn.Module, example: Batch) -> Chain | NotAChain:
    """The model's layers, where each example that comes to a linear layer is one row: what the written-out ways know."""
    chain = chain_of(model)
    if isinstance(chain, Chain):
        shapes = (example.x.shape[1:], *chain.shapes(model, example.x.shape[1:]))
        if any(
            isinstance(layer, Linear) and len(shape) > 1 for shape, layer in zip(shapes, chain.layers, strict=False)
        ):
            return NotAChain("a linear layer takes more than a row of each example")
    return chain


def _plan(way: Way, model: torch.nn.Module, reason: str, chain: Chain | None = None) -> TrainingPlan:
    row = sum(p.numel() * p.element_size() for p in trainable(model).values())
    fitting = STACK_BYTES // (COPIES * row)
    return TrainingPlan(way, max(1, min(MOST_CLIENTS[way], fitting)), reason, chain)


def _convolution_bytes(chain: Chain, model: torch.nn.Module, study: Study, example: Batch, *, sums_only: bool) -> int:
    """What a client adds to a block of convolutions: what its layers put out in a step, and its stacks.

    Where only sums are asked for, no matrix of a linear layer has a row for each client; see `factored`.
    """
    parameters = trainable(model)
    size = next(iter(parameters.values())).element_size()
    outputs = sum(math.prod(shape) for shape in chain.shapes(model, example.x.shape[1:]))
    matrices = {layer.weight for layer in chain.layers if sums_only and isinstance(layer, Linear)}
    stacked = sum(p.numel() for name, p in parameters.items() if name not in matrices)
    return size * (outputs * study.train.batch_size + COPIES * stacked)


@dataclass(frozen=True)
class _Tried:
    """What a trial of a model showed: whether it draws, and why its clients' examples may not share a batch."""

    drew: bool = False
    reason: str = ""


def _try(task: Task, model: torch.nn.Module, example: Batch) -> _Tried:
    x, y = _three_rows(model, example)
    model.train()
    before = torch.get_rng_state()
    try:
        with torch.no_grad():
            three, two = task.loss(model(x), y), task.loss(model(x[:2]), y[:2])
    except Exception as error:  # whatever a user's model raises; training it will say so again
        return _Tried(reason=f"the model cannot be tried: {_first_line(error)}")
    finally:
        after = torch.get_rng_state()
        torch.set_rng_state(before)
    if not torch.equal(before, after):
        return _Tried(drew=True)
    if three.shape != (3,):
        return _Tried(reason=f"the loss has shape {tuple(three.shape)}, expected one for each example")
    if not torch.allclose(three[:2], two, rtol=1e-4, atol=1e-6):
        return _Tried(reason="an example's loss depends on the others of its batch")
    return _Tried()


def _vmap_fails(task: Task, model: torch.nn.Module, study: Study, example: Batch) -> str:
    """Why vmap cannot train this model; empty when it can."""
    probe = study.train.model_copy(update={"max_steps": 1, "batch_size": 2})
    block = Block(0, 0, ("a", "b"), (example, example))
    mine = copy.deepcopy(model)
    initial = {name: p.detach() for name, p in trainable(mine).items()}
    try:
        GeneralTrainer(task, mine, probe).run(initial, None, block, StepPlan.of(probe, block, "probe"))
    except Exception as error:  # vmap says in many ways that it has no rule for something
        return f"vmap cannot follow the model: {_first_line(error)}"
    return ""


def _three_rows(model: torch.nn.Module, example: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The first three rows, or as many with the last one repeated, as the model takes them."""
    first = next(iter(trainable(model).values()))
    rows = np.minimum(np.arange(3), len(example) - 1)
    x, y = (torch.from_numpy(array[rows]).to(first.device) for array in (example.x, example.y))
    x, y = (tensor.to(first.dtype) if tensor.dtype == torch.float32 else tensor for tensor in (x, y))
    return x, y


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).partition("\n")[0][:200]
