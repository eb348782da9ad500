"""Models that are a straight line of known layers, so that training can be written out for them.

`chain_of` follows a model's own forward with torch.fx, so a class, an nn.Sequential and a functional style all come out as the same
tuple of layers. What cannot be followed exactly is refused with the reason, and trains on a general path.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fedlearn.learning.local import trainable
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
    Pair,
    Weights,
)


@dataclass(frozen=True)
class Chain:
    """A model as its layers, first to last; together they use every trainable parameter exactly once."""

    layers: tuple[Layer, ...]

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        """The model's outputs with weights given by name."""
        for layer in self.layers:
            x = layer.forward(x, weights)
        return x

    def shapes(self, model: nn.Module, example: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shape of one example after each layer, without the batch's dimension.

        Args:
            model: gives the parameters.
            example: shape of one example as it goes in.

        Raises:
            RuntimeError, ValueError: examples of that shape do not fit the layers.
        """
        weights = trainable(model)
        first = next(iter(weights.values()))
        found = []
        # One real example: torch's tensors without data would load a second's worth of its compiler.
        x = torch.zeros(1, *example, dtype=first.dtype, device=first.device)
        with torch.no_grad():
            for layer in self.layers:
                x = layer.forward(x, weights)
                found.append(tuple(x.shape[1:]))
        return tuple(found)


@dataclass(frozen=True)
class NotAChain:
    """Why a model is no chain, in words for a person."""

    reason: str


def chain_of(model: nn.Module) -> Chain | NotAChain:
    """The model's layers in order, where its training forward is a straight line of known ones.

    Not to be called while another thread runs a model: torch.fx patches `nn.Module.__call__` while it follows.
    """
    hooked = [name or "model" for name, module in model.named_modules() if _has_hooks(module)]
    if hooked:
        return NotAChain(f"{hooked[0]} has hooks")
    training = model.training
    model.train()
    try:
        graph = None if type(model) in _MODULES else fx.Tracer().trace(model)
    except Exception as error:  # whatever a user's forward raises on a symbolic input
        return NotAChain(f"its forward cannot be followed: {str(error).partition(chr(10))[0]}")
    finally:
        model.train(training)
    try:
        layers = _alone(model) if graph is None else _layers(model, graph)
        _check_parameters(model, layers)
    except _Refused as refusal:
        return NotAChain(str(refusal))
    return Chain(layers)


class _Refused(Exception):  # noqa: N818  # never leaves this file
    """Why not."""


def _alone(model: nn.Module) -> tuple[Layer, ...]:
    """A model that is a single known layer."""
    layer = _of_module("model", model, {id(p): name for name, p in trainable(model).items()})
    return () if layer is None else (layer,)


def _layers(model: nn.Module, graph: fx.Graph) -> tuple[Layer, ...]:
    names = {id(p): name for name, p in trainable(model).items()}
    layers: list[Layer] = []
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder" and current is None:
            current = node
        elif node.op == "output" and node.args == (current,):
            return tuple(layers)
        elif node.op == "get_attr":
            raise _Refused(f"{node.target} is used outside a known layer")
        elif current is None or node.op in {"placeholder", "output"}:
            raise _Refused("expected one input and one output tensor")
        elif not _is_batch_size(node):
            others = [user for user in current.users if not _is_batch_size(user)]
            if others != [node]:
                raise _Refused(f"{current.name} is used more than once; expected a straight line")
            layer = _layer(model, node, current, names)
            layers += [] if layer is None else [layer]
            current = node
    raise _Refused("expected one input and one output tensor")


def _layer(model: nn.Module, node: fx.Node, x: fx.Node, names: Mapping[int, str]) -> Layer | None:
    """The layer that one node of the graph stands for; None for one that changes nothing."""
    if node.op == "call_module":
        if node.args != (x,) or node.kwargs:
            raise _Refused(f"{node.target} is called with more than its input")
        return _of_module(str(node.target), model.get_submodule(str(node.target)), names)
    rest = tuple(argument for argument in node.args if argument is not x)
    if node.op == "call_function" and node.target in _ARITHMETIC:
        return _arithmetic(node.target, node.args, x)
    if node.args[:1] == (x,) and node.target in {"view", "reshape", torch.reshape}:
        return _reshape(rest)
    known = _FUNCTIONS.get(node.target)
    if known is None or node.args[:1] != (x,) or len(rest) > 4:  # torch's functions and modules agree so far
        raise _Refused(f"{node.op.replace('_', ' ')} {getattr(node.target, '__name__', node.target)} is not supported")
    if known is nn.Flatten and not rest and "start_dim" not in node.kwargs:
        raise _Refused("flatten() joins the examples; expected flatten(1)")
    return _of_module(node.name, known(*rest, **node.kwargs), names)


def _of_module(where: str, module: nn.Module, names: Mapping[int, str]) -> Layer | None:
    made = _MODULES.get(type(module))  # a subclass may compute something else
    if made is None:
        raise _Refused(f"{where} is a {type(module).__name__}, which is not supported")

    def name_of(parameter: str) -> str | None:
        value = getattr(module, parameter)
        if value is not None and id(value) not in names:
            raise _Refused(f"{where}.{parameter} is frozen")
        return None if value is None else names[id(value)]

    return made(where, module, name_of)


_NameOf = Callable[[str], str | None]


def _linear(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # one signature for all
    weight = name_of("weight")
    assert weight is not None, where
    return Linear(weight, name_of("bias"))


def _conv(where: str, module: Any, name_of: _NameOf) -> Layer:
    if module.padding_mode != "zeros":
        raise _Refused(f"{where} pads with {module.padding_mode}; expected zeros")
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise _Refused(f"{where} pads its two sides differently")
        padding = (reach[0] // 2, reach[1] // 2)
    weight = name_of("weight")
    assert weight is not None
    return Conv(weight, name_of("bias"), module.stride, padding, module.dilation, module.groups)


def _group_norm(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # as above
    return GroupNorm(name_of("weight"), name_of("bias"), module.num_groups, module.eps)


def _activation(kind: Kind) -> Callable[[str, Any, _NameOf], Layer]:
    return lambda where, module, name_of: Activation(kind)  # noqa: ARG005  # as above


def _gelu(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # as above
    return Activation(Kind.GELU_TANH if module.approximate == "tanh" else Kind.GELU)


def _max_pool(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # as above
    if module.return_indices:
        raise _Refused(f"{where} returns indices")
    stride = module.kernel_size if module.stride is None else module.stride
    return MaxPool(
        _pair(module.kernel_size), _pair(stride), _pair(module.padding), _pair(module.dilation), module.ceil_mode
    )


def _avg_pool(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # as above
    stride = module.kernel_size if module.stride is None else module.stride
    return AvgPool(
        _pair(module.kernel_size),
        _pair(stride),
        _pair(module.padding),
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


def _adaptive_avg_pool(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # as above
    size = module.output_size
    return AdaptiveAvgPool(size if isinstance(size, tuple) else (size, size))


def _flatten(where: str, module: Any, name_of: _NameOf) -> Layer:  # noqa: ARG001  # as above
    if (module.start_dim, module.end_dim) != (1, -1):
        raise _Refused(f"{where} flattens {module.start_dim} to {module.end_dim}; expected 1 to -1")
    return Flatten()


def _dropout(where: str, module: Any, name_of: _NameOf) -> None:  # noqa: ARG001  # as above
    if module.p > 0:
        raise _Refused(f"{where} draws random numbers (dropout {module.p:g})")


def _nothing(where: str, module: Any, name_of: _NameOf) -> None:
    """A layer that changes nothing."""


_MODULES: Final[Mapping[type[nn.Module], Callable[[str, Any, _NameOf], Layer | None]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.GroupNorm: _group_norm,
    nn.ReLU: _activation(Kind.RELU),
    nn.Tanh: _activation(Kind.TANH),
    nn.Sigmoid: _activation(Kind.SIGMOID),
    nn.GELU: _gelu,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool,
    nn.Flatten: _flatten,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
    nn.Identity: _nothing,
}

_FUNCTIONS: Final[Mapping[Any, type[nn.Module]]] = {
    torch.relu: nn.ReLU,
    functional.relu: nn.ReLU,
    "relu": nn.ReLU,
    torch.tanh: nn.Tanh,
    functional.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    functional.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    functional.gelu: nn.GELU,
    functional.max_pool2d: nn.MaxPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    torch.flatten: nn.Flatten,
    "flatten": nn.Flatten,
    "contiguous": nn.Identity,
}

_ARITHMETIC: Final = frozenset({operator.add, operator.sub, operator.mul, operator.truediv})


def _arithmetic(function: Any, arguments: tuple[Any, ...], x: fx.Node) -> Layer:
    """A constant added to or multiplied with a tensor."""
    left, right = arguments
    number = right if left is x else left
    if not isinstance(number, int | float):
        raise _Refused(f"{function.__name__} of two tensors is not supported")
    if function is operator.add:
        return Affine(1.0, float(number))
    if function is operator.mul:
        return Affine(float(number), 0.0)
    if function is operator.sub:
        return Affine(1.0, -float(number)) if left is x else Affine(-1.0, float(number))
    if left is not x:
        raise _Refused("a number divided by a tensor is not supported")
    return Affine(1.0 / float(number), 0.0)


def _reshape(sizes: tuple[Any, ...]) -> Layer:
    """A view(batch, -1) or view(-1, width)."""
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if len(sizes) == 2:
        first, second = sizes
        if isinstance(first, fx.Node) and isinstance(second, int):  # of the two only a batch size is a node here
            return Flatten(None if second == -1 else second)
        if first == -1 and isinstance(second, int) and second > 0:
            return Flatten(second)
    raise _Refused(f"view{sizes} is not supported; expected flatten(1)")


def _is_batch_size(node: fx.Node) -> bool:
    """x.size(0), x.shape or x.shape[0]."""
    if node.op == "call_method" and node.target == "size":
        return tuple(node.args[1:]) == (0,)
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "shape"
    if node.op == "call_function" and node.target is operator.getitem:
        source, index = node.args
        return isinstance(source, fx.Node) and _is_batch_size(source) and bool(index == 0)
    return False


def _check_parameters(model: nn.Module, layers: tuple[Layer, ...]) -> None:
    named = (layer for layer in layers if isinstance(layer, Linear | Conv | GroupNorm))
    used = Counter(name for layer in named for name in (layer.weight, layer.bias) if name is not None)
    twice = [name for name, count in used.items() if count > 1]
    if twice:
        raise _Refused(f"{twice[0]} is used twice")
    idle = [name for name in trainable(model) if name not in used]
    if idle:
        raise _Refused(f"{idle[0]} is not used by a known layer")


def _has_hooks(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
