"""Many updates at once, for strategies that are not sums: median, trimmed mean, Krum.

Updates are written as they arrive to one file on disk, a row each, and read back by blocks of coordinates, so memory depends on the
block and not on model times clients. Rows are ordered by client id and columns by array name before use, so neither the order of
arrival nor a model that came back from a checkpoint in another order changes a bit.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedlearn.arrays import Arrays, Spec, check_finite, check_same
from fedlearn.errors import LimitExceededError, StateError, UpdateError

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
        self.specs = {name: specs[name] for name in sorted(specs)}
        self.columns = sum(math.prod(s.shape) for s in self.specs.values())
        self._limit_bytes = limit_bytes
        self._block_bytes = block_bytes
        self._rows: dict[str, int] = {}
        self._examples = 0
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
        return len(self._rows)

    @property
    def clients(self) -> tuple[str, ...]:
        """Client ids in row order: sorted."""
        return tuple(sorted(self._rows))

    @property
    def examples(self) -> int:
        """Total training examples behind the rows."""
        return self._examples

    def add(self, client: str, term: Arrays, examples: int) -> None:
        """Take one update. Either the whole of it is taken, or an error is raised and nothing has changed.

        Raises:
            UpdateError: another shape, a value that is not finite, or a second update of the same client.
            LimitExceededError: the disk limit is reached.
            StateError: the disk refuses to take it.
        """
        if client in self._rows:
            raise UpdateError(f"update: client {client!r} sent a second one in this round")
        check_same(term, self.specs)
        check_finite(term)
        if (len(self) + 1) * self.columns * 8 > self._limit_bytes:
            raise LimitExceededError(
                f"updates: {len(self) + 1} of {self.columns} values exceed {self._limit_bytes} bytes on disk"
            )
        try:
            with self._path.open("r+b") as file:
                # Not appended: what a full disk left of an earlier attempt is overwritten.
                file.seek(len(self) * self.columns * 8)
                for name in self.specs:
                    file.write(np.ascontiguousarray(term[name], dtype=np.float64).reshape(-1).data)
        except OSError as error:
            raise StateError(
                f"updates: cannot write row {len(self)} to {self._path}: {error.strerror}",
                hint="free disk space, or set TMPDIR to a larger disk",
            ) from error
        self._rows[client] = len(self._rows)
        self._examples += examples

    def blocks(self) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Column ranges and their values, shape (n, width); rows in the order of `clients`. Each block is a fresh copy.

        Raises:
            UpdateError: no update was added.
        """
        if not len(self):
            raise UpdateError("updates: none arrived; expected at least one")
        if not self.columns:
            return
        order = [self._rows[client] for client in self.clients]
        matrix: np.memmap[Any, np.dtype[np.float64]] = np.memmap(
            self._path, dtype=np.float64, mode="r", shape=(len(self), self.columns)
        )
        width = max(1, self._block_bytes // (8 * len(self)))
        for start in range(0, self.columns, width):
            columns = slice(start, min(start + width, self.columns))
            yield columns, np.asarray(matrix[:, columns][order])

    def row(self, index: int) -> npt.NDArray[np.float64]:
        """One whole update, shape (d,), by its place in `clients`."""
        position = self._rows[self.clients[index]]
        return np.fromfile(self._path, dtype=np.float64, count=self.columns, offset=position * self.columns * 8)

    def unflatten(self, flat: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """A vector of d coordinates back to named arrays, by name."""
        arrays, start = {}, 0
        for name, spec in self.specs.items():
            size = math.prod(spec.shape)
            arrays[name] = flat[start : start + size].reshape(spec.shape)
            start += size
        return arrays
