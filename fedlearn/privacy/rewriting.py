"""Models that cannot train under record-level privacy, rewritten where they can be, and what has changed.

Most rewrites compute what was computed before: fused layers from linear ones, activations that no longer write into their input, tied weights
apart. Norms over the batch cannot be kept; their stand-ins compute something else, and the model must be trained with them from the start.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch
from torch import nn

from fedlearn.privacy.layers import Attention, Recurrent

N = TypeVar("N", bound=nn.Module)
MOST_GROUPS: Final = 32
_NOT_EQUAL: Final = "computes something else: train with it from the start"


@dataclass(frozen=True)
class Change:
    """One layer that was replaced.

    Args:
        where: its name; empty for the model itself.
        before: in words.
        after: in words.
        equal: whether the model's outputs stay what they were, to rounding.
        note: what to know of it besides.
    """

    where: str
    before: str
    after: str
    equal: bool
    note: str = ""


@dataclass(frozen=True)
class Rewritten:
    """A rewritten model beside the first one.

    Args:
        model: the new one; the first one is as it was.
        changes: in the order of the layers.
        parameters_before: trainable numbers.
        parameters_after: likewise.
        difference: largest difference of outputs in evaluation mode, over examples, after those changes that should make none; None
            where no examples were given, or no such change was made.
    """

    model: nn.Module = field(repr=False)
    changes: tuple[Change, ...]
    parameters_before: int
    parameters_after: int
    difference: float | None


def rewrite(model: nn.Module, x: torch.Tensor | None = None) -> Rewritten:
    """A copy in which everything that rules record-level privacy out, and can be replaced, is; nothing else is touched.

    | layer | becomes | same outputs |
    |---|---|---|
    | batch norms | group norms of as many channels; their statistics are lost | no |
    | instance norms with running statistics | without | no |
    | embeddings with max_norm | without | no |
    | `nn.LSTM`, `nn.GRU`, `nn.RNN` | `fedlearn.privacy.layers.Recurrent` | yes |
    | `nn.MultiheadAttention` | `fedlearn.privacy.layers.Attention` | yes |
    | in-place activations | ones that are not | yes |
    | tied weights | each their own, equal at first | yes, until they are trained |

    What a model's `forward` mixes by itself cannot be seen from its layers: see `model_check.check_model`.

    Args:
        model: is left as it was.
        x: examples as the model is fed them, shape (batch, ...), to compare outputs on.

    Example:
        def model(self):  # of a task
            return rewrite(Net()).model
    """
    new, changes = _rewritten(model, lambda _: True)
    difference = None
    if x is not None and any(change.equal for change in changes):
        exact, _ = _rewritten(model, lambda change: change.equal)
        difference = _difference(copy.deepcopy(model), exact, x)
    return Rewritten(new, changes, _trainable(model), _trainable(new), difference)


def _rewritten(model: nn.Module, wanted: Callable[[Change], bool]) -> tuple[nn.Module, tuple[Change, ...]]:
    new = copy.deepcopy(model)
    changes = [change for change in _untie(new) if wanted(change)]
    made: dict[int, nn.Module] = {}  # one layer may stand in several places
    for name, module in list(new.named_modules(remove_duplicate=False)):
        if id(module) not in made:
            found = _replacement(name, module)
            if found is None or not wanted(found[1]):
                continue
            made[id(module)] = found[0]
            changes.append(found[1])
        if not name:
            new = made[id(module)]
            continue
        parent, _, last = name.rpartition(".")
        setattr(new.get_submodule(parent), last, made[id(module)])
    for module in new.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # torch's fused path reads weights that are no longer there
    return new, tuple(changes)


def _replacement(name: str, module: nn.Module) -> tuple[nn.Module, Change] | None:
    after: nn.Module
    equal, note = False, _NOT_EQUAL
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  # the family has no public name
        after = _group_norm(module)
    elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:  # noqa: SLF001  # as above
        after = _with_affine_of(module, type(module)(module.num_features, eps=module.eps, affine=module.affine))
    elif isinstance(module, nn.Embedding) and module.max_norm is not None:
        after = copy.copy(module)
        after.max_norm = None
    elif isinstance(module, nn.RNNBase):
        after, equal, note = Recurrent.of(module), True, "slower than torch's fused one"
    elif isinstance(module, nn.MultiheadAttention) and Attention.can_replace(module):
        after, equal, note = Attention.of(module), True, ""
    elif getattr(module, "inplace", False) is True:
        after, equal, note = copy.copy(module), True, ""
        after.inplace = False  # type: ignore[assignment]  # of layers that have it
    else:
        return None
    return after, Change(name, _in_words(module), _in_words(after), equal, note)


def _group_norm(module: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    # Of a table each channel is one number: groups must hold several, or nothing is left of them.
    groups = 1 if isinstance(module, nn.BatchNorm1d) else math.gcd(MOST_GROUPS, module.num_features)
    return _with_affine_of(module, nn.GroupNorm(groups, module.num_features, eps=module.eps, affine=module.affine))


def _with_affine_of(module: nn.Module, norm: N) -> N:
    """The norm with another one's own scale and shift, on their device."""
    for name in ("weight", "bias"):
        norm.register_parameter(name, getattr(module, name))
    return norm.train(module.training)


def _untie(model: nn.Module) -> list[Change]:
    """Give each layer weights of its own, in place."""
    changes: list[Change] = []
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{own}" if name else own
            first = seen.setdefault(id(parameter), full)
            if first == full:
                continue
            module.register_parameter(own, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            changes.append(
                Change(
                    full, f"tied to {first}", "its own", equal=True, note=f"{parameter.numel()} numbers more to train"
                )
            )
    return changes


def _difference(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    outputs = []
    with torch.no_grad():
        for one in (model.eval(), other.eval()):
            out = one(x)
            outputs.append(out if isinstance(out, torch.Tensor) else out[0])
    return float((outputs[0] - outputs[1]).abs().max())


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _in_words(module: nn.Module) -> str:
    """One line."""
    return " ".join(repr(module).split())
