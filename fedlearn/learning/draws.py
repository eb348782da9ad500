"""Chance inside a model: each step's layers draw from that step's own seed, and the global generators stay as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from fedlearn.learning.task import Task

_OWN_MODELS: Final = "fedlearn.models."
_OWN_TASKS: Final = "fedlearn.tasks."
_NEVER: Final = frozenset(
    {
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten),
        *(nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.RMSNorm),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign),
        *(nn.Softmax, nn.LogSoftmax, nn.ZeroPad2d, nn.Upsample),
    }
)
_UNLESS_DROPPING: Final = frozenset(
    {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
)
_UNLESS_DROPPING_BETWEEN: Final = frozenset({nn.RNN, nn.LSTM, nn.GRU})


def may_draw(task: Task, model: nn.Module) -> bool:
    """Whether a training step could draw from a generator: False only where it is known that nothing in it does.

    Known are torch's own layers by exact class, fedlearn's own models, which draw through such layers alone, and the losses of
    fedlearn's own tasks. A class of the user's own may draw.
    """
    return not _is_ours(type(task).loss, _OWN_TASKS) or any(_layer_may_draw(layer) for layer in model.modules())


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Everything drawn inside comes from `seed`; the generators that were in use are left as they were.

    `torch.manual_seed` seeds every device there is, lazily, and formats a stack trace to do so: that costs more than a small
    training step. So the CPU's generator, and that of a CUDA device, are set by hand; draws are the same.
    """
    if device.type not in {"cpu", "cuda"}:
        with torch.random.fork_rng(device_type=device.type):
            torch.manual_seed(seed)
            yield
        return
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _layer_may_draw(layer: nn.Module) -> bool:
    kind = type(layer)
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:  # noqa: SLF001  # no public name
        return True
    if kind in _NEVER or _is_ours(kind, _OWN_MODELS):
        return False
    if kind in _UNLESS_DROPPING:
        return getattr(layer, "p", 1.0) != 0.0
    return kind not in _UNLESS_DROPPING_BETWEEN or getattr(layer, "dropout", 1.0) != 0.0


def _is_ours(thing: object, package: str) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(package)
