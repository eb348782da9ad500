"""Poisson batches of many clients in stacked form, and what training on them gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedlearn.simulation.blocks import IntArray, Stacked

if TYPE_CHECKING:
    from fedlearn.privacy.steps import NoisySteps, Tally


@dataclass(frozen=True)
class Drawn:
    """One step's batches.

    Args:
        rows: row numbers in the block's rows, shape (clients, largest batch or 1); a smaller batch is filled up with the client's first row.
        inside: which of them were drawn, same shape.
        sizes: how many were drawn, shape (clients,); 0 is a batch like any other.
    """

    rows: IntArray
    inside: npt.NDArray[np.bool_]
    sizes: IntArray

    @classmethod
    def of(cls, sites: Sequence[NoisySteps], first: IntArray) -> Drawn:
        """Draw each site's next batch; `first` is where its rows begin in the block's, shape (clients,)."""
        batches = [site.draw() for site in sites]
        sizes = np.array([len(batch) for batch in batches], dtype=np.int64)
        inside = np.arange(max(1, int(sizes.max()))) < sizes[:, None]
        rows = np.zeros(inside.shape, dtype=np.int64)
        rows[inside] = np.concatenate(batches)
        return cls(rows + first[:, None], inside, sizes)

    def parts(self, width: int) -> Iterator[Drawn]:
        """The same batches, `width` rows of each at a time."""
        for start in range(0, self.rows.shape[1], width):
            rows, inside = self.rows[:, start : start + width], self.inside[:, start : start + width]
            yield Drawn(rows, inside, inside.sum(1))


@dataclass(frozen=True)
class PrivateStacked(Stacked):
    """As `Stacked`; its losses are of the examples that contributed. They and the tallies are facts about people, which never leave.

    Args:
        tallies: what happened at each client.
    """

    tallies: tuple[Tally, ...]
