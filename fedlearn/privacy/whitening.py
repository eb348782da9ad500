"""Correlated noise made independent again: what whoever reads all releases of DP-FTRL can do.

Round t releases g_t + (C^-1 Z)_t (ftrl.py). C is public, so C times the releases is C G + Z: the mechanism that is accounted.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedlearn.privacy.ftrl import FloatArray


class Whitening:
    """C times a series, one member after another; C is lower triangular Toeplitz.

    Args:
        coefficients: C's first column, shape (rounds,). As many earlier members are kept as it has entries before its last zeros.
    """

    def __init__(self, coefficients: FloatArray) -> None:
        self._coefficients = np.trim_zeros(coefficients, "b")
        self._past: deque[FloatArray] = deque(maxlen=len(self._coefficients))

    def next(self, member: FloatArray) -> FloatArray:
        """The next member of the product, float64, shaped like the given one."""
        self._past.appendleft(np.array(member, dtype=np.float64))
        found = np.zeros_like(self._past[0])
        for coefficient, past in zip(self._coefficients, self._past, strict=False):
            found += coefficient * past
        return found
