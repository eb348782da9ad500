"""The layers that a chain is made of: frozen values that name their parameters and hold no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

from torch import Tensor, relu, sigmoid, tanh
from torch.nn import functional

Pair = tuple[int, int]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Linear:
    """x W^T + b. Parameters by their names in the model."""

    weight: str
    bias: str | None

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Outputs of shape (batch, out) from shape (batch, in)."""
        return functional.linear(x, weights[self.weight], _maybe(weights, self.bias))


@dataclass(frozen=True)
class Conv:
    """A 2-d convolution with zero padding."""

    weight: str
    bias: str | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """Maps of shape (batch, out, height, width)."""
        bias = _maybe(weights, self.bias)
        return functional.conv2d(
            x, weights[self.weight], bias, self.stride, self.padding, self.dilation, groups=self.groups
        )


@dataclass(frozen=True)
class GroupNorm:
    """Group normalisation; without `weight` and `bias` where it is not affine."""

    weight: str | None
    bias: str | None
    groups: int
    eps: float

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """The same shape, (batch, channels, ...)."""
        return functional.group_norm(x, self.groups, _maybe(weights, self.weight), _maybe(weights, self.bias), self.eps)


class Kind(StrEnum):
    """Element-wise functions."""

    RELU = "relu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


FUNCTIONS: Final[Mapping[Kind, Callable[[Tensor], Tensor]]] = {
    Kind.RELU: relu,
    Kind.TANH: tanh,
    Kind.SIGMOID: sigmoid,
    Kind.GELU: functional.gelu,
    Kind.GELU_TANH: partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Activation:
    """An element-wise function."""

    kind: Kind

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # noqa: ARG002  # one signature for all layers
        """The same shape."""
        return FUNCTIONS[self.kind](x)


@dataclass(frozen=True)
class MaxPool:
    """Maximum over windows."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # noqa: ARG002  # as above
        """Smaller maps, shape (batch, channels, height, width)."""
        return functional.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)


@dataclass(frozen=True)
class AvgPool:
    """Mean over windows."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool
    count_include_pad: bool
    divisor: int | None

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # noqa: ARG002  # as above
        """Smaller maps, shape (batch, channels, height, width)."""
        return functional.avg_pool2d(
            x, self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor
        )


@dataclass(frozen=True)
class AdaptiveAvgPool:
    """Means that leave a map of a given size; None leaves that side as it is."""

    size: tuple[int | None, int | None]

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # noqa: ARG002  # as above
        """Maps of shape (batch, channels, *size)."""
        return functional.adaptive_avg_pool2d(x, self.size)


@dataclass(frozen=True)
class Flatten:
    """Each example as one row; `width` is its length where the model fixes it (`view(-1, width)`)."""

    width: int | None = None

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # noqa: ARG002  # as above
        """Shape (batch, length).

        Raises:
            ValueError: an example is not of the length that the model fixes.
        """
        rows = x.flatten(1)
        if self.width is not None and rows.shape[1] != self.width:
            raise ValueError(f"flatten: got {rows.shape[1]} values an example, expected {self.width}")
        return rows


@dataclass(frozen=True)
class Affine:
    """scale x + shift with constants."""

    scale: float
    shift: float

    def forward(self, x: Tensor, weights: Weights) -> Tensor:  # noqa: ARG002  # as above
        """The same shape."""
        return self.scale * x + self.shift


Layer = Linear | Conv | GroupNorm | Activation | MaxPool | AvgPool | AdaptiveAvgPool | Flatten | Affine


def _maybe(weights: Weights, name: str | None) -> Tensor | None:
    return None if name is None else weights[name]
