"""A random rotation that spreads an update evenly over its coordinates, without a byte of padding.

Signs are flipped at random and each block of m coordinates goes through a Walsh-Hadamard transform (Ailon and Chazelle 2009; Suresh et al. 2017,
"Distributed mean estimation with limited communication", section 3), so that no coordinate is much larger than the others: a ring needs fewer bits, whatever
the update looks like. What is left over at the end is rotated together with the end of the last block, so the length stays as it is. The rotation is
public and equal for all clients of a round; it keeps norms, so it changes nothing about privacy.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.secagg.primitives import Suite, derive, key_stream

BLOCK: Final = 1 << 14
"""Coordinates that are mixed: its matrices of 128 x 128 stay in the cache, and larger blocks save less than a bit."""
Floats = npt.NDArray[Any]


def block_of(length: int) -> int:
    """m: the largest power of two that fits, at most `BLOCK`."""
    return min(BLOCK, 1 << (length.bit_length() - 1))


def largest_after(length: int, clip_l2: float, failure: float) -> float:
    """A bound on a rotated coordinate that an update of norm `clip_l2` keeps everywhere with all but probability `failure`.

    A coordinate is a sum of at most m terms with random signs, whose squares add up to clip^2 / m at the most; Hoeffding's inequality over both
    tails of `length` coordinates, and of those that are rotated twice.
    """
    spread = 2 * math.log(2 * (length + block_of(length)) / failure) / block_of(length)
    return clip_l2 * min(1.0, math.sqrt(spread))


def rotated(vector: Floats, key: bytes) -> Floats:
    """The rotation of a vector.

    Args:
        vector: float32 or float64, shape (length,); left as it is.
        key: 32 bytes: public, equal for all clients of a round, fresh for each.

    Returns:
        Of the same shape, dtype and norm.
    """
    out = vector.astype(vector.dtype if vector.dtype.itemsize >= 4 else np.float32)
    for which, part in enumerate(_parts(out)):
        _flip(part, derive(key, b"rotation" + bytes([which])))
        _transform(part)
    return out


def unrotated(vector: Floats, key: bytes) -> Floats:
    """The vector whose rotation this is; arguments as for `rotated`."""
    out = vector.astype(vector.dtype if vector.dtype.itemsize >= 4 else np.float32)
    for which, part in reversed(list(enumerate(_parts(out)))):
        _transform(part)
        _flip(part, derive(key, b"rotation" + bytes([which])))
    return out


def _parts(vector: Floats) -> list[Floats]:
    """All whole blocks from the start; then, if something is left over, the last m coordinates."""
    block = block_of(len(vector))
    whole = len(vector) // block * block
    return [vector[:whole]] + ([vector[-block:]] if whole < len(vector) else [])


def _flip(part: Floats, key: bytes) -> None:
    """A sign for each coordinate, from the key."""
    stream = key_stream(Suite.X25519_AES256, key)
    for low in range(0, len(part), BLOCK):
        block = part[low : low + BLOCK]
        bits = np.unpackbits(np.frombuffer(stream.update(bytes(-(-len(block) // 8))), dtype=np.uint8), count=len(block))
        block *= np.array([1, -1], dtype=block.dtype)[bits]


def _transform(part: Floats) -> None:
    """The orthonormal Walsh-Hadamard transform of each block: of its rows and of its columns. It is its own inverse."""
    block = block_of(len(part))
    rows = 1 << (block.bit_length() - 1) // 2
    cube = part.reshape(-1, rows, block // rows)
    left, right = _matrix(rows, part.dtype), _matrix(block // rows, part.dtype)
    for one in cube:  # one by one: a product of this size wakes none of BLAS' threads
        np.matmul(left, one @ right, out=one)


@lru_cache(maxsize=64)
def _matrix(size: int, dtype: np.dtype[Any]) -> Floats:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = (matrix / math.sqrt(size)).astype(dtype)
    matrix.setflags(write=False)
    return matrix
