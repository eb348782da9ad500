"""What a layer's input and its output's gradient say of its own gradients: one rule for each kind of layer.

A rule takes the layer, its input `a` and the gradient `g` of its output, both with one row for each example, and whether its bias is trained
beside its weight. It gives the squared norm of each example's gradient of what is trained, shape (batch,), and a function from factors, shape
(batch,), to the sums of gradients times factors, by parameter name. What is frozen enters no norm: it would clip what is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn
from torch.nn import functional

Gradients = dict[str, torch.Tensor]
Weighted = Callable[[torch.Tensor], Gradients]
Rule = Callable[[nn.Module, torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, Weighted]]


_LOST: Final = 1e-36
"""The most that float32 loses of a sum of up to 7e8 squares where they are too small for it. A server chooses the weights, and so how small inputs and
how large gradients are: a norm that came out as 0 would leave their product as it is."""


def why_not(module: nn.Module) -> str | None:
    """Why there is no rule for a layer, in words; None where there is."""
    if type(module) not in RULES:
        return f"no rule for {type(module).__name__}"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        return "a convolution in groups, or padded with other than zeros"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and isinstance(module.padding, str):
        return f"padding {module.padding!r}: give a number"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq"
    return None


def places_of(x: torch.Tensor) -> torch.Tensor:
    """(batch, ..., width) to (batch, places, width)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _square(x: torch.Tensor) -> torch.Tensor:
    """Squared norm of each example, shape (batch,), never below `_LOST`: what it is multiplied with may be as large as that is small."""
    norms: torch.Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.square().clamp_min(_LOST)


def apply_rule(
    module: nn.Module, a: torch.Tensor, g: torch.Tensor, *, weight: bool, bias: bool
) -> tuple[torch.Tensor, Weighted]:
    """A layer's rule; see the module's text.

    Args:
        module: of a kind that there is a rule for.
        a: its input.
        g: the gradient of its output.
        weight: whether its weight is trained.
        bias: whether its bias is.
    """
    if weight:
        return RULES[type(module)](module, a, g, bias)
    own = len(module.weight.shape) if isinstance(module, nn.LayerNorm) else 1
    total = g.flatten(2).sum(2) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.GroupNorm) and g.ndim > 2 else g
    places = tuple(range(1, total.ndim - own))
    total = total.sum(places) if places else total
    return _square(total), lambda factors: {"bias": torch.tensordot(factors, total, 1)}


def _linear(module: nn.Module, a: torch.Tensor, g: torch.Tensor, bias: bool) -> tuple[torch.Tensor, Weighted]:
    assert isinstance(module, nn.Linear)
    if a.ndim > 2:
        return _sequence(places_of(a), places_of(g), module.weight.shape, bias=bias)

    squared = _square(a) * _square(g)

    def weighted(factors: torch.Tensor) -> Gradients:
        scaled = g * factors[:, None]
        return {"weight": scaled.t() @ a, "bias": scaled.sum(0)}

    return squared + _square(g) if bias else squared, weighted


def _sequence(a: torch.Tensor, g: torch.Tensor, shape: torch.Size, *, bias: bool) -> tuple[torch.Tensor, Weighted]:
    """A linear layer over places: a of (batch, places, in), g of (batch, places, out); `shape` is the weight's."""
    places, inner, outer = a.shape[1], a.shape[2], g.shape[2]
    total = g.sum(1) if bias else None
    more = _square(total) if total is not None else 0.0
    if places * (inner + outer) < inner * outer:
        gram = torch.bmm(a, a.transpose(1, 2)).mul_(torch.bmm(g, g.transpose(1, 2)))
        squared = gram.flatten(1).sum(1) + _LOST * (_square(a) + _square(g))

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


def _convolution(module: nn.Module, a: torch.Tensor, g: torch.Tensor, bias: bool) -> tuple[torch.Tensor, Weighted]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    assert not isinstance(module.padding, str)
    flat = isinstance(module, nn.Conv1d)  # a picture of one row
    if flat:
        a = a.unsqueeze(2)
    kernel, dilation, stride = ((1, *x) if flat else x for x in (module.kernel_size, module.dilation, module.stride))
    padding = (0, *module.padding) if flat else module.padding
    patches = functional.unfold(a, kernel, dilation=dilation, padding=padding, stride=stride)
    return _sequence(patches.transpose(1, 2), g.flatten(2).transpose(1, 2), module.weight.shape, bias=bias)


def _embedding(module: nn.Module, a: torch.Tensor, g: torch.Tensor, bias: bool) -> tuple[torch.Tensor, Weighted]:
    assert isinstance(module, nn.Embedding)
    assert not bias
    tokens, g = a.reshape(a.shape[0], -1), places_of(g)
    if module.padding_idx is not None:
        g = g * (tokens != module.padding_idx)[:, :, None].to(g.dtype)
    same = (tokens[:, :, None] == tokens[:, None, :]).to(g.dtype)
    squared = torch.bmm(g, g.transpose(1, 2)).mul_(same).flatten(1).sum(1)

    def weighted(factors: torch.Tensor) -> Gradients:
        scaled = (g * factors[:, None, None]).flatten(0, 1)
        return {"weight": torch.zeros_like(module.weight).index_add_(0, tokens.flatten(), scaled)}

    return squared, weighted


def _normalisation(
    normalised: torch.Tensor, g: torch.Tensor, places: tuple[int, ...], *, bias: bool
) -> tuple[torch.Tensor, Weighted]:
    """Scale and shift of what was normalised; `places` are the dimensions that share them."""
    scale = (g * normalised).sum(places) if places else g * normalised
    shift = g.sum(places) if places else g

    def weighted(factors: torch.Tensor) -> Gradients:
        return {"weight": torch.tensordot(factors, scale, 1), "bias": torch.tensordot(factors, shift, 1)}

    return _square(scale) + _square(shift) if bias else _square(scale), weighted


def _layer_norm(module: nn.Module, a: torch.Tensor, g: torch.Tensor, bias: bool) -> tuple[torch.Tensor, Weighted]:
    assert isinstance(module, nn.LayerNorm)
    normalised = functional.layer_norm(a, module.normalized_shape, eps=module.eps)
    places = tuple(range(1, a.ndim - len(module.normalized_shape)))
    return _normalisation(normalised, g, places, bias=bias)


def _group_norm(module: nn.Module, a: torch.Tensor, g: torch.Tensor, bias: bool) -> tuple[torch.Tensor, Weighted]:
    assert isinstance(module, nn.GroupNorm)
    normalised = functional.group_norm(a, module.num_groups, eps=module.eps)
    places = tuple(range(2, a.ndim))
    return _normalisation(normalised, g, places, bias=bias)


RULES: Final[dict[type[nn.Module], Rule]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}
