"""Many updates at once, for strategies that are not sums: median, trimmed mean, Krum.

Updates are appended as they arrive to one file on disk, a row each, and read back by blocks of coordinates, so memory depends on the
block and not on model times clients. Rows are ordered by client id before use, so the order of arrival changes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedlearn.arrays import Arrays, Spec, check_finite, check_same
from fedlearn.errors import LimitExceededError, UpdateError

BLOCK_BYTES: Final = 32 * 1024**2
SPILL_LIMIT_BYTES: Final = 64 * 1024**3


class UpdateStack:
    """A matrix of n updates by d coordinates, float64, on disk.

    Args:
        specs: names, shapes and dtypes of one update.
        limit_bytes: most bytes on disk; one more update than fits is refused.
        block_bytes: most bytes of the matrix in memory at a time.
    """

    def __init__(
        self, specs: Mapping[str, Spec], *, limit_bytes: int = SPILL_LIMIT_BYTES, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.specs = dict(specs)
        self.columns = sum(int(np.prod(s.shape)) for s in self.specs.values())
        self._limit_bytes = limit_bytes
        self._block_bytes = block_bytes
        self._clients: list[str] = []
        self._examples: list[int] = []
        self._folder = tempfile.TemporaryDirectory(prefix="fedlearn-stack-")
        self._path = Path(self._folder.name) / "updates.f64"
        self._path.touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the file."""
        self._folder.cleanup()

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def clients(self) -> tuple[str, ...]:
        """Client ids in row order: sorted."""
        return tuple(sorted(self._clients))

    @property
    def examples(self) -> int:
        """Total training examples behind the rows."""
        return sum(self._examples)

    def add(self, client: str, term: Arrays, examples: int) -> None:
        """Append one update.

        Raises:
            UpdateError: another shape, a value that is not finite, or a second update of the same client.
            LimitExceededError: the disk limit is reached.
        """
        if client in self._clients:
            raise UpdateError(f"update: client {client!r} sent a second one in this round")
        check_same(term, self.specs)
        check_finite(term)
        if (len(self) + 1) * self.columns * 8 > self._limit_bytes:
            raise LimitExceededError(
                f"updates: {len(self) + 1} of {self.columns} values exceed {self._limit_bytes} bytes on disk"
            )
        with self._path.open("ab") as file:
            for name in self.specs:
                file.write(np.ascontiguousarray(term[name], dtype=np.float64).reshape(-1).data)
        self._clients.append(client)
        self._examples.append(examples)

    def blocks(self) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Column ranges and their values, shape (n, width); rows in the order of `clients`. Each block is a fresh copy."""
        if not len(self):
            raise UpdateError("updates: none arrived; expected at least one")
        order = np.argsort(np.array(self._clients), kind="stable")
        matrix: np.memmap[Any, np.dtype[np.float64]] = np.memmap(
            self._path, dtype=np.float64, mode="r", shape=(len(self), self.columns)
        )
        width = max(1, self._block_bytes // (8 * len(self)))
        for start in range(0, self.columns, width):
            columns = slice(start, min(start + width, self.columns))
            yield columns, np.array(matrix[:, columns])[order]

    def row(self, index: int) -> npt.NDArray[np.float64]:
        """One whole update, shape (d,), by its place in `clients`."""
        position = self._clients.index(self.clients[index])
        return np.fromfile(self._path, dtype=np.float64, count=self.columns, offset=position * self.columns * 8)

    def unflatten(self, flat: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """A vector of d coordinates back to named arrays."""
        arrays, start = {}, 0
        for name, spec in self.specs.items():
            size = int(np.prod(spec.shape))
            arrays[name] = flat[start : start + size].reshape(spec.shape)
            start += size
        return arrays
