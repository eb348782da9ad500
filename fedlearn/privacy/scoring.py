"""How one example counts in an evaluation under a privacy plan, and what metrics follow from the noisy sums.

An evaluation releases sums of short vectors, one an example, of L2 norm 1 at the most: so one row more or less moves the sums by
at most 1, and `fedlearn.privacy.evaluation` knows how much noise that takes. All grids and ranges here are public constants; metrics are post-processing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlearn.errors import StudyError, UnsupportedError

Floats = npt.NDArray[np.float64]

NAN = math.nan


class Scoring(ABC):
    """What an example contributes, and what becomes of the sums."""

    @property
    @abstractmethod
    def cells(self) -> int:
        """How many numbers a contribution has."""

    @abstractmethod
    def contributions(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
        """One vector an example, of L2 norm 1 at the most; a function of that example alone.

        Args:
            outputs: the model's, shape (n, ...).
            y: labels, shape (n, ...).

        Returns:
            Shape (n, cells).

        Raises:
            UnsupportedError: outputs or labels of a kind that is not scored so.
        """

    @abstractmethod
    def metrics(self, sums: Floats, std: float) -> dict[str, float]:
        """Metrics by name; NaN where one is not defined, or drowns: a count that is not above its own noise is no denominator.

        Args:
            sums: noisy, shape (cells,).
            std: of the noise on each of them; 0 for none.
        """

    @abstractmethod
    def count(self, sums: Floats) -> float:
        """How many units were scored, with noise: may be negative."""


@dataclass(frozen=True)
class ShareRight(Scoring):
    """(share right, share wrong) of an example: a class that is right or not, or the share of a sequence's places.

    Args:
        metric: what the share of all is called.
    """

    metric: str = "accuracy"

    @property
    def cells(self) -> int:
        return 2

    def contributions(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
        """The largest output is the answer; of a single output, whether it is above 0. Places of a sequence are dimension 1."""
        if y.dtype.kind not in "iub" or outputs.ndim != y.ndim + 1:
            raise UnsupportedError(
                f"scoring: got outputs of shape {outputs.shape} for labels {y.dtype}{list(y.shape)}, expected one number a class",
                hint="override the task's scoring(), or leave privacy.evaluation_noise out",
            )
        answer = outputs[..., 0] > 0 if outputs.shape[-1] == 1 else outputs.argmax(axis=-1)
        places = (answer == y).reshape(len(y), math.prod(y.shape[1:]))
        right = places.mean(axis=1) if places.size else np.zeros(len(y))
        return np.column_stack([right, 1.0 - right])

    def metrics(self, sums: Floats, std: float) -> dict[str, float]:
        return {self.metric: _share(float(sums[0]), self.count(sums), std * math.sqrt(2))}

    def count(self, sums: Floats) -> float:
        return float(sums.sum())


@dataclass(frozen=True)
class BinaryScores(Scoring):
    """A 1 in the cell of (label, bin of the score): a histogram for each of two labels.

    The score is the log-odds of the second label: a single output, or the difference of two. Accuracy, balanced accuracy and the areas
    are those of scores rounded to their bin; AUC and average precision are computed from the histograms after they were
    projected on what counts can be (not negative, the same total; the nearest such in L2).

    Args:
        bins: for each label, equally wide in log-odds; an even number, so that 0 is an edge.
        limit: log-odds beyond it are in the last bin; 8 is a probability of 0.9997.
    """

    bins: int = 16
    limit: float = 6.0

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins % 2 or not 0 < self.limit < math.inf:
            raise StudyError(
                f"scoring: got {self.bins} bins up to {self.limit}, expected an even number and a limit above 0"
            )

    @property
    def cells(self) -> int:
        return 2 * self.bins

    def contributions(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
        if outputs.ndim != 2 or outputs.shape[1] > 2 or y.ndim != 1 or y.dtype.kind not in "iub":
            raise UnsupportedError(
                f"scoring: got outputs of shape {outputs.shape} for labels {y.dtype}{list(y.shape)}, expected two classes"
            )
        odds = outputs.astype(np.float64)
        score = odds[:, 0] if odds.shape[1] == 1 else odds[:, 1] - odds[:, 0]
        known = ~np.isnan(score)
        inside = np.clip(np.where(known, score, 0.0), -self.limit, self.limit)
        place = np.floor((inside + self.limit) * (self.bins / (2 * self.limit))).astype(np.int64)
        out = np.zeros((len(y), self.cells))
        out[np.arange(len(y)), np.minimum(place, self.bins - 1) + self.bins * (y != 0)] = known
        return out

    def metrics(self, sums: Floats, std: float) -> dict[str, float]:
        halves = sums.reshape(2, self.bins)
        totals = halves.sum(axis=1)
        noise = std * math.sqrt(self.bins)
        low, high = halves[0, : self.bins // 2].sum(), halves[1, self.bins // 2 :].sum()
        specificity, recall = (
            _share(float(low), float(totals[0]), noise),
            _share(float(high), float(totals[1]), noise),
        )
        found = {
            "accuracy": _share(float(low + high), float(totals.sum()), noise * math.sqrt(2)),
            "balanced_accuracy": (specificity + recall) / 2,
            "auc": NAN,
            "average_precision": NAN,
        }
        if not totals.min() > noise:
            return found
        negative, positive = (_as_counts(half) for half in halves)
        below = np.cumsum(negative) - negative / 2  # a tie counts one half
        found["auc"] = float(positive @ below / (positive.sum() * negative.sum()))
        hits, misses = (np.cumsum(counts[::-1]) for counts in (positive, negative))
        precision = np.divide(hits, hits + misses, out=np.zeros_like(hits), where=hits > 0)
        found["average_precision"] = float(positive[::-1] @ precision / positive.sum())
        return found

    def count(self, sums: Floats) -> float:
        return float(sums.sum())


@dataclass(frozen=True)
class SquaredErrors(Scoring):
    """(1, label, label squared, error squared, error) of a regression, each from -1 to 1, divided by sqrt(5).

    Args:
        low: of the label's usual range; labels and outputs outside of it count as its ends.
        high: likewise.
    """

    low: float
    high: float

    @property
    def cells(self) -> int:
        return 5

    def contributions(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> Floats:
        if outputs.ndim != 2 or outputs.shape[1] != 1 or y.ndim != 1:
            raise UnsupportedError(
                f"scoring: got outputs of shape {outputs.shape} for labels of shape {y.shape}, expected one number each"
            )
        label, output = (self._unit(values.astype(np.float64)) for values in (y, outputs[:, 0]))
        error = np.abs(output - label) / 2
        parts = np.column_stack([np.ones(len(y)), label, label**2, error**2, error])
        return np.where(np.isfinite(parts).all(axis=1, keepdims=True), parts, 0.0) / math.sqrt(5)

    def metrics(self, sums: Floats, std: float) -> dict[str, float]:
        count, label, squared, error_squared, error = (sums * math.sqrt(5)).tolist()
        noise = std * math.sqrt(5)
        if not count > noise:
            return {"r2": NAN, "mae": NAN}
        spread = squared - label**2 / count
        r2 = 1 - 4 * error_squared / spread if spread > noise else NAN
        return {"r2": min(r2, 1.0), "mae": max(error, 0.0) / count * (self.high - self.low)}

    def count(self, sums: Floats) -> float:
        return float(sums[0] * math.sqrt(5))

    def _unit(self, values: Floats) -> Floats:
        """-1 at the low end, 1 at the high one."""
        scaled: Floats = np.clip((values - self.low) / (self.high - self.low), 0.0, 1.0) * 2 - 1
        return scaled


def _share(part: float, whole: float, noise: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > noise else NAN


def _as_counts(noisy: Floats) -> Floats:
    """The nearest vector, in L2, without negative entries and of the same total, which is above 0.

    Held, Wolfe and Crowder 1974; Duchi et al. 2008, figure 1: subtract one number from all, and cut off at 0.
    """
    falling = np.sort(noisy)[::-1]
    surplus = (np.cumsum(falling) - noisy.sum()) / np.arange(1, len(noisy) + 1)
    kept = np.flatnonzero(falling > surplus)[-1]
    counts: Floats = np.maximum(noisy - surplus[kept], 0.0)
    return counts
