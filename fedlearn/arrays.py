"""Named arrays, and how they become bytes and come back, with limits.

`Arrays` is the one shape in which models, client updates, control variates and optimiser state travel: names to numpy
arrays, in a fixed order. The bytes are safetensors: a JSON header and raw little-endian data, no code, no pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as _safetensors_load
from safetensors.numpy import save as _safetensors_save

from fedlearn.errors import LimitExceededError, UpdateError

Array = npt.NDArray[np.generic]
Arrays = Mapping[str, npt.NDArray[np.generic]]

DTYPES: Final = frozenset(
    {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "bool"}
)


@dataclass(frozen=True)
class ArrayLimits:
    """Named limits on what another party may make us allocate."""

    tensors: int = 100_000
    name_bytes: int = 1_024
    dimensions: int = 8
    total_bytes: int = 2 * 1024**3
    header_bytes: int = 16 * 1024**2


LIMITS: Final = ArrayLimits()


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one named array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def specs_of(arrays: Arrays) -> dict[str, Spec]:
    """Names, shapes and dtypes, in order."""
    return {name: Spec(tuple(a.shape), str(a.dtype)) for name, a in arrays.items()}


def size_bytes(arrays: Arrays) -> int:
    """Bytes of all arrays' data."""
    return sum(a.nbytes for a in arrays.values())


def to_bytes(arrays: Arrays) -> bytes:
    """Arrays to safetensors bytes; the same arrays give the same bytes.

    The order of names is not kept by the format: `from_bytes` returns them sorted by name.
    """
    for name, array in arrays.items():
        if str(array.dtype) not in DTYPES:
            raise UpdateError(f"array {name!r}: got dtype {array.dtype}, expected one of {', '.join(sorted(DTYPES))}")
    return bytes(_safetensors_save({name: _contiguous(arrays[name]) for name in sorted(arrays)}))


def from_bytes(data: bytes | memoryview, limits: ArrayLimits = LIMITS) -> dict[str, Array]:
    """Safetensors bytes to arrays, refusing what exceeds a limit.

    Args:
        data: what `to_bytes` returned, possibly from a hostile sender.
        limits: the named limits.

    Raises:
        LimitExceededError: a limit is exceeded; nothing was allocated for it.
        UpdateError: the bytes are not safetensors.
    """
    if len(data) > limits.total_bytes + limits.header_bytes:
        raise LimitExceededError(f"arrays: got {len(data)} bytes, limit total_bytes is {limits.total_bytes}")
    if len(data) < 8:
        raise UpdateError(f"arrays: got {len(data)} bytes, expected a safetensors header")
    header = int.from_bytes(data[:8], "little")
    if header > limits.header_bytes:
        raise LimitExceededError(f"arrays: header of {header} bytes, limit header_bytes is {limits.header_bytes}")
    try:
        arrays: dict[str, Array] = dict(_safetensors_load(bytes(data)))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UpdateError(f"arrays: not valid safetensors bytes: {error}") from None
    check_limits(arrays, limits)
    return {name: arrays[name] for name in sorted(arrays)}


def check_limits(arrays: Arrays, limits: ArrayLimits = LIMITS) -> None:
    """Refuse arrays that exceed a named limit or have a dtype that is not sent."""
    if len(arrays) > limits.tensors:
        raise LimitExceededError(f"arrays: got {len(arrays)} tensors, limit tensors is {limits.tensors}")
    for name, array in arrays.items():
        if len(name.encode()) > limits.name_bytes:
            raise LimitExceededError(
                f"arrays: a name of {len(name.encode())} bytes, limit name_bytes is {limits.name_bytes}"
            )
        if array.ndim > limits.dimensions:
            raise LimitExceededError(
                f"array {name!r}: {array.ndim} dimensions, limit dimensions is {limits.dimensions}"
            )
        if str(array.dtype) not in DTYPES:
            raise UpdateError(f"array {name!r}: got dtype {array.dtype}, expected one of {', '.join(sorted(DTYPES))}")


def check_same(got: Arrays, expected: Mapping[str, Spec], *, what: str = "update") -> None:
    """Refuse arrays whose names, shapes or dtypes differ from `expected`.

    Raises:
        UpdateError: names the first difference, with what was got and what was expected.
    """
    missing = [n for n in expected if n not in got]
    surplus = [n for n in got if n not in expected]
    if missing or surplus:
        raise UpdateError(
            f"{what}: missing arrays {missing[:5]}, unexpected arrays {surplus[:5]}",
            hint="the sender runs another model; check that both sides name the same task and version",
        )
    for name, spec in expected.items():
        have = Spec(tuple(got[name].shape), str(got[name].dtype))
        if have != spec:
            raise UpdateError(
                f"{what}: array {name!r} is {have}, expected {spec}",
                hint="the sender runs another model; check that both sides name the same task and version",
            )


def check_finite(arrays: Arrays, *, what: str = "update") -> None:
    """Refuse NaN and infinities, naming the first array that holds one."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int(array.size - np.isfinite(array).sum())
            raise UpdateError(
                f"{what}: array {name!r} holds {count} value(s) that are not finite",
                hint="training diverged or the data holds NaN; lower the learning rate or check the data",
            )


def digest(arrays: Arrays) -> str:
    """SHA-256 over names, dtypes, shapes and data, as hex. Equal arrays have equal digests, whatever their order."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = _contiguous(arrays[name])
        sha.update(f"{len(name)}:{name}:{array.dtype}:{array.shape};".encode())
        sha.update(array.data.cast("B") if array.size else b"")
    return sha.hexdigest()


def _contiguous(array: Array) -> Array:
    """In C order; unlike `numpy.ascontiguousarray`, a scalar stays one."""
    return np.require(array, requirements="C") if array.ndim else array
