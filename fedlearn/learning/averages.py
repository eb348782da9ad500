"""Means over clients of what they claim, for the history: whatever the claims are, these return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Scored


def mean_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over clients, weighted by test examples; a client whose metric is undefined is left out of that metric."""
    names = sorted({name for s in scored for name in s.metrics})
    means = {}
    for name in names:
        pairs = {s.client: (s.metrics[name], s.examples) for s in scored if name in s.metrics}
        means[name] = weighted_mean(pairs)
    return means


def weighted_mean(pairs: Mapping[str, tuple[float, int]]) -> float:
    """Mean of (value, weight) over clients, in the order of their names, without values that are not finite.

    NaN where none is left, and where the mean is beyond float's range.
    """
    kept = [pairs[client] for client in sorted(pairs) if math.isfinite(pairs[client][0])]
    weight = sum(w for _, w in kept)
    try:
        mean = math.fsum(v * w for v, w in kept) / weight if weight else math.nan
    except (OverflowError, ValueError):  # beyond float's range
        return math.nan
    return mean if math.isfinite(mean) else math.nan


def l2_norm(arrays: Arrays) -> float:
    """The L2 norm of all arrays taken as one vector, in float64."""
    return math.sqrt(math.fsum(float(np.square(a, dtype=np.float64).sum()) for a in arrays.values()))
