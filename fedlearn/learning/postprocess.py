"""What happens to an update on its way out, and is undone on the server: one chain, applied in order and reversed.

Clipping, noise, compression, quantisation and masking all have this shape (the postprocessor of Granqvist et al. 2024, pfl-research). A
study names its chain; both ends build the same one from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedlearn.arrays import check_finite
from fedlearn.errors import UpdateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fedlearn.arrays import Array, Arrays
    from fedlearn.learning.update import Aggregate, Update
    from fedlearn.study import Study


class Postprocessor(Protocol):
    """One step: forward on the client's update, backward on the server's aggregate. Pure."""

    def on_client(self, update: Update) -> Update:
        """The update as it goes on."""
        ...

    def on_server(self, aggregate: Aggregate) -> Aggregate:
        """The aggregate with this step undone, as far as it can be."""
        ...


@dataclass(frozen=True)
class ClipL2:
    """Scale an update so that its joint L2 norm over everything released is at most `clip_l2`.

    An update within the bound, the zero update among them, is returned as it is. One that is not finite, or whose norm is not, is
    refused: clipping would pass NaN on. Values are rounded towards zero, so rounding cannot lift the norm above the bound again.
    """

    clip_l2: float

    def on_client(self, update: Update) -> Update:
        for name, arrays in update.private.items():
            check_finite(arrays, what=f"update {name!r}")
        norm = joint_l2_norm(update)
        if norm <= self.clip_l2:
            return update
        if not math.isfinite(norm):
            raise UpdateError(f"update: its L2 norm is {norm}, expected a finite one", hint="training diverged")
        scale = self.clip_l2 / norm
        private = {
            name: {key: _towards_zero(a.astype(np.float64) * scale, a.dtype) for key, a in arrays.items()}
            for name, arrays in update.private.items()
        }
        return replace(update, private=private)

    def on_server(self, aggregate: Aggregate) -> Aggregate:
        return aggregate


def joint_l2_norm(update: Update) -> float:
    """The L2 norm of all released arrays taken as one vector, summed in float64."""
    with np.errstate(over="ignore"):  # an infinite norm says so itself
        squares = [
            float(np.square(array, dtype=np.float64).sum())
            for arrays in update.private.values()
            for array in arrays.values()
        ]
    try:
        return math.sqrt(math.fsum(squares))
    except OverflowError:
        return math.inf


def _towards_zero(exact: npt.NDArray[np.float64], dtype: np.dtype[np.generic]) -> Array:
    rounded = exact.astype(dtype)
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.zeros_like(rounded)), rounded)


@dataclass(frozen=True)
class Uniform:
    """Every client counts once, and says nothing beside its update: what a record-level plan does to one that is noisy already."""

    def on_client(self, update: Update) -> Update:
        return replace(update, examples=1, facts={})

    def on_server(self, aggregate: Aggregate) -> Aggregate:
        return aggregate


def chain_of(study: Study, shared: Arrays | None = None) -> tuple[Postprocessor, ...]:
    """The chain that a study asks for, in the client's order.

    Args:
        study: names it.
        shared: what the server broadcast beside the model; an adaptive clip is there. None on the server, where no step depends on it.
    """
    if study.privacy is None:
        return () if study.update.clip_l2 is None else (ClipL2(study.update.clip_l2),)
    if study.privacy.unit != "client":
        return (Uniform(),)
    from fedlearn.privacy.clipping import Contribute
    from fedlearn.privacy.study import clip_in

    return (Contribute(clip_in(study.privacy, shared), study.privacy.clipping == "adaptive"),)


def apply_on_client(chain: Sequence[Postprocessor], update: Update) -> Update:
    """All steps in order."""
    for step in chain:
        update = step.on_client(update)
    return update


def apply_on_server(chain: Sequence[Postprocessor], aggregate: Aggregate) -> Aggregate:
    """All steps in reverse."""
    for step in reversed(chain):
        aggregate = step.on_server(aggregate)
    return aggregate
