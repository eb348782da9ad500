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
from torch.nn import functional

from fedlearn.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.autograd.graph import GradientEdge

Factors = tuple[torch.Tensor, torch.Tensor]
Gradients = dict[str, torch.Tensor]


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
            return torch.cat([_places(a) for a, _ in calls], 1), torch.cat([_places(g) for _, g in calls], 1)
        if isinstance(self.module, nn.Embedding):
            return torch.cat([a.flatten(1) for a, _ in calls], 1), torch.cat([_places(g) for _, g in calls], 1)
        raise UnsupportedError(f"model: {type(self.module).__name__} is used several times in one pass")

    def prepare(self, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], Gradients]]:
        """Squared norms, shape (batch,), and a function from clip factors, shape (batch,), to the layer's clipped sums."""
        return _RULES[type(self.module)](self.module, a, g)


class GhostGradients:
    """Clipped gradient sums of a model whose trainable layers are all of known kinds.

    Args:
        model: `torch.nn.Linear`, `Conv1d`, `Conv2d` (without groups), `Embedding`, `LayerNorm`, `GroupNorm`, and anything without parameters.

    Raises:
        UnsupportedError: a trainable parameter is of another layer, or of two; the message names it.
    """

    def __init__(self, model: nn.Module) -> None:
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
        """
        handles = [layer.module.register_forward_hook(layer.catch) for layer in self._layers]
        try:
            loss = losses()
        finally:
            for handle in handles:
                handle.remove()
        try:
            return self._sum(loss, clip_l2)
        finally:
            for layer in self._layers:
                layer.inputs, layer.edges = [], []

    def _sum(self, losses: torch.Tensor, clip_l2: float) -> ClippedSum:
        used = [layer for layer in self._layers if layer.edges]
        edges = [edge for layer in used for edge in layer.edges]
        found = iter(torch.autograd.grad(losses.sum(), edges, allow_unused=True))
        pairs = [(layer, layer.factors([next(found) for _ in layer.edges])) for layer in used]
        caught = [(layer, pair) for layer, pair in pairs if pair is not None]
        with torch.no_grad():
            prepared = [layer.prepare(*pair) for layer, pair in caught]
            squared = torch.stack([norms for norms, _ in prepared]).sum(0)
            good = torch.isfinite(squared) & torch.isfinite(losses.detach())
            if not bool(good.all()):
                # Zero times NaN is NaN: what is not finite is taken out of the factors themselves.
                prepared = [layer.prepare(_only(a, good), _only(g, good)) for layer, (a, g) in caught]
            norms = squared.clamp_min(0).sqrt()
            factors = torch.where(good, (clip_l2 / norms).clamp(max=1.0), torch.zeros_like(norms))
            sums: Gradients = {}
            for (layer, _), (_, weighted) in zip(caught, prepared, strict=True):
                sums |= {layer.names[name]: value for name, value in weighted(factors).items() if name in layer.names}
            for name, parameter in self._parameters.items():
                if name not in sums:
                    sums[name] = torch.zeros_like(parameter)
        count = int(good.sum())
        return ClippedSum(sums, count, len(losses) - count, int(((norms <= clip_l2) & good).sum()))


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
            if (reason := _why_not(module)) is not None:
                why.append(f"{full}: {reason}")
    return why


def _why_not(module: nn.Module) -> str | None:
    if type(module) not in _RULES:
        return f"no rule for {type(module).__name__}"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        return "a convolution in groups, or padded with other than zeros"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and isinstance(module.padding, str):
        return f"padding {module.padding!r}: give a number"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq"
    return None


def _places(x: torch.Tensor) -> torch.Tensor:
    """(batch, ..., width) to (batch, places, width)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _only(x: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """The same with zeros for the other examples."""
    mask = good.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(mask, x, torch.zeros_like(x))


def _square(x: torch.Tensor) -> torch.Tensor:
    """Squared norm of each example, shape (batch,)."""
    norms: torch.Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.square()


def _linear(module: nn.Module, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    assert isinstance(module, nn.Linear)
    if a.ndim > 2:
        return _sequence(_places(a), _places(g), module.weight.shape, bias=module.bias is not None)

    squared = _square(a) * _square(g)

    def weighted(factors: torch.Tensor) -> Gradients:
        scaled = g * factors[:, None]
        return {"weight": scaled.t() @ a, "bias": scaled.sum(0)}

    return squared + _square(g) if module.bias is not None else squared, weighted


def _sequence(
    a: torch.Tensor, g: torch.Tensor, shape: torch.Size, *, bias: bool
) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    """A linear layer over places: a of (batch, places, in), g of (batch, places, out); `shape` is the weight's."""
    places, inner, outer = a.shape[1], a.shape[2], g.shape[2]
    total = g.sum(1) if bias else None
    more = _square(total) if total is not None else 0.0
    if places * (inner + outer) < inner * outer:
        gram = torch.bmm(a, a.transpose(1, 2)).mul_(torch.bmm(g, g.transpose(1, 2)))
        squared = gram.flatten(1).sum(1)

        def weight(factors: torch.Tensor) -> torch.Tensor:
            return (g * factors[:, None, None]).reshape(-1, outer).t() @ a.reshape(-1, inner)
    else:
        each = torch.bmm(g.transpose(1, 2), a)
        squared = _square(each)

        def weight(factors: torch.Tensor) -> torch.Tensor:
            return torch.mv(each.flatten(1).t(), factors).reshape(outer, inner)

    def weighted(factors: torch.Tensor) -> Gradients:
        sums = {"weight": weight(factors).reshape(shape)}
        return sums if total is None else {**sums, "bias": factors @ total}

    return squared + more, weighted


def _convolution(module: nn.Module, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    assert not isinstance(module.padding, str)
    flat = isinstance(module, nn.Conv1d)  # a picture of one row
    if flat:
        a = a.unsqueeze(2)
    kernel, dilation, stride = ((1, *x) if flat else x for x in (module.kernel_size, module.dilation, module.stride))
    padding = (0, *module.padding) if flat else module.padding
    patches = functional.unfold(a, kernel, dilation=dilation, padding=padding, stride=stride)
    return _sequence(
        patches.transpose(1, 2), g.flatten(2).transpose(1, 2), module.weight.shape, bias=module.bias is not None
    )


def _embedding(module: nn.Module, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    assert isinstance(module, nn.Embedding)
    tokens, g = a.flatten(1), _places(g)
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx)[:, :, None].to(g.dtype)
    same = (tokens[:, :, None] == tokens[:, None, :]).to(g.dtype)
    squared = torch.bmm(g, g.transpose(1, 2)).mul_(same).flatten(1).sum(1)

    def weighted(factors: torch.Tensor) -> Gradients:
        scaled = (g * factors[:, None, None]).flatten(0, 1)
        return {"weight": torch.zeros_like(module.weight).index_add_(0, tokens.flatten(), scaled)}

    return squared, weighted


def _normalisation(
    normalised: torch.Tensor, g: torch.Tensor, places: tuple[int, ...]
) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    """Scale and shift of what was normalised; `places` are the dimensions that share them."""
    scale = (g * normalised).sum(places) if places else g * normalised
    shift = g.sum(places) if places else g

    def weighted(factors: torch.Tensor) -> Gradients:
        return {"weight": torch.tensordot(factors, scale, 1), "bias": torch.tensordot(factors, shift, 1)}

    return _square(scale), weighted


def _layer_norm(module: nn.Module, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    assert isinstance(module, nn.LayerNorm)
    normalised = functional.layer_norm(a, module.normalized_shape, eps=module.eps)
    places = tuple(range(1, a.ndim - len(module.normalized_shape)))
    squared, weighted = _normalisation(normalised, g, places)
    return squared + _square(g.sum(places) if places else g) if module.bias is not None else squared, weighted


def _group_norm(module: nn.Module, a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Callable[..., Gradients]]:
    assert isinstance(module, nn.GroupNorm)
    normalised = functional.group_norm(a, module.num_groups, eps=module.eps)
    places = tuple(range(2, a.ndim))
    squared, weighted = _normalisation(normalised, g, places)
    return squared + _square(g.sum(places) if places else g), weighted


_RULES: Final[dict[type[nn.Module], Callable[..., tuple[torch.Tensor, Callable[..., Gradients]]]]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
