"""Clients that draw from one pool: as many as one likes, each a pure function of the seed and its number, none of them stored.

The way of Hsu, Qi and Brown 2019 (section 3) to make a population, without exhausting the pool: client i draws its label shares
q from Dirichlet(alpha * p), with p the pool's own shares, and then examples by q, with replacement. pfl-research calls such clients
artificial. Clients share rows, so what one tests on another would train on: therefore test rows are set aside for all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.learning.rows import ClientRows, IntArray, ListedIds, NumberedIds, SortedIds

_TRAIN: Final = "train"
_TEST: Final = "test"


@dataclass(frozen=True)
class Pool:
    """Rows to draw from.

    Args:
        rows: row numbers, grouped by class where labels matter.
        starts: where each class begins in `rows`; shape (classes,).
        counts: rows of each class; shape (classes,).
    """

    rows: IntArray = field(repr=False)
    starts: IntArray = field(repr=False)
    counts: IntArray = field(repr=False)

    @classmethod
    def of(cls, rows: IntArray, classes: IntArray | None) -> Pool:
        """A pool of some rows, given the class of every row; without classes all are of one."""
        if classes is None:
            return cls(rows, np.zeros(1, dtype=np.int64), np.array([len(rows)]))
        mine = classes[rows]
        counts = np.bincount(mine, minlength=int(classes.max()) + 1)
        return cls(rows[np.argsort(mine, kind="stable")], np.cumsum(counts) - counts, counts)

    def at(self, label: IntArray, uniform: npt.NDArray[np.float64]) -> IntArray:
        """A row of the class for each uniform number, of the same shape."""
        counts = self.counts[label]
        place = np.minimum((uniform * counts).astype(np.int64), counts - 1)  # the product may round up
        return self.rows[self.starts[label] + place]


@dataclass(frozen=True)
class BootstrapRows(ClientRows):
    """Draws when asked.

    Args:
        numbering: everybody there could be.
        seed: of the draws.
        examples: rows of each client, training and test.
        alpha: concentration of the label shares; None draws rows whatever their label.
        classes: class of each row of the data; None without `alpha`.
        train: what training rows are drawn from.
        test: what test rows are drawn from; None where none are set aside.
        test_examples: how many of `examples` are test rows.
        shown: who of the numbered is in this mapping; None for all.
    """

    numbering: NumberedIds
    seed: int
    examples: int
    alpha: float | None
    classes: IntArray | None = field(repr=False)
    train: Pool = field(repr=False)
    test: Pool | None = field(default=None, repr=False)
    test_examples: int = 0
    shown: SortedIds | None = None

    @property
    def ids(self) -> SortedIds:
        return self.numbering if self.shown is None else self.shown

    @property
    def holds_out(self) -> bool:
        return self.test is not None

    def set_aside(self, train: IntArray, test: IntArray, folds: int) -> Self:
        """The same clients with test rows of their own: a share 1 / folds of each, drawn from `test`, the others from `train`."""
        if not len(test) or not len(train) or self.examples < 2:
            return self
        mine = min(max(1, round(self.examples / folds)), self.examples - 1)
        return replace(self, train=Pool.of(train, self.classes), test=Pool.of(test, self.classes), test_examples=mine)

    def __getitem__(self, client_id: str) -> IntArray:
        train, test = self.halves(client_id)
        return np.sort(np.concatenate([train, test]))

    def halves(self, client_id: str) -> tuple[IntArray, IntArray]:
        number = self._numbers((client_id,))
        train = self._draw(number, self.train, self.examples - self.test_examples, _TRAIN)[0]
        if self.test is None:
            return train, train[:0]
        return train, self._draw(number, self.test, self.test_examples, _TEST)[0]

    def gather(self, clients: Sequence[str]) -> tuple[IntArray, IntArray]:
        each = self.examples - self.test_examples
        rows = self._draw(self._numbers(clients), self.train, each, _TRAIN)
        return rows.reshape(-1), np.full(len(clients), each, dtype=np.int64)

    def sizes(self, clients: Sequence[str]) -> IntArray:
        return np.full(len(self._numbers(clients)), self.examples - self.test_examples, dtype=np.int64)

    def only(self, client_id: str) -> Self:
        self._numbers((client_id,))
        return replace(self, shown=ListedIds((client_id,)))

    def _numbers(self, clients: Sequence[str]) -> IntArray:
        if self.shown is not None:
            for client in clients:
                self.shown.number(client)
        return np.array([self.numbering.number(client) for client in clients], dtype=np.int64)

    def _draw(self, numbers: IntArray, pool: Pool, count: int, half: str) -> IntArray:
        """Row numbers, ascending, shape (clients, count)."""
        uniform = seeds.hashed_uniform(self.seed, numbers, 2 * count, "partition", "bootstrap", half)
        which, label = uniform[:, :count], np.zeros((len(numbers), count), dtype=np.int64)
        if self.alpha is not None:
            ends = np.cumsum(self._shares(numbers, pool), axis=1)
            label = (uniform[:, count:, None] >= (ends / ends[:, -1:])[:, None, :]).sum(axis=2)
        return np.sort(pool.at(label, which), axis=1)

    def _shares(self, numbers: IntArray, pool: Pool) -> npt.NDArray[np.float64]:
        """Each client's label shares, as far as the pool has such labels; shape (clients, classes)."""
        assert self.alpha is not None
        prior = self.train.counts / self.train.counts.sum()
        known = np.flatnonzero(prior)
        shares = np.zeros((len(numbers), len(prior)))
        for mine, number in zip(shares, numbers.tolist(), strict=True):
            g = seeds.numpy_generator(self.seed, "partition", "bootstrap", "labels", number)
            mine[known] = g.dirichlet(self.alpha * prior[known])
        shares *= pool.counts > 0
        lost = ~(shares.sum(axis=1) > 0)  # every share underflowed, or none of its labels is in this pool
        shares[lost] = pool.counts / pool.counts.sum()
        return shares


def bootstrap_rows(
    rows: int,
    classes: npt.NDArray[Any] | None,
    clients: int,
    seed: int,
    *,
    examples_per_client: int,
    alpha: float | None,
) -> BootstrapRows:
    """A population that draws from all rows; see `fedlearn.data.partition.bootstrap`."""
    every = np.arange(rows, dtype=np.int64)
    known = None if classes is None or alpha is None else classes.astype(np.int64)
    return BootstrapRows(NumberedIds(clients), seed, examples_per_client, alpha, known, Pool.of(every, known))
