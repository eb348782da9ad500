"""The clipped sum of per-example gradients from one forward and one backward pass, without ever holding per-example gradients.

Each layer's input `a` and the gradient `g` of its output are caught; then, example by example, the squared norm of the layer's gradient
follows from them (Goodfellow 2015: |a|^2 |g|^2 for a linear layer; Li et al. 2022, "Large language models can be strong
differentially private learners", section 4: the sum of (a a^T) * (g g^T) over places), and the clipped sum is one more product of the same
factors (Bu et al. 2023, "Differentially private optimization on large model at small cost"). Where a layer's own gradient is
smaller than those Gram matrices, it is made, used for both, and dropped.

An example whose loss or gradient is not finite contributes zero, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fedlearn.errors import UnsupportedError
from fedlearn.privacy.gradient_rules import Gradients, apply_rule, places_of, why_not

if TYPE_CHECKING:
    from torch.autograd.graph import GradientEdge


Factors = tuple[torch.Tensor, torch.Tensor]
_CHECK_TOLERANCE: Final = 1e-3  # of float32's and autocast's rounding, far below what a wrong rule gives


@dataclass(frozen=True)
class ClippedSum:
    """Sum of clipped gradients over a batch.

    Args:
        gradients: by parameter name, in the parameters' shapes.
        count: examples that contributed.
        not_finite: examples left out because a number was not finite.
        unclipped: examples whose norm was within the clip.
    """

    gradients: Gradients
    count: int
    not_finite: int
    unclipped: int


class _Layer:
    """One layer's calls in one forward pass, and what follows from them.

    Calls of one layer (a recurrent cell's steps) are places of one sequence.
    """

    def __init__(self, module: nn.Module, names: dict[str, str]) -> None:
        self.module, self.names = module, names  # the module's own parameter names to the model's
        self.inputs: list[torch.Tensor] = []
        self.edges: list[GradientEdge] = []

    def catch(self, _: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """A forward hook. The edge names the output's gradient even if the output is changed in place later."""
        if output.requires_grad:
            self.inputs.append(args[0].detach())
            self.edges.append(torch.autograd.graph.get_gradient_edge(output))

    def factors(self, gradients: Sequence[torch.Tensor | None]) -> Factors | None:
        """Inputs and output gradients of all calls, one after the other along the places; None where nothing depends on them."""
        dtype = next(p.dtype for p in self.module.parameters(recurse=False))  # autocast may have made others
        calls = [
            (a.to(dtype) if a.is_floating_point() else a, g.to(dtype))
            for a, g in zip(self.inputs, gradients, strict=True)
            if g is not None
        ]
        if len(calls) < 2:
            return calls[0] if calls else None
        if isinstance(self.module, nn.Linear):
            return torch.cat([places_of(a) for a, _ in calls], 1), torch.cat([places_of(g) for _, g in calls], 1)
        if isinstance(self.module, nn.Embedding):
            return torch.cat([a.flatten(1) for a, _ in calls], 1), torch.cat([places_of(g) for _, g in calls], 1)
        raise UnsupportedError(f"model: {type(self.module).__name__} is used several times in one pass")

    def prepare(self, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], Gradients]]:
        """Squared norms, shape (batch,), and a function from clip factors, shape (batch,), to the layer's clipped sums."""
        return apply_rule(self.module, a, g, weight="weight" in self.names, bias="bias" in self.names)


class GhostGradients:
    """Clipped gradient sums of a model whose trainable layers are all of known kinds.

    Args:
        model: `torch.nn.Linear`, `Conv1d`, `Conv2d` (without groups), `Embedding`, `LayerNorm`, `GroupNorm`, and anything without parameters.

    That weights are used through their layers only, `check` tells.

    Raises:
        UnsupportedError: a trainable parameter is of another layer, or of two; the message names it.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_mixing(model)
        self._layers: list[_Layer] = []
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        why = unsupported(model)
        if why:
            raise UnsupportedError(f"model: no fast per-example gradients: {'; '.join(why[:3])}")
        own = {id(p): name for name, p in self._parameters.items()}
        for module in model.modules():
            names = {n: own[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in own}
            if names:
                self._layers.append(_Layer(module, names))

    def __call__(self, losses: Callable[[], torch.Tensor], clip_l2: float) -> ClippedSum:
        """Run the model and sum its clipped gradients.

        Args:
            losses: runs the model and gives one loss an example, shape (batch,).
            clip_l2: the longest gradient of one example, over all parameters together.

        Raises:
            UnsupportedError: the model uses its weights in a way that has no per-example gradients here; the message names them.
        """
        return self._run(losses, clip_l2, check=False)

    def check(self, losses: Callable[[], torch.Tensor]) -> None:
        """See that one example's gradient is what one backward pass of its loss gives.

        It is not where weights are used past their layer, or a layer is called without a batch dimension. Whoever calls this with people's rows
        lets what is refused depend on them.

        Args:
            losses: as in `__call__`.

        Raises:
            UnsupportedError: it is not, or no loss is finite, so that nothing can be told; the message names the weights.
        """
        self._run(losses, 1.0, check=True)

    def _run(self, losses: Callable[[], torch.Tensor], clip_l2: float, *, check: bool) -> ClippedSum:
        handles = [layer.module.register_forward_hook(layer.catch) for layer in self._layers]
        try:
            try:
                loss = losses()
            finally:
                for handle in handles:
                    handle.remove()
            return self._sum(loss, clip_l2, check=check)
        finally:
            for layer in self._layers:
                layer.inputs, layer.edges = [], []

    def _sum(self, losses: torch.Tensor, clip_l2: float, *, check: bool) -> ClippedSum:
        one, truth = self._one_by_itself(losses) if check else (0, ())
        used = [layer for layer in self._layers if layer.edges]
        edges = [edge for layer in used for edge in layer.edges]
        found = iter(torch.autograd.grad(losses.sum(), edges, allow_unused=True) if edges else ())
        pairs = [(layer, layer.factors([next(found) for _ in layer.edges])) for layer in used]
        caught = [(layer, pair) for layer, pair in pairs if pair is not None]
        for layer, (a, g) in caught:
            if not a.shape[:1] == g.shape[:1] == losses.shape:
                raise UnsupportedError(
                    f"model: {', '.join(layer.names.values())}: the layer is called on {tuple(a.shape)} for {len(losses)} examples",
                    hint="call it with one row for each example",
                )
        with torch.no_grad():
            prepared = [layer.prepare(*pair) for layer, pair in caught]
            squared = torch.stack([torch.zeros_like(losses), *(norms for norms, _ in prepared)]).sum(0)
            good = torch.isfinite(squared) & torch.isfinite(losses.detach())
            if not bool(good.all()):
                # Zero times NaN is NaN: what is not finite is taken out of the factors themselves.
                prepared = [layer.prepare(_only(a, good), _only(g, good)) for layer, (a, g) in caught]

            def weighted(factors: torch.Tensor) -> Gradients:
                sums: Gradients = {}
                for (layer, _), (_, of_layer) in zip(caught, prepared, strict=True):
                    sums |= {layer.names[n]: value for n, value in of_layer(factors).items() if n in layer.names}
                return {
                    name: sums[name] if name in sums else torch.zeros_like(p) for name, p in self._parameters.items()
                }

            if check:
                self._compare(weighted(nn.functional.one_hot(torch.tensor(one), len(losses)).to(losses)), truth)
            norms = squared.clamp_min(0).sqrt()
            factors = torch.where(good, (clip_l2 / norms).clamp(max=1.0), torch.zeros_like(norms))
            sums = weighted(factors)
        count = int(good.sum())
        return ClippedSum(sums, count, len(losses) - count, int(((norms <= clip_l2) & good).sum()))

    def _one_by_itself(self, losses: torch.Tensor) -> tuple[int, Sequence[torch.Tensor]]:
        """An example, and its gradients by a backward pass of its own."""
        finite = torch.isfinite(losses.detach()).nonzero()
        if not len(finite):
            raise UnsupportedError("model: no loss is finite, so its gradients cannot be checked")
        one = int(finite[0])
        found = torch.autograd.grad(
            losses[one], list(self._parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return one, found

    def _compare(self, ours: Gradients, truth: Sequence[torch.Tensor]) -> None:
        scale = float(torch.stack([value.norm() for value in truth]).norm())
        for name, value in zip(self._parameters, truth, strict=True):
            if float((ours[name] - value).norm()) > _CHECK_TOLERANCE * (scale + 1e-6):
                raise UnsupportedError(
                    f"model: {name}: its per-example gradient is not what the layer's input and output say",
                    hint="use the weights through their layer only, called with one row for each example",
                )


def refuse_mixing(model: nn.Module) -> None:
    """Refuse layers through which one example reaches another one's gradient, or a buffer: no clip bounds that, trainable or not.

    Whether a `forward` mixes examples by itself only running it can tell: `unfit.check_apart`, and `model_check.check_model`.

    Raises:
        UnsupportedError: names the layer.
    """
    for name, module in model.named_modules():
        batch = isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001  # the family has no public name
        if batch or getattr(module, "track_running_stats", False):
            raise UnsupportedError(
                f"model: {name or 'itself'}: {type(module).__name__} {'normalises over the batch' if batch else 'keeps statistics'}: "
                "examples are not separate",
                hint="fedlearn check-model rewrites it",
            )


def unsupported(model: nn.Module) -> list[str]:
    """Why a model has no fast per-example gradients, in words; empty where it has."""
    why: list[str] = []
    seen: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if id(parameter) in seen:
                why.append(f"{full} is tied to {seen[id(parameter)]}")
            seen[id(parameter)] = full
            if (reason := why_not(module)) is not None:
                why.append(f"{full}: {reason}")
    return why


def _only(x: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """The same with zeros for the other examples."""
    mask = good.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(mask, x, torch.zeros_like(x))
