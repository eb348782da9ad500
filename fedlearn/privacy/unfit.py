"""Rows that a task's code cannot take, and models that let one row reach another: neither may show in whether a site answers.

The server chooses the model and its options, so whether a row raises may be its choice too. A row that raises counts as nothing, like one
whose gradient is not finite, and the others go on. What is wrong with the model itself is found on rows of nobody, before the site's
own are looked at, and that is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from fedlearn.errors import UnsupportedError
from fedlearn.learning.task import Batch

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Arrays
    from fedlearn.learning.rows import IntArray

log = logging.getLogger("fedlearn.privacy")
T = TypeVar("T")

STAND_INS: Final = 8
"""Rows of nobody that a model is tried on."""
LARGEST: Final = float(np.finfo(np.float32).max)
"""Of an update's numbers, in float64 too: their squares can still be added up."""


def where_it_works(rows: IntArray, work: Callable[[IntArray], T]) -> Iterator[tuple[IntArray, T]]:
    """Work on all rows at once; where that raises, on each half by itself, down to single rows, which are left out.

    What the work gives for a row must not depend on the rows beside it: then nobody else's result changes.

    Args:
        rows: row numbers, shape (n,).
        work: on some of them.

    Raises:
        UnsupportedError: the work's own: it is about the model, and no row's fault.
    """
    waiting, out, first = [rows] if len(rows) else [], 0, ""
    while waiting:
        some = waiting.pop()
        try:
            done = work(some)
        except UnsupportedError:
            raise
        except Exception as error:  # a task's own code may raise anything
            if len(some) > 1:
                waiting += [some[len(some) // 2 :], some[: len(some) // 2]]
            else:
                out, first = out + 1, first or f"{type(error).__name__}: {error}"
            continue
        yield some, done
    if out:
        log.warning("%d of %d rows count as nothing; on the first the task's own code raised %s", out, len(rows), first)


def in_range(update: Iterable[Arrays]) -> bool:
    """Whether all numbers of an update are finite, and within `LARGEST`, so that nothing on their way out refuses them.

    Args:
        update: the arrays of each release.
    """
    return all(float(np.abs(array).max(initial=0)) <= LARGEST for arrays in update for array in arrays.values())


def stand_ins(like: Batch) -> Batch:
    """Rows of nobody in the shapes and dtypes of a task's own: numbers from a fixed seed, classes and tokens 0 and 1."""
    generator = np.random.default_rng(0)

    def of(
        shape: tuple[int, ...], dtype: np.dtype[np.generic], spread: float
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        if dtype.kind == "f":
            return (spread * generator.random(shape)).astype(dtype)
        return generator.integers(0, 2, size=shape).astype(dtype)

    return Batch(
        of((STAND_INS, *like.x.shape[1:]), like.x.dtype, 2.0), of((STAND_INS, *like.y.shape[1:]), like.y.dtype, 1.0)
    )


def check_apart(losses: Callable[[IntArray], torch.Tensor], rows: int) -> None:
    """Refuse a model whose `forward` lets one row reach another row's loss: by whatever way, no clip of gradients bounds that.

    A row's loss must be the same whichever rows are beside it. Layers that draw must draw the same at both calls.

    Args:
        losses: row numbers to one loss a row.
        rows: how many there are, 2 or more.

    Raises:
        UnsupportedError: it is not the same.
    """
    import torch  # not above: a site's agent reads this file, and never runs a model

    places = np.arange(rows, dtype=np.int64)
    among = losses(places)
    for first in (0, 1):  # every second row keeps its place, and has another beside it
        kept = places[first::2]
        others = np.minimum(places // 2, len(kept) - 1)
        if not torch.allclose(among[kept], losses(kept[others])[kept], rtol=1e-4, atol=1e-6, equal_nan=True):
            raise UnsupportedError(
                "model: a row's loss depends on which rows are beside it: examples are not separate",
                hint="no mean, softmax or sort over the batch; fedlearn check-model says more",
            )
