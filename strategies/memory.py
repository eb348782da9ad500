"""Named arrays within the server's memory: one prefix for each thing that a server rule keeps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlearn.arrays import Arrays

Doubles = dict[str, npt.NDArray[np.float64]]


def constant(model: Arrays, value: float) -> Doubles:
    """One value in the model's shapes, float64."""
    return {name: np.full(weights.shape, value) for name, weights in model.items()}


def pack(**kept: Doubles) -> Doubles:
    """Several things under their names: `momentum:conv.weight` and so on."""
    return {f"{what}:{name}": np.asarray(array) for what, arrays in kept.items() for name, array in arrays.items()}


def unpack(memory: Arrays, what: str, model: Arrays) -> Doubles:
    """One thing back, by the model's names."""
    return {name: memory[f"{what}:{name}"].astype(np.float64) for name in model}
