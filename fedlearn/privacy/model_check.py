"""Whether a model can train under record-level privacy, which layer cannot, and why. rewriting.py replaces what can be.

Three questions are put to the layers (are there running statistics, tied weights, layers that mix examples?), and three to the
running model, because a layer's kind says nothing of what a `forward` does with it: does one example's output depend on another example, does
a forward pass change a buffer, and do the per-example gradients add up to the gradient of the batch?
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from fedlearn.errors import DataError, FedlearnError
from fedlearn.privacy import ghost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedlearn.privacy.dpsgd import GradientEngine

_TOLERANCE: Final = 1e-4


class Path(Enum):
    """How a model's gradients are clipped."""

    FAST = "fast"
    GENERAL = "opacus"
    NONE = "none"


@dataclass(frozen=True)
class Finding:
    """One thing that is in the way.

    Args:
        where: the layer's or buffer's name; empty for the model as a whole.
        kind: the layer's class.
        why: it rules out per-example privacy, or the fast path.
        remedy: what to do.
        fatal: whether the model cannot train under a record-level plan because of it.
    """

    where: str
    kind: str
    why: str
    remedy: str
    fatal: bool


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        path: how gradients would be clipped; `NONE` when something fatal was found.
        findings: in the order of the layers.
        parameters: trainable numbers.
    """

    path: Path
    findings: tuple[Finding, ...]
    parameters: int

    @property
    def ok(self) -> bool:
        """True when the model can train under a record-level plan."""
        return self.path is not Path.NONE


def check_model(model: nn.Module, x: torch.Tensor) -> Report:
    """Look at a model, and run it.

    Args:
        model: is left as it was.
        x: at least two examples as the model is fed them, shape (batch, ...).

    Raises:
        DataError: fewer than two examples, or the model does not run on them.
    """
    if len(x) < 2:
        raise DataError(f"check-model: got {len(x)} examples, expected at least 2 to see whether one touches another")
    findings = [*_layers(model)]
    findings += _running(copy.deepcopy(model), x)
    path = Path.FAST
    if not any(one.fatal for one in findings) and (slow := ghost.unsupported(model)):
        refused = _refused_by_opacus(model)
        path = Path.GENERAL
        for why in slow:
            layer, _, reason = why.partition(": ")
            findings.append(
                Finding(
                    layer, "", refused or f"{reason or why}; Opacus computes its gradients", "", fatal=bool(refused)
                )
            )
    if not any(one.fatal for one in findings):
        findings += _gradients(copy.deepcopy(model), x, path)
    if any(one.fatal for one in findings):
        path = Path.NONE
    return Report(path, tuple(findings), sum(p.numel() for p in model.parameters() if p.requires_grad))


def _layers(model: nn.Module) -> Iterator[Finding]:
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  # the family has no public name
            yield Finding(
                name,
                kind,
                "it normalises over the batch, so every example shows in every other's gradient",
                "GroupNorm: fedlearn check-model rewrites it",
                fatal=True,
            )
        elif isinstance(module, nn.RNNBase):
            yield Finding(
                name,
                kind,
                "its steps are fused, so they have no per-example gradients",
                "fedlearn check-model rewrites it; or fedlearn.models.recurrent.Lstm, or opacus.layers.DPLSTM",
                fatal=True,
            )
        elif isinstance(module, nn.MultiheadAttention):
            yield Finding(
                name,
                kind,
                "its projections are fused, so they have no per-example gradients",
                "fedlearn check-model rewrites it; or opacus.layers.DPMultiheadAttention",
                fatal=True,
            )
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}" if name else own
            if parameter.requires_grad and id(parameter) in seen:
                yield Finding(
                    full,
                    kind,
                    f"it is tied to {seen[id(parameter)]}",
                    "give each its own weights: fedlearn check-model does",
                    fatal=True,
                )
            seen[id(parameter)] = full


def _running(model: nn.Module, x: torch.Tensor) -> list[Finding]:
    """What a forward pass in training mode shows."""
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        one, two = _outputs(model, x), _outputs(model, _first_changed(x))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"check-model: the model does not run on {tuple(x.shape)}: {error}") from None
    found = [
        Finding(
            name,
            "buffer",
            "a forward pass changes it: it holds statistics of the data that no noise covers",
            "a layer without running statistics",
            fatal=True,
        )
        for name, buffer in model.named_buffers()
        if name not in before or not torch.equal(before[name], buffer)
    ]
    found += [
        Finding(
            name,
            "weights",
            "a forward pass changes them: they follow the data with no noise",
            "an embedding without max_norm: fedlearn check-model rewrites it",
            fatal=True,
        )
        for name, parameter in model.named_parameters()
        if not torch.equal(weights[name], parameter)
    ]
    if one.ndim == 0 or one.shape[0] != x.shape[0]:
        found.append(
            Finding(
                "",
                type(model).__name__,
                f"{len(x)} examples give an output of {tuple(one.shape)}",
                "the first dimension is the batch",
                fatal=True,
            )
        )
    elif not torch.allclose(one[1:], two[1:], rtol=_TOLERANCE, atol=1e-6, equal_nan=True):
        found.append(
            Finding(
                "",
                type(model).__name__,
                "changing one example changes another one's output: the model mixes examples",
                "leave out what takes a mean or a sum over the batch",
                fatal=True,
            )
        )
    return found


def _gradients(model: nn.Module, x: torch.Tensor, path: Path) -> list[Finding]:
    """Whether clipped gradients, with nothing to clip, add up to the gradient of the sum."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    direction = torch.randn(_outputs(model, x).shape, generator=torch.Generator().manual_seed(1))

    def losses() -> torch.Tensor:
        return (_run(model, x) * direction.to(x.device)).flatten(1).sum(1)

    try:
        engine: GradientEngine
        if path is Path.FAST:
            engine = ghost.GhostGradients(model)
        else:
            from fedlearn.privacy.opacus import OpacusGradients

            engine = OpacusGradients(model)
        engine.check(losses)
        summed = engine(losses, 1e30).gradients
    except (FedlearnError, RuntimeError, ValueError, AttributeError) as error:
        return [Finding("", type(model).__name__, f"per-example gradients fail: {error}", "", fatal=True)]
    plain = torch.autograd.grad(losses().sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
    rounding = _TOLERANCE / 10 * float(torch.stack([whole.norm() for whole in plain]).norm())
    return [
        Finding(
            name,
            "",
            "per-example gradients do not add up to the gradient: the weights are used past their layer, or without a batch dimension",
            "call the layer, with one row for each example",
            fatal=True,
        )
        for name, whole in zip(parameters, plain, strict=True)
        if float((summed[name] - whole).norm()) > _TOLERANCE * float(whole.norm()) + rounding
    ]


def _refused_by_opacus(model: nn.Module) -> str:
    from fedlearn.privacy.opacus import OpacusGradients

    try:
        OpacusGradients(copy.deepcopy(model))
    except FedlearnError as error:
        return error.message
    return ""


def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The outputs, every time with the same dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out: torch.Tensor = model(x)
    return out


def _outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return _run(model, x)


def _first_changed(x: torch.Tensor) -> torch.Tensor:
    """The same batch with another first example: tokens in reverse, or numbers far from what they were."""
    other = x.clone()
    other[0] = (
        x[1].flip(0)
        if not x.is_floating_point() and x.ndim > 1
        else x[1]
        if not x.is_floating_point()
        else 3.0 * x[0] + 1.0
    )
    return other
