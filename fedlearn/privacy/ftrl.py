"""DP-FTRL: correlated noise for populations that cannot be sampled, client level.

Clients come when they can, so nothing is amplified by sampling; instead the noise of one round cancels part of the earlier rounds' (Kairouz et
al. 2021; Denisov et al. 2022, "Improved differential privacy for SGD via optimal private linear operators on adaptive streams").
Round t releases g_t + clip * std * (C^-1 Z)_t with Z independent standard normal and C lower triangular Toeplitz; all rounds together are one
Gaussian mechanism on C G, so the whole run costs one `Gaussian` event, whatever earlier releases were used for.

Two families of C:

*banded*  c_j = binom(2 j, j) / 4^j for j below the bands, else 0 (Kalinin and Lampert 2024, "Banded square root matrix factorization for
    differentially private model training"). Memory: bands - 1 models.
*BLT*     c_0 = 1, c_j = sum_i omega_i theta_i^(j - 1) (McMahan et al. 2024, "A hassle-free algorithm for strong differential privacy in federated
    learning systems": buffered linear Toeplitz). Memory: one model a buffer, for any number of rounds.

Sensitivity. A client that takes part at most every `separation` rounds moves C G by at most the norm of the sum of C's columns 0, b, 2 b, ...
times its clip, when the coefficients are not negative and never rise (Kalinin and Lampert 2024, theorem 2); as many columns as it may take part
times. The server must hold clients to both: see ftrl_run.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import LocalProtocolError, StudyError
from fedlearn.privacy.events import Cost, Gaussian, Relation

if TYPE_CHECKING:
    from fedlearn.privacy.mechanisms import Chance

FloatArray = npt.NDArray[np.float64]
MAX_ROUNDS: Final = 1_000_000
"""The most rounds of one plan."""


@dataclass(frozen=True)
class Banded:
    """Banded square root; 1 band is independent noise."""

    bands: int

    def __post_init__(self) -> None:
        if self.bands < 1:
            raise StudyError(f"DP-FTRL: bands: got {self.bands}, expected at least 1")

    def coefficients(self, rounds: int) -> FloatArray:
        """c_0 to c_(rounds - 1), shape (rounds,)."""
        ratios = [(2 * j - 1) / (2 * j) for j in range(1, min(self.bands, rounds))]
        found = np.zeros(rounds)
        found[: len(ratios) + 1] = np.cumprod([1.0, *ratios])
        return found


@dataclass(frozen=True)
class BufferedToeplitz:
    """Buffered linear Toeplitz.

    Args:
        weights: omega, one a buffer.
        decays: theta, one a buffer, from 0 and below 1.
    """

    weights: tuple[float, ...]
    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or len(self.weights) != len(self.decays):
            raise StudyError(
                f"DP-FTRL: got {len(self.weights)} weights and {len(self.decays)} decays, expected as many, and one"
            )
        if not all(math.isfinite(w) for w in self.weights) or not all(0 <= d < 1 for d in self.decays):
            raise StudyError("DP-FTRL: expected finite weights, and decays from 0 and below 1")

    def coefficients(self, rounds: int) -> FloatArray:
        """c_0 to c_(rounds - 1), shape (rounds,)."""
        powers = np.power.outer(np.array(self.decays), np.arange(rounds - 1))
        return np.concatenate([[1.0], np.array(self.weights) @ powers])


@dataclass(frozen=True)
class FtrlPlan:
    """A client-level plan without sampling.

    Args:
        strategy: the family of C.
        rounds: planned; more rounds than these are refused, because they would not be covered.
        separation: a client takes part at most once in so many consecutive rounds.
        clip_l2: of one contribution.
        noise_multiplier: standard deviation of the noise on C G / (clip x sensitivity): what the whole run is accounted with.
        delta: below 1 / `units`.
        units: how many clients there are at the least; a public number.
        most: a client takes part at most so often; None for as often as the separation lets it.

    Raises:
        StudyError: a number is out of range, or the coefficients rise or are negative: then no sensitivity is known.
    """

    strategy: Banded | BufferedToeplitz
    rounds: int
    separation: int
    clip_l2: float
    noise_multiplier: float
    delta: float
    units: int
    most: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("clip_l2", self.clip_l2), ("noise_multiplier", self.noise_multiplier)):
            if not (math.isfinite(value) and value > 0):
                raise StudyError(f"DP-FTRL: {name}: got {value}, expected a finite number above 0")
        if not 1 <= self.rounds <= MAX_ROUNDS or self.separation < 1 or (self.most is not None and self.most < 1):
            raise StudyError(
                f"DP-FTRL: got {self.rounds} rounds, separation {self.separation}, at most {self.most} participations; "
                f"expected at least 1 of each, and at most {MAX_ROUNDS} rounds"
            )
        if self.units < 1 or not 0 < self.delta * self.units < 1:
            raise StudyError(
                f"DP-FTRL: delta: got {self.delta:g} for {self.units} clients, expected less than 1/{self.units}"
            )
        found = self.strategy.coefficients(self.rounds)
        if found.min() < 0 or (np.diff(found) > 0).any():
            raise StudyError("DP-FTRL: the coefficients rise or are negative: their sensitivity is not known")

    @property
    def participations(self) -> int:
        """How often one client can take part."""
        possible = -(-self.rounds // self.separation)
        return possible if self.most is None else min(self.most, possible)

    @property
    def sensitivity(self) -> float:
        """How far one client moves C G, in clips."""
        return sensitivity(self.strategy.coefficients(self.rounds), self.separation, self.participations)

    @property
    def noise_std(self) -> float:
        """Standard deviation of Z for one round's sum of contributions."""
        return self.noise_multiplier * self.sensitivity * self.clip_l2

    def cost(self) -> Cost:
        """One Gaussian release, whole from its first round on: a run that is stopped early has spent it all the same."""
        return Cost(Gaussian(self.noise_multiplier), Relation.ADD_OR_REMOVE_ONE)

    def error(self) -> float:
        """Root mean square error of the running sums of all rounds, over rounds and coordinates: what a choice of C is judged by."""
        return self.noise_std * error_of(inverse_coefficients(self.strategy.coefficients(self.rounds)))


class CorrelatedNoise:
    """The noise of one round after another.

    Args:
        plan: says how much, and how it is correlated.
        size: coordinates of the sum.
        chance_of: of each round's Z, rounds counted from 1. Asked again for a round it must give the same again: then a new object's noise
            is this one's, and what was released before a crash is cancelled after it.
    """

    def __init__(self, plan: FtrlPlan, size: int, chance_of: Callable[[int], Chance]) -> None:
        self._plan, self._size, self._chance_of = plan, size, chance_of
        self._round, self._noise_std = 0, plan.noise_std
        if isinstance(plan.strategy, Banded):
            self._coefficients = plan.strategy.coefficients(min(plan.strategy.bands, plan.rounds))
            self._past: deque[FloatArray] = deque(maxlen=max(len(self._coefficients) - 1, 0))
        else:
            self._buffers = np.zeros((len(plan.strategy.decays), size))

    def next(self) -> FloatArray:
        """The next round's noise, float64, shape (size,).

        Raises:
            LocalProtocolError: the plan's rounds are over.
        """
        if self._round == self._plan.rounds:
            raise LocalProtocolError(f"DP-FTRL: the plan has {self._plan.rounds} rounds, and they are over")
        self._round += 1
        noise: FloatArray = self._chance_of(self._round).normal(self._size, self._noise_std)
        match self._plan.strategy:
            case Banded():
                for coefficient, past in zip(self._coefficients[1:], self._past, strict=False):
                    noise -= coefficient * past
                self._past.appendleft(noise)
            case BufferedToeplitz(weights, decays):
                noise -= np.array(weights) @ self._buffers
                self._buffers *= np.array(decays)[:, None]
                self._buffers += noise
        return noise.copy()


def sensitivity(coefficients: FloatArray, separation: int, participations: int) -> float:
    """Norm of the sum of a Toeplitz matrix's columns 0, b, 2 b, ... (Kalinin and Lampert 2024, theorem 2).

    Args:
        coefficients: the matrix's first column, shape (rounds,), not negative and never rising.
        separation: b.
        participations: how many columns.
    """
    rounds = len(coefficients)
    padded = np.zeros(-(-rounds // separation) * separation)
    padded[:rounds] = coefficients
    sums = np.cumsum(padded.reshape(-1, separation), axis=0)
    if participations < len(sums):
        sums[participations:] -= sums[:-participations].copy()
    return float(np.linalg.norm(sums.reshape(-1)[:rounds]))


def error_of(inverse: FloatArray) -> float:
    """Root mean square error of the running sums of C^-1 Z for standard normal Z, from the first column of C^-1."""
    prefix, rounds = np.cumsum(inverse), len(inverse)  # of A C^-1, A the running sums
    return math.sqrt(float(np.arange(rounds, 0, -1) @ prefix**2) / rounds)


def inverse_coefficients(coefficients: FloatArray) -> FloatArray:
    """The first column of the inverse of a lower triangular Toeplitz matrix, from the matrix's own first column. Quadratic in its length."""
    found = np.zeros(len(coefficients))
    found[0] = 1 / coefficients[0]
    for t in range(1, len(found)):
        found[t] = -(coefficients[1 : t + 1] @ found[:t][::-1]) / coefficients[0]
    return found
