"""A random order of many numbers, of which only the beginning is made."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.learning.rows import IntArray

SMALL: Final = 1 << 16
"""So many numbers are shuffled as they are."""
ROUNDS: Final = 6


class RandomOrder:
    """A permutation of 0 to `count - 1`, drawn from the seed and the path.

    Large ones are a Feistel network over a power of four, walked along its cycle until the number is in range (Black and Rogaway
    2002): any part costs what it is long.

    Args:
        count: of what.
        run_seed: the study's.
        path: what is ordered, and when.
    """

    def __init__(self, count: int, run_seed: int, *path: str | int) -> None:
        self._count = count
        self._order = None if count > SMALL else seeds.numpy_generator(run_seed, *path, "order").permutation(count)
        self._half = np.uint64((max(count - 1, 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(seeds.derive(run_seed, *path, "order", number)) for number in range(ROUNDS)]

    def take(self, start: int, stop: int) -> IntArray:
        """The numbers at places `start` to below `stop`, which must not exceed the count."""
        if self._order is not None:
            return self._order[start:stop]
        values = np.arange(start, stop, dtype=np.uint64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = self._permuted(values[outside])
            outside = values >= np.uint64(self._count)
        return values.astype(np.int64)

    def _permuted(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & ((np.uint64(1) << self._half) - np.uint64(1))
        for key in self._keys:
            mixed = seeds.mix(right + key) >> (np.uint64(64) - self._half)
            left, right = right, left ^ mixed
        return (left << self._half) | right
