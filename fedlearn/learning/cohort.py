"""Who takes part: the real sampling method, recorded as such."""

from __future__ import annotations

from collections.abc import Sequence

from fedlearn import seeds
from fedlearn.learning.rows import in_order


def pick_cohort(clients: Sequence[str], size: int | None, seed: int, *path: str | int) -> tuple[str, ...]:
    """Everybody, or a fixed number drawn without replacement.

    A fixed-size draw is not Poisson sampling, and no privacy amplification is claimed for it. What it costs depends on the
    cohort, not on the population, where ids are known to be sorted (`SortedIds`).

    Args:
        clients: study client ids.
        size: how many; None for all; more than there are gives all.
        seed: the run's seed.
        path: what is drawn and when.

    Returns:
        Client ids, sorted.
    """
    ordered = in_order(clients)
    if size is None or size >= len(ordered):
        return tuple(ordered)
    chosen = seeds.numpy_generator(seed, "cohort", *path).choice(len(ordered), size=size, replace=False)
    return tuple(ordered.at(i) for i in sorted(chosen.tolist()))
