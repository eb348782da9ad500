"""A chain's layers forward and backward, without autograd: what is saved is what the backward needs, and no more is computed.

Gradients of parameters are written into tensors that the caller gives, so that a client's whole gradient can be one flat vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedlearn.simulation.layers import (
    Activation,
    AdaptiveAvgPool,
    Affine,
    AvgPool,
    Conv,
    Flatten,
    GroupNorm,
    Kind,
    Layer,
    Linear,
    MaxPool,
    Weights,
)

if TYPE_CHECKING:
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import Block

Saved = tuple[Any, ...]

_ATEN: Final = torch.ops.aten
_MONOTONE: Final = frozenset({Kind.RELU, Kind.TANH, Kind.SIGMOID})


@dataclass(frozen=True)
class Rows:
    """A block's rows, images with their channels last.

    Args:
        x: shape (rows, height, width, channels) for images, (rows, ...) for anything else.
        y: labels, shape (rows, ...).
    """

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype) -> Rows:
        """All rows of a block's clients."""
        x, y = block.tensors(torch.device("cpu"), dtype)
        # A copy always: with one channel, contiguous() keeps strides by which torch does not see that channels are last.
        return cls(x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format) if x.ndim == 4 else x, y)

    def take(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Some rows as a model takes them: images of shape (rows, channels, height, width), channels last in memory."""
        numbers = torch.from_numpy(rows)
        x = self.x[numbers]
        return (x.permute(0, 3, 1, 2) if x.ndim == 4 else x), self.y[numbers]


def loss_gradient(task: Task, outputs: Tensor, y: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's loss, and the gradient of their sum weighted by `share` with respect to the outputs.

    Args:
        task: gives the loss.
        outputs: the model's, shape (rows, ...).
        y: labels, shape (rows, ...).
        share: shape (rows,).
    """
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = task.loss(leaf, y)
        total = (
            losses * share
        ).sum()  # a number: given a vector to start from, torch.autograd imports sympy, for seconds
    (gradient,) = torch.autograd.grad(total, leaf)
    return losses.detach(), gradient


def pool_first(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The same function with max-pooling moved before monotone activations, which then have less to do.

    f(max x) = max f(x) for every monotone f. Where f makes ties, its derivative is 0 there, so gradients agree as well.
    """
    ordered = list(layers)
    for i in range(len(ordered) - 1):
        first, second = ordered[i : i + 2]
        if isinstance(first, Activation) and first.kind in _MONOTONE and isinstance(second, MaxPool):
            ordered[i : i + 2] = [second, first]
    return tuple(ordered)


def forward_all(layers: Sequence[Layer], x: Tensor, weights: Weights) -> tuple[Tensor, list[Saved]]:
    """The outputs after all layers, and what each saved."""
    tape = []
    for layer in layers:
        x, saved = forward(layer, x, weights)
        tape.append(saved)
    return x, tape


def backward_all(
    layers: Sequence[Layer],
    g: Tensor,
    tape: Sequence[Saved],
    weights: Weights,
    gradients: Mapping[str, Tensor],
    *,
    wants_input: bool,
) -> Tensor | None:
    """The gradient with respect to what went into the first layer, None if it is not wanted; see `backward`."""
    first = 0 if wants_input else next((i for i, layer in enumerate(layers) if has_parameters(layer)), len(layers))
    back: Tensor | None = g
    for i in range(len(layers) - 1, first - 1, -1):
        assert back is not None
        back = backward(layers[i], back, tape[i], weights, gradients, wants_input=wants_input or i > first)
    return back if wants_input else None


def has_parameters(layer: Layer) -> bool:
    """Whether anything of it is trained."""
    return isinstance(layer, Linear | Conv) or (isinstance(layer, GroupNorm) and layer.weight is not None)


def forward(layer: Layer, x: Tensor, weights: Weights) -> tuple[Tensor, Saved]:
    """A layer's outputs, and what its backward needs."""
    match layer:
        case MaxPool():
            y, indices = functional.max_pool2d_with_indices(
                x, layer.kernel, layer.stride, layer.padding, layer.dilation, layer.ceil_mode
            )
            return y, (x.shape, x.stride(), indices)
        case GroupNorm():
            batch, channels = x.shape[:2]
            cells = x[0, 0].numel()
            weight, bias = _optional(weights, layer.weight), _optional(weights, layer.bias)
            y, mean, rstd = _ATEN.native_group_norm(x, weight, bias, batch, channels, cells, layer.groups, layer.eps)
            return y, (x, mean, rstd)
        case Activation(kind=Kind.GELU | Kind.GELU_TANH):
            return layer.forward(x, weights), (x,)
        case Activation():
            y = layer.forward(x, weights)
            return y, (y,)
        case Flatten():
            return layer.forward(x, weights), (x.shape,)
        case _:
            return layer.forward(x, weights), (x,)


def backward(
    layer: Layer, g: Tensor, saved: Saved, weights: Weights, gradients: Mapping[str, Tensor], *, wants_input: bool
) -> Tensor | None:
    """The gradient with respect to a layer's input, None if it is not wanted; parameters' gradients go into `gradients`.

    Args:
        layer: which ran forward.
        g: gradient of the loss with respect to the layer's outputs.
        saved: what `forward` saved.
        weights: those of the forward.
        gradients: by parameter name, tensors of the parameters' shapes, overwritten.
        wants_input: whether anything before this layer has parameters.
    """
    match layer:
        case Linear():
            (x,) = saved
            torch.mm(g.t(), x, out=gradients[layer.weight])
            if layer.bias is not None:
                torch.sum(g, 0, out=gradients[layer.bias])
            return g @ weights[layer.weight] if wants_input else None
        case Conv():
            return _conv(layer, g, saved[0], weights, gradients, wants_input=wants_input)
        case GroupNorm():
            return _group_norm(layer, g, saved, weights, gradients, wants_input=wants_input)
        case _:
            return _without_parameters(layer, g, saved) if wants_input else None


def _conv(
    layer: Conv, g: Tensor, x: Tensor, weights: Weights, gradients: Mapping[str, Tensor], *, wants_input: bool
) -> Tensor | None:
    weight = weights[layer.weight]
    has_bias = layer.bias is not None
    input_gradient, weight_gradient, bias_gradient = _ATEN.convolution_backward(
        g,
        x,
        weight,
        [weight.shape[0]],
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0, 0],
        layer.groups,
        [wants_input, True, has_bias],
    )
    gradients[layer.weight].copy_(weight_gradient)
    if layer.bias is not None:
        gradients[layer.bias].copy_(bias_gradient)
    return input_gradient if wants_input else None


def _group_norm(
    layer: GroupNorm, g: Tensor, saved: Saved, weights: Weights, gradients: Mapping[str, Tensor], *, wants_input: bool
) -> Tensor | None:
    x, mean, rstd = saved
    batch, channels = x.shape[:2]
    input_gradient, weight_gradient, bias_gradient = _ATEN.native_group_norm_backward(
        g,
        x,
        mean,
        rstd,
        _optional(weights, layer.weight),
        batch,
        channels,
        x[0, 0].numel(),
        layer.groups,
        [wants_input, layer.weight is not None, layer.bias is not None],
    )
    if layer.weight is not None:
        gradients[layer.weight].copy_(weight_gradient)
    if layer.bias is not None:
        gradients[layer.bias].copy_(bias_gradient)
    return input_gradient if wants_input else None


def _without_parameters(layer: Layer, g: Tensor, saved: Saved) -> Tensor:
    result: Tensor
    match layer:
        case MaxPool():
            # Of what went in, the operator only wants to know how it lay in memory; keeping it would fill the cache.
            shape, stride, indices = saved
            x = g.new_empty_strided(shape, stride)
            result = _ATEN.max_pool2d_with_indices_backward(
                g, x, layer.kernel, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, indices
            )
        case AvgPool():
            result = _ATEN.avg_pool2d_backward(
                g,
                saved[0],
                layer.kernel,
                layer.stride,
                layer.padding,
                layer.ceil_mode,
                layer.count_include_pad,
                layer.divisor,
            )
        case AdaptiveAvgPool():
            result = _ATEN._adaptive_avg_pool2d_backward(g, saved[0])  # noqa: SLF001  # the operator's name
        case Activation():
            result = _activation(layer.kind, g, saved[0])
        case Flatten():
            result = g.view(saved[0])
            if result.ndim == 4:  # as the layers before it have it
                result = result.contiguous(memory_format=torch.channels_last)
        case Affine():
            result = g * layer.scale
        case _:
            raise TypeError(f"{layer} has parameters")
    return result


def _activation(kind: Kind, g: Tensor, saved: Tensor) -> Tensor:
    """`saved` is the output, for GELU the input."""
    result: Tensor
    match kind:
        case Kind.RELU:
            result = _ATEN.threshold_backward(g, saved, 0)
        case Kind.TANH:
            result = _ATEN.tanh_backward(g, saved)
        case Kind.SIGMOID:
            result = _ATEN.sigmoid_backward(g, saved)
        case Kind.GELU:
            result = _ATEN.gelu_backward(g, saved)
        case Kind.GELU_TANH:
            result = _ATEN.gelu_backward(g, saved, approximate="tanh")
    return result


def _optional(weights: Weights, name: str | None) -> Tensor | None:
    return None if name is None else weights[name]
