"""Who there is and which rows are whose, without an object a client: a million clients cost their indices, or nothing.

Client ids are a `SortedIds`: a sequence that is known to ascend, so nobody sorts or lists it again. Rows are a mapping from client id to
row numbers; a `ClientRows` holds them in two arrays, or computes them when they are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class SortedIds(Sequence[str], ABC):
    """Different client ids, ascending. Items are made when asked for; membership does not look at all of them."""

    @abstractmethod
    def number(self, client_id: str) -> int:
        """The place of an id, from 0.

        Raises:
            KeyError: it is not one of them.
        """

    @abstractmethod
    def at(self, number: int) -> str:
        """The id at a place from 0 to `len(self) - 1`."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self.at(number) for number in range(*index.indices(len(self))))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"client {index} of {len(self)}")
        return self.at(number)

    def __iter__(self) -> Iterator[str]:
        return map(self.at, range(len(self)))

    def __contains__(self, client_id: object) -> bool:
        try:
            self.number(client_id)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        if value not in self or not start <= self.number(value) < (len(self) if stop is None else stop):
            raise ValueError(f"{value!r} is not one of these clients")
        return self.number(value)

    def count(self, value: Any) -> int:
        return int(value in self)


class NumberedIds(SortedIds):
    """`client-0000` and up, made from their numbers: no memory a client.

    Args:
        count: how many.
        prefix: before the number.
        digits: at least so many, zeros first; more where the largest number needs them, so that ids sort as numbers do.
    """

    def __init__(self, count: int, prefix: str = "client-", digits: int = 4) -> None:
        self._count, self._prefix = count, prefix
        self._digits = max(digits, len(str(count - 1)))

    def __len__(self) -> int:
        return self._count

    def at(self, number: int) -> str:
        return f"{self._prefix}{number:0{self._digits}d}"

    def number(self, client_id: str) -> int:
        if isinstance(client_id, str) and client_id.startswith(self._prefix):
            digits = client_id[len(self._prefix) :]
            if len(digits) == self._digits and digits.isascii() and digits.isdigit() and int(digits) < self._count:
                return int(digits)
        raise KeyError(client_id)

    def __repr__(self) -> str:
        return f"NumberedIds({self._count})"


class ListedIds(SortedIds):
    """Ids that somebody named.

    Args:
        ids: different ids in any order.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = tuple(sorted(ids))

    def __len__(self) -> int:
        return len(self._ids)

    def at(self, number: int) -> str:
        return self._ids[number]

    def number(self, client_id: str) -> int:
        if isinstance(client_id, str):
            place = bisect_left(self._ids, client_id)
            if place < len(self._ids) and self._ids[place] == client_id:
                return place
        raise KeyError(client_id)

    def __repr__(self) -> str:
        return f"ListedIds({len(self._ids)})"


def in_order(ids: Sequence[str]) -> SortedIds:
    """The ids sorted; those that are known to be so already as they are."""
    return ids if isinstance(ids, SortedIds) else ListedIds(ids)


class ClientRows(Mapping[str, IntArray], ABC):
    """Client id to its row numbers, with nothing kept a client but, at most, its indices."""

    @property
    @abstractmethod
    def ids(self) -> SortedIds:
        """Whose rows these are."""

    @abstractmethod
    def gather(self, clients: Sequence[str]) -> tuple[IntArray, IntArray]:
        """The training rows of several clients in one array; all rows where `holds_out` is False.

        Returns:
            Row numbers, int64, shape (sum of sizes,), client after client; and each client's size, int64, shape (clients,).

        Raises:
            KeyError: somebody is not one of them.
        """

    @abstractmethod
    def sizes(self, clients: Sequence[str]) -> IntArray:
        """How many rows `gather` would give for each client. Raises as it does."""

    @abstractmethod
    def only(self, client_id: str) -> Self:
        """The same rows for one client alone."""

    @property
    def holds_out(self) -> bool:
        """True when test rows are set aside for everybody at once, because clients share rows; see `halves`."""
        return False

    def halves(self, client_id: str) -> tuple[IntArray, IntArray]:
        """One client's training and test rows, where `holds_out` is True."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self.ids


def sizes(rows: Mapping[str, IntArray], clients: Sequence[str]) -> IntArray:
    """`ClientRows.sizes` of any mapping."""
    if isinstance(rows, ClientRows):
        return rows.sizes(clients)
    return np.array([len(rows[client]) for client in clients], dtype=np.int64)


def gather(rows: Mapping[str, IntArray], clients: Sequence[str]) -> tuple[IntArray, IntArray]:
    """`ClientRows.gather` of any mapping."""
    if isinstance(rows, ClientRows):
        return rows.gather(clients)
    parts = [rows[client] for client in clients]
    counts = np.array([len(part) for part in parts], dtype=np.int64)
    return np.concatenate([*parts, np.empty(0, dtype=np.int64)]), counts
