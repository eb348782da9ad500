"""Chance that a privacy proof assumes secret: noise, and coins that decide who takes part.

Both modes run one code: an AES-256-CTR key stream, turned into coins and normal numbers. *Private*: the key comes from the operating
system and exists nowhere else. *Seeded*: the key follows from the study's seed, so that a rehearsal reproduces; whoever knows the seed can take
the noise off again, so nothing that is drawn is private.

Noise is drawn in floating point. Proofs are for real numbers; the gap (Mironov 2012, "On significance of the least significant bits") is
named in every claim (`plan.REAL_NUMBERS`). Radii have 53 random bits, so the tail is cut at 8.57 standard deviations, with a mass of 1e-17 a draw.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds

_BLOCK: Final = 1 << 14  # words a turn: all of its arrays stay in a core's cache
_ZEROS: Final = bytes(8 * _BLOCK)
_DOMAIN: Final = b"fedlearn/chance/v1"
_SINGLE: Final = (1e-15, 1e18)
"""Standard deviations in float32: the squares of smaller ones would be rounded to 0, and there would be no noise; those of larger ones are infinite."""


class Chance:
    """A stream of random numbers. Not thread-safe: one for each user.

    Use `secret_chance` or `seeded_chance`.

    Args:
        key: 32 bytes, used for one stream only.
        private: whether the key is known to nobody.
    """

    def __init__(self, key: bytes, *, private: bool) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self.private = private
        # A key is used for one stream, so the counter may start at zero.
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return f"Chance(private={self.private})"

    def _words(self, count: int) -> npt.NDArray[np.uint64]:
        """Up to `_BLOCK` words of 64 bits."""
        out = np.empty(count, dtype="<u8")
        self._stream.update_into(_ZEROS[: 8 * count], out.view(np.uint8))  # type: ignore[arg-type]  # a buffer
        return out

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Numbers from 0 up to, not including, 1, in multiples of 2^-53; shape (count,)."""
        out = np.empty(count)
        for first in range(0, count, _BLOCK):
            part = out[first : first + _BLOCK]
            np.multiply(
                (self._words(len(part)) >> np.uint64(11)).view(np.int64), 2.0**-53, out=part
            )  # signed is faster
        return out

    def coins(self, count: int, rate: float) -> npt.NDArray[np.bool_]:
        """Independent coins that are True with probability `rate`, to 2^-53; shape (count,)."""
        heads: npt.NDArray[np.bool_] = self.uniform(count) < rate
        return heads

    def add_normal(self, to: npt.NDArray[Any], std: float) -> None:
        """Add independent normal numbers of mean 0 to an array in place.

        Args:
            to: float32 or float64, contiguous, any shape. Angles are in its precision, radii are drawn in double.
            std: of the numbers.

        Raises:
            ValueError: float32 has no squares for this `std`, or the array is of another kind.
        """
        self.add_normals([to], std)

    def add_normals(self, to: Sequence[npt.NDArray[Any]], std: float) -> None:
        """As `add_normal`, to several arrays of one dtype: what each number gets is as if they were one array, one after another.

        So a model's gradient gets the same noise whether its layers are apart or in one vector, and small layers cost no call each.
        """
        flats = [array.reshape(-1) for array in to]
        for flat, array in zip(flats, to, strict=True):
            fits = flat.dtype == flats[0].dtype and flat.dtype in {np.dtype("f4"), np.dtype("f8")}
            if not fits or not (np.shares_memory(flat, array) or array.size == 0):
                raise ValueError(
                    f"noise: got an array of {array.dtype}, expected contiguous ones of float32 or float64"
                )
        left = sum(map(len, flats))
        if left and flats[0].dtype == np.dtype("f4") and not _SINGLE[0] <= std <= _SINGLE[1]:
            raise ValueError(
                f"noise: got a standard deviation of {std:g} in float32, expected {_SINGLE[0]:g} to {_SINGLE[1]:g}"
            )
        targets = iter(flats)
        target = flats[0][:0] if flats else np.empty(0, dtype="f4")
        while left:
            noise = self._normals(min(left, 2 * _BLOCK), std, target.dtype)
            left -= len(noise)
            while len(noise):
                if not len(target):
                    target = next(targets)
                part = min(len(target), len(noise))
                target[:part] += noise[:part]
                target, noise = target[part:], noise[part:]

    def _normals(self, count: int, std: float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Up to 2 * `_BLOCK` normal numbers: a radius and an angle give two (Box and Muller 1958)."""
        half = (count + 1) // 2
        squared = 1.0 - self.uniform(half)  # above 0, at most 1
        np.log(squared, out=squared)
        squared *= -2.0 * std * std
        radius = squared.astype(dtype, copy=False)
        np.sqrt(radius, out=radius)
        bits = 8 * dtype.itemsize  # of an angle
        words = self._words(-(-half * bits // 64)).view(f"<u{dtype.itemsize}")[:half]
        angle = words.astype(dtype)
        angle *= dtype.type(2 * math.pi * 2.0**-bits)
        pairs = np.empty((2, half), dtype=dtype)
        np.cos(angle, out=pairs[0])
        np.sin(angle, out=pairs[1])
        pairs *= radius
        return pairs.reshape(-1)[:count]

    def normal(self, count: int, std: float = 1.0, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """Independent normal numbers of mean 0, float32 or float64, shape (count,)."""
        out = np.zeros(count, dtype=dtype)
        self.add_normal(out, std)
        return out


def secret_chance() -> Chance:
    """Chance that nobody can repeat, keyed by the operating system."""
    return Chance(os.urandom(32), private=True)


def seeded_chance(run_seed: int, *path: str | int) -> Chance:
    """Chance that a study's seed determines: for rehearsals, never private. See `fedlearn.seeds.derive` for the path."""
    seed = seeds.derive(run_seed, *path)
    return Chance(hashlib.sha256(_DOMAIN + seed.to_bytes(8, "big")).digest(), private=False)
