"""What a client hands over, and what becomes of many: the types say what is private."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fedlearn.arrays import Arrays


class Weighting(Enum):
    """How a release is weighted in the mean over clients."""

    EXAMPLES = "examples"
    """By the client's number of training examples (McMahan et al. 2017, algorithm 1)."""
    UNIFORM = "uniform"
    """Each client counts once. The only weighting that a client-level privacy plan allows without a cap."""


@dataclass(frozen=True)
class Release:
    """One thing that a strategy lets leave a client: its name, and how it is weighted."""

    name: str
    weighting: Weighting = Weighting.EXAMPLES


DELTA = "delta"
"""The release that every strategy has: local weights minus global weights."""
UNCLIPPED = "unclipped"
"""The release beside a strategy's own under an adaptive clip: how many updates were within it."""


@dataclass(frozen=True)
class Update:
    """One client's contribution to one round.

    Args:
        private: release name to named arrays. Raw at first; each postprocessor returns another `Update`.
        examples: training examples behind it. A fact about people: under a privacy plan it stays or is charged.
        facts: losses and counts that may leave as they are. Empty under a privacy plan, unless charged.
    """

    private: Mapping[str, Arrays] = field(repr=False)
    examples: int
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """What the server rule sees of a round: means, never single updates.

    Args:
        means: release name to named arrays, float64; the weighted mean over the clients that took part (for robust
            strategies: the robust centre).
        clients: how many took part.
        population: how many clients the study has.
        examples: total training examples behind it.
    """

    means: Mapping[str, Arrays] = field(repr=False)
    clients: int
    population: int
    examples: int
