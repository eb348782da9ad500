"""A partition in two arrays: all rows in the order of their clients, and where each client's begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

from fedlearn.learning.rows import ClientRows, IntArray, ListedIds, SortedIds


class Partition(Sequence[IntArray]):
    """Each client's rows by its number: what the rules of `fedlearn.data.partition` make.

    Args:
        order: row numbers, client after client, ascending within each; int32 where they fit.
        offsets: where each client's rows begin in `order`, and in the end its length; shape (clients + 1,).
    """

    def __init__(self, order: npt.NDArray[np.integer[Any]], offsets: npt.NDArray[np.integer[Any]]) -> None:
        self.order, self.offsets = _small(order), _small(offsets)

    @classmethod
    def of_owners(cls, owner: npt.NDArray[np.integer[Any]], clients: int) -> Partition:
        """From each row's owner."""
        order = np.argsort(owner, kind="stable")
        offsets = np.zeros(clients + 1, dtype=np.int64)
        np.cumsum(np.bincount(owner, minlength=clients), out=offsets[1:])
        return cls(order, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> IntArray: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[IntArray, ...]: ...

    def __getitem__(self, index: int | slice) -> IntArray | tuple[IntArray, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"client {index} of {len(self)}")
        return self.order[self.offsets[number] : self.offsets[number + 1]].astype(np.int64)

    def sizes(self) -> IntArray:
        """How many rows each client has."""
        return np.diff(self.offsets).astype(np.int64)

    def gather(self, numbers: npt.NDArray[np.int64]) -> tuple[IntArray, IntArray]:
        """Rows of several clients in one array, and each one's count; see `ClientRows.gather`."""
        starts = self.offsets[numbers].astype(np.int64)
        sizes = self.offsets[numbers + 1] - starts
        ends = np.cumsum(sizes)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
        return self.order[places].astype(np.int64), sizes


class CompactRows(ClientRows):
    """A partition whose clients have ids.

    Args:
        ids: of its clients, in their order.
        partition: their rows.
    """

    def __init__(self, ids: SortedIds, partition: Partition) -> None:
        self._ids, self.partition = ids, partition

    @property
    def ids(self) -> SortedIds:
        return self._ids

    def __getitem__(self, client_id: str) -> IntArray:
        return self.partition[self._ids.number(client_id)]

    def gather(self, clients: Sequence[str]) -> tuple[IntArray, IntArray]:
        return self.partition.gather(np.array([self._ids.number(client) for client in clients], dtype=np.int64))

    def sizes(self, clients: Sequence[str]) -> IntArray:
        numbers = np.array([self._ids.number(client) for client in clients], dtype=np.int64)
        offsets = self.partition.offsets
        return (offsets[numbers + 1] - offsets[numbers]).astype(np.int64)

    def only(self, client_id: str) -> Self:
        rows = self[client_id]
        return type(self)(ListedIds((client_id,)), Partition(rows, np.array([0, len(rows)])))

    def __repr__(self) -> str:
        return f"CompactRows({len(self)} clients, {len(self.partition.order)} rows)"


def _small(array: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """In int32 where that holds every value, of a kind that only ascends or is below the length."""
    largest = int(array.max()) if len(array) else 0
    return array.astype(np.int32 if largest < 2**31 else np.int64)
