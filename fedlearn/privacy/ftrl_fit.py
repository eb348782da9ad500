"""Which buffers a BLT matrix should have for a plan: those with the least error of the running sums for the same privacy.

McMahan et al. 2024, section 4: the weights and decays are found by minimising sensitivity x error for the plan's rounds, separation and
participations. Two buffers came within 4 % of bands as wide as the separation, or were better, for the plans that were tried (`test_ftrl.py`), and cost
two models of memory, where a banded matrix costs one a band.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np

from fedlearn.errors import StudyError
from fedlearn.privacy.ftrl import BufferedToeplitz, FloatArray, error_of, sensitivity

MAX_FITTED_ROUNDS: Final = 5_000
"""The search takes seconds for so many, and grows with them."""
_DIGITS: Final = 4  # of what is found, so that another version's last digits make no other plan
_FAR: Final = 30.0


@lru_cache(maxsize=64)
def fitted(rounds: int, separation: int, participations: int, buffers: int = 2) -> BufferedToeplitz:
    """The BLT matrix for a plan.

    Args:
        rounds: planned, up to `MAX_FITTED_ROUNDS`.
        separation: rounds between a client's participations at the least.
        participations: of a client at the most.
        buffers: models of memory.

    Raises:
        StudyError: too many rounds.
    """
    if rounds > MAX_FITTED_ROUNDS:
        raise StudyError(
            f"privacy: a BLT matrix for {rounds} rounds; the limit MAX_FITTED_ROUNDS is {MAX_FITTED_ROUNDS}",
            hint='take privacy.matrix = "banded"',
        )
    from scipy.optimize import minimize

    def loss(point: FloatArray) -> float:
        found = _blt(point, buffers)
        coefficients = found.coefficients(rounds)
        if rounds > 1 and coefficients[1] > 1:  # rises: no sensitivity is known
            return 1e3 * float(coefficients[1])
        weights, decays = np.array(found.weights), np.array(found.decays)
        inverse = _inverse(weights, decays, rounds)
        return math.log(sensitivity(coefficients, separation, participations) * error_of(inverse))

    gaps = np.geomspace(1 / max(rounds, 4), 0.5, buffers)
    start = np.concatenate([np.log(0.3 * np.sqrt(gaps)), np.log((1 - gaps) / gaps)])
    options = {"maxiter": 200 * buffers, "xatol": 1e-3, "fatol": 1e-6}
    best = minimize(loss, start, method="Nelder-Mead", options=options)
    return _blt(best.x, buffers)


def _blt(point: FloatArray, buffers: int) -> BufferedToeplitz:
    bounded = np.clip(point, -_FAR, _FAR)
    weights, decays = np.exp(np.minimum(bounded[:buffers], 1.0)), 1 / (1 + np.exp(-bounded[buffers:]))
    # Rounded down, so that no decay becomes 1.
    return BufferedToeplitz(
        tuple(float(f"{w:.{_DIGITS}g}") for w in weights),
        tuple(math.floor(d * 10**_DIGITS) / 10**_DIGITS for d in decays),
    )


def _inverse(weights: FloatArray, decays: FloatArray, rounds: int) -> FloatArray:
    """The first column of C^-1: the noise that one number 1 in the first round makes."""
    buffers, found = np.zeros(len(weights)), np.zeros(rounds)
    entering = 1.0
    for t in range(rounds):
        found[t] = entering - weights @ buffers
        entering = 0.0
        buffers = decays * buffers + found[t]
    return found
