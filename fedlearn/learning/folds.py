"""Which rows train and which test: three ways to cut one client's rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.errors import DataError

if TYPE_CHECKING:
    from fedlearn.learning.rows import IntArray
    from fedlearn.learning.task import Examples


def stratified_fold(y: npt.NDArray[Any], seed: int, folds: int, fold: int) -> tuple[IntArray, IntArray]:
    """Rows in and out of one of k folds, each label spread as evenly as its count allows.

    Rows keep their order. Labels of more than one dimension are not stratified.

    Returns:
        Training rows and test rows, int64, ascending, disjoint, together all rows.
    """
    _check(folds, fold)
    n = len(y)
    if folds == 1:
        return _halves(np.zeros(n, dtype=bool))
    labels = y if y.ndim == 1 else np.zeros(n, dtype=np.int64)
    order = seeds.numpy_generator(seed, "fold").permutation(n)
    by_label = order[np.argsort(labels[order], kind="stable")]
    in_test = np.zeros(n, dtype=bool)
    in_test[by_label[fold::folds]] = True
    return _halves(in_test)


def time_ordered_fold(n: int, folds: int, fold: int) -> tuple[IntArray, IntArray]:
    """The past trains, the future tests: for rows in the order of time.

    Fold 0 tests on the last 1/k of the rows; fold f on the block f places earlier. What comes after a test block is not used, so
    the last fold, whose test block is the first, has nothing to train on and is refused.

    Returns:
        Training rows and test rows, int64, ascending; every training row is before every test row.
    """
    if folds < 1 or not 0 <= fold < max(folds - 1, 1):
        raise DataError(f"fold: got {fold} of {folds}, expected 0 <= fold < folds - 1 for a split by time")
    rows = np.arange(n, dtype=np.int64)
    if folds == 1:
        return rows, rows[:0]
    start, end = n * (folds - 1 - fold) // folds, n * (folds - fold) // folds
    return rows[:start], rows[start:end]


def unit_fold(examples: Examples, seed: int, folds: int, fold: int) -> tuple[IntArray, IntArray]:
    """Each row by itself, or each group as a whole, into one of k folds: what a privacy plan for records or groups needs.

    The other two ways look at all rows, so that one row more would move others between the halves, and what is
    clipped and noised would no longer bound what that row changes. Here a fold is a keyed hash (BLAKE2b) of the row's own bytes, or of its group's id. A row
    that is there twice is in one half, and so is a group. The test share is 1/k in the mean only.

    Args:
        examples: one client's rows; with groups, these decide.
        seed: the key.
        folds: k; 1 means that all rows train and none test.
        fold: which of the k folds is the test set, from 0.

    Returns:
        Training rows and test rows, int64, ascending, disjoint, together all rows.
    """
    _check(folds, fold)
    if folds == 1:
        return _halves(np.zeros(len(examples), dtype=bool))
    if examples.groups is None:
        rows = zip(_bytes_of_rows(examples.x), _bytes_of_rows(examples.y), strict=True)
        fold_of = [_hashed(b"row" + x + y, seed, folds) for x, y in rows]
    else:
        known = {group: _hashed(b"group" + _text(group), seed, folds) for group in np.unique(examples.groups)}
        fold_of = [known[group] for group in examples.groups]
    return _halves(np.array(fold_of, dtype=np.int64) == fold)


def _bytes_of_rows(array: npt.NDArray[Any]) -> Iterable[bytes]:
    """What stands in each row, whatever stands in the others: a column of text is as wide as its longest cell."""
    flat = array.reshape(len(array), math.prod(array.shape[1:]))
    if array.dtype.kind in "biuf":
        return (row.tobytes() for row in flat)
    return (b"\0".join(_text(cell) for cell in row) for row in flat)


def _text(value: Any) -> bytes:
    return str(value).encode("utf-8", "surrogatepass")


def _hashed(data: bytes, seed: int, folds: int) -> int:
    digest = hashlib.blake2b(data, key=seed.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % folds


def _check(folds: int, fold: int) -> None:
    if folds < 1 or not 0 <= fold < folds:
        raise DataError(f"fold: got {fold} of {folds}, expected 0 <= fold < folds and folds >= 1")


def _halves(in_test: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    return np.flatnonzero(~in_test).astype(np.int64), np.flatnonzero(in_test).astype(np.int64)
