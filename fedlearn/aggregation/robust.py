"""Robust centres of many updates, computed by blocks of coordinates: median, trimmed mean, Krum's selection.

Every function reads `UpdateStack.blocks()`, so memory is the block's and never model times clients. Rows come ordered by client id,
so the order of arrival cannot change a bit, and ties go to the smallest id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import UpdateError

if TYPE_CHECKING:
    from fedlearn.aggregation.stack import UpdateStack

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

_CHUNK: Final = 1024
"""Columns whose differences are taken at a time: 100 rows of them stay in a core's cache."""


def coordinate_median(stack: UpdateStack) -> Vector:
    """The median of each coordinate; the mean of the two middle values where the number of rows is even.

    Yin et al. 2018, definition 1.

    Returns:
        Shape (d,).

    Raises:
        UpdateError: no update was added.
    """
    centre = np.empty(stack.columns)
    for columns, block in stack.blocks():
        centre[columns] = np.median(block, axis=0, overwrite_input=True)
    return centre


def trimmed_mean(stack: UpdateStack, trim: int) -> Vector:
    """The mean of each coordinate without its `trim` smallest and `trim` largest values.

    Yin et al. 2018, definition 2.

    Args:
        stack: n updates.
        trim: how many are left out on each side; 0 gives the plain mean.

    Returns:
        Shape (d,).

    Raises:
        UpdateError: nothing would be left, or no update was added.
    """
    rows = len(stack)
    if trim < 0 or 2 * trim >= max(rows, 1):
        raise UpdateError(f"trimmed mean: got {rows} updates and trim {trim}, expected more than 2 * trim updates")
    centre = np.empty(stack.columns)
    for columns, block in stack.blocks():
        block.sort(axis=0)
        centre[columns] = block[trim : rows - trim].mean(axis=0)
    return centre


def mean_of_rows(stack: UpdateStack, rows: Sequence[int]) -> Vector:
    """The plain mean of some rows, shape (d,)."""
    chosen = sorted(rows)
    centre = np.empty(stack.columns)
    for columns, block in stack.blocks():
        centre[columns] = block[chosen].mean(axis=0)
    return centre


def squared_distances(stack: UpdateStack) -> Matrix:
    """Squared L2 distances between all pairs of rows.

    Differences are squared, rather than norms and a scalar product subtracted: where updates are close together and far from the
    origin, the short formula loses every digit. The price is about one nanosecond for each pair and coordinate.

    Returns:
        Shape (n, n), symmetric, zero on the diagonal; infinite where the square exceeds float64.
    """
    count = len(stack)
    upper = np.zeros((count, count))
    with np.errstate(over="ignore"):
        for _, block in stack.blocks():
            for start in range(0, block.shape[1], _CHUNK):
                chunk = np.ascontiguousarray(block[:, start : start + _CHUNK])
                for i in range(count - 1):
                    difference = chunk[i + 1 :] - chunk[i]
                    upper[i, i + 1 :] += np.einsum("ij,ij->i", difference, difference)
        return upper + upper.T


def krum_scores(distances: Matrix, byzantine: int) -> Vector:
    """Each row's sum of squared distances to its n - f - 2 closest other rows.

    Blanchard et al. 2017, section 4. A row is never its own neighbour.

    Args:
        distances: squared, shape (n, n).
        byzantine: f, how many rows may be an attacker's.

    Returns:
        Shape (n,).

    Raises:
        UpdateError: n < 2 f + 3, where Krum promises nothing.
    """
    count = len(distances)
    if byzantine < 0 or count < 2 * byzantine + 3:
        raise UpdateError(
            f"krum: got {count} updates with byzantine = {byzantine}, expected at least 2 * {byzantine} + 3 = "
            f"{2 * byzantine + 3} updates",
            hint="let more clients take part, or lower the strategy's option byzantine",
        )
    others = np.sort(distances[~np.eye(count, dtype=bool)].reshape(count, count - 1), axis=1)
    with np.errstate(over="ignore"):
        scores: Vector = others[:, : count - byzantine - 2].sum(axis=1)
    return scores


def select_krum(stack: UpdateStack, byzantine: int, select: int) -> tuple[int, ...]:
    """The rows with the `select` lowest Krum scores, best first; ties go to the smallest client id.

    Raises:
        UpdateError: n < 2 f + 3, or `select` is not from 1 to n.
    """
    count = len(stack)
    if count < 2 * byzantine + 3:  # before the distances, which are the expensive part
        krum_scores(np.zeros((count, count)), byzantine)
    if not 1 <= select <= count:
        raise UpdateError(f"krum: got select = {select} of {count} updates, expected 1 to {count}")
    scores = krum_scores(squared_distances(stack), byzantine)
    return tuple(int(i) for i in np.argsort(scores, kind="stable")[:select])
