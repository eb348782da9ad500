"""The federated algorithms, one file each: both sides of it. A study names one; `create` makes it.

A new strategy is a file here, a line in `_ALL`, an instance in tests/contract, an oracle, and a row in docs/strategies.md; tests hold the
last three to the first two.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

from fedlearn.errors import StudyError
from fedlearn.learning.strategy import Strategy
from strategies.ditto import Ditto
from strategies.fedadagrad import FedAdagrad
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedprox import FedProx
from strategies.fedyogi import FedYogi
from strategies.krum import Krum, MultiKrum
from strategies.median import Median
from strategies.options import Configured, option_of
from strategies.scaffold import Scaffold
from strategies.trimmed_mean import TrimmedMean

__all__ = ["REGISTRY", "Description", "OptionDescription", "create", "describe", "names"]

_ALL: Final[tuple[type[Configured], ...]] = (
    FedAvg,
    FedProx,
    FedAvgM,
    FedAdam,
    FedYogi,
    FedAdagrad,
    Scaffold,
    Ditto,
    Median,
    TrimmedMean,
    Krum,
    MultiKrum,
)

REGISTRY: Final[Mapping[str, type[Configured]]] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Strategy classes by the name that a study gives."""


@dataclass(frozen=True)
class OptionDescription:
    """One option: its name, default, valid values in words, and what it does."""

    name: str
    default: float | int | None
    expected: str
    text: str


@dataclass(frozen=True)
class Description:
    """What a person wants to know of a strategy before naming it in a study."""

    name: str
    summary: str
    paper: str
    options: tuple[OptionDescription, ...]
    linear: bool
    releases: tuple[str, ...]
    stateful: bool


def names() -> tuple[str, ...]:
    """The names that a study may give, from the plainest on."""
    return tuple(REGISTRY)


def create(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The named strategy with its options; what is not given has its default.

    Raises:
        StudyError: no strategy or option has that name (the nearest valid one is named), or a value is not valid.
    """
    if name not in REGISTRY:
        raise StudyError(f"strategy: got {name!r}, expected one of {', '.join(names())}", hint=_nearest(name, names()))
    kind = REGISTRY[name]
    known = tuple(one.name for one in fields(kind))
    for option in options or {}:
        if option not in known:
            expected = f"one of {', '.join(known)}" if known else "none: it has no options"
            raise StudyError(
                f"strategy {name!r}: got option {option!r}, expected {expected}", hint=_nearest(option, known)
            )
    return kind(**(options or {}))


def describe(name: str) -> Description:
    """What is known of one strategy, for listings.

    Raises:
        StudyError: no strategy has that name.
    """
    if name not in REGISTRY:
        create(name)
    kind = REGISTRY[name]
    return Description(
        name=name,
        summary=(kind.__doc__ or "").partition("\n")[0],
        paper=kind.paper,
        options=tuple(
            OptionDescription(one.name, getattr(kind, one.name), option_of(one).expected, option_of(one).text)
            for one in fields(kind)
        ),
        linear=kind.linear,
        releases=tuple(release.name for release in kind.releases),
        stateful=kind.stateful,
    )


def _nearest(got: str, valid: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(got.lower().replace("-", "_"), valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""
