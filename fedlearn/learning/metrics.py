"""Metrics over a whole test set, in numpy: NaN where a metric is not defined, never a guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]


def accuracy(predicted: Numbers, y: Numbers) -> float:
    """Share of equal entries; NaN over nothing.

    Args:
        predicted: class ids, any shape.
        y: class ids, the same shape.
    """
    return float(np.mean(predicted == y)) if y.size else float("nan")


def balanced_accuracy(predicted: Numbers, y: Numbers) -> float:
    """Mean over the classes present in `y` of the share recognised; NaN over nothing."""
    return (
        float(np.mean([np.mean(predicted[y == label] == label) for label in np.unique(y)])) if y.size else float("nan")
    )


def roc_auc(scores: Numbers, y: Numbers) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    Hanley and McNeil 1982, by ranks. NaN where only one class is present.

    Args:
        scores: shape (n,); higher means positive.
        y: shape (n,), 0 or 1.
    """
    positives = int(np.count_nonzero(y))
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mid_rank = last - (counts - 1) / 2
    rank_sum = float(mid_rank[inverse][y != 0].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def average_precision(scores: Numbers, y: Numbers) -> float:
    """Average precision: sum over thresholds of (recall step) * precision, tied scores forming one threshold.

    NaN without positives.

    Args:
        scores: shape (n,); higher means positive.
        y: shape (n,), 0 or 1.
    """
    positives = int(np.count_nonzero(y))
    if positives == 0:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    sorted_scores = scores[order]
    threshold_ends = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))
    hits = np.cumsum(y[order] != 0)[threshold_ends]
    precision = hits / (threshold_ends + 1)
    recall_steps = np.diff(hits, prepend=0) / positives
    return float(np.sum(recall_steps * precision))
