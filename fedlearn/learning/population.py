"""Clients' data: raw examples, whose each row is, and each client's prepared share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, Self, TypeVar

import numpy as np

from fedlearn import seeds
from fedlearn.errors import DataError
from fedlearn.learning.cache import ByteCache
from fedlearn.learning.folds import unit_fold
from fedlearn.learning.rows import ClientRows, IntArray, gather, in_order, sizes
from fedlearn.learning.task import Batch, ClientData, Examples, Task, prepares_apart

R = TypeVar("R")

CACHE_BYTES: Final = 256 * 1024 * 1024
"""The most that prepared clients may take in memory; see `Population`."""
_ENTRY_BYTES: Final = 1_000
"""What a cached client costs beside its arrays."""


def _size_bytes(data: ClientData) -> int:
    arrays = (array for part in (data.train, data.test) for array in (part.x, part.y, part.groups))
    return _ENTRY_BYTES + sum(array.nbytes for array in arrays if array is not None)


@dataclass(frozen=True)
class Population:
    """All clients of a study: raw examples, and each client's rows. Nothing per client but its indices.

    May be used by several threads.

    Args:
        task: the task that reads and prepares.
        examples: raw examples of everybody (in a simulation) or of one site.
        rows: client id to its row numbers in `examples`.
        seed: the seed of the split into training and test rows.
        folds: see `Task.split`.
        fold: see `Task.split`.
        by_unit: rows, or groups, are split by `unit_fold`: there is a privacy plan for them.
    """

    task: Task
    examples: Examples
    rows: Mapping[str, IntArray]
    seed: int
    folds: int = 5
    fold: int = 0
    by_unit: bool = False
    _cache: ByteCache[ClientData] = field(
        default_factory=lambda: ByteCache(CACHE_BYTES, _size_bytes), init=False, repr=False, compare=False
    )

    @cached_property
    def client_ids(self) -> Sequence[str]:
        """Client ids, sorted."""
        return self.rows.ids if isinstance(self.rows, ClientRows) else in_order(tuple(self.rows))

    def client(self, client_id: str) -> ClientData:
        """One client's prepared data. Those used last are kept, `CACHE_BYTES` of them."""
        found = self._cache.get(client_id)
        return found if found is not None else self._cache.put(client_id, self._prepare(client_id))

    def block(self, clients: Sequence[str]) -> list[Batch]:
        """The training examples of several clients, as `client(...).train` gives them, made together where the task allows it."""
        if not self._in_one or not clients:
            return [self.client(client).train for client in clients]
        rows, counts = self._known(gather, clients)
        train = self._prepared(rows, rows[:0]).train
        ends = np.cumsum(counts).tolist()
        starts = [0, *ends[:-1]]
        return [train.between(start, end) for start, end in zip(starts, ends, strict=True)]

    def train_sizes(self, clients: Sequence[str]) -> IntArray:
        """How many training examples each client has; they are prepared, and kept, only where clients split their own rows."""
        if not self._in_one:
            return np.array([len(self.client(client).train) for client in clients], dtype=np.int64)
        return self._known(sizes, clients)

    def only(self, client_id: str) -> Self:
        """One client's population; its data is what it is in this one."""
        self._check(client_id)
        rows = self.rows
        return replace(
            self, rows=rows.only(client_id) if isinstance(rows, ClientRows) else {client_id: rows[client_id]}
        )

    @cached_property
    def _in_one(self) -> bool:
        """Whether clients can be prepared in one call: no split of their own, and rows that are treated one by one."""
        held_out = isinstance(self.rows, ClientRows) and self.rows.holds_out
        # A subclass that gives clients other data gives blocks of them that data too.
        own_data = type(self).client is not Population.client
        whole = self.folds == 1 and (self.by_unit or type(self.task).split is Task.split)
        return prepares_apart(self.task) and not own_data and (held_out or whole)

    def _prepare(self, client_id: str) -> ClientData:
        self._check(client_id)
        if isinstance(self.rows, ClientRows) and self.rows.holds_out:
            return self._prepared(*self.rows.halves(client_id))
        mine = self.rows[client_id]
        train, test = self.split(self.examples.take(mine), client_id)
        return self._prepared(mine[train], mine[test])

    def split(self, examples: Examples, whose: str) -> tuple[IntArray, IntArray]:
        """Training and test rows of one client, or of a pool that clients draw from.

        Args:
            examples: its rows.
            whose: each client's split has a seed of its own. Not that of units: one who is at two sites is in the same half at both.
        """
        if self.by_unit:
            return unit_fold(examples, seeds.derive(self.seed, "split", "units"), self.folds, self.fold)
        return self.task.split(examples, seeds.derive(self.seed, "split", whose), self.folds, self.fold)

    def _prepared(self, train: IntArray, test: IntArray) -> ClientData:
        parts = [self.examples.take(rows) for rows in (train, test)]
        data = self.task.prepare(*parts)
        if self.examples.groups is None:
            return data
        return ClientData(*(_owned(batch, part) for batch, part in zip((data.train, data.test), parts, strict=True)))

    def _known(self, ask: Callable[[Mapping[str, IntArray], Sequence[str]], R], clients: Sequence[str]) -> R:
        try:
            return ask(self.rows, clients)
        except KeyError as error:
            raise self._unknown(error.args[0]) from None

    def _check(self, client: str) -> None:
        if client not in self.rows:
            raise self._unknown(client)

    def _unknown(self, client: str) -> DataError:
        return DataError(f"client {client!r} is not in this population of {len(self.rows)} clients")


def _owned(batch: Batch, examples: Examples) -> Batch:
    """Prepared rows, with whose they are."""
    if len(batch) != len(examples):
        raise DataError(
            f"prepare: got {len(examples)} rows and gave {len(batch)}, so it is not known whose each one is"
        )
    return replace(batch, groups=examples.groups)
