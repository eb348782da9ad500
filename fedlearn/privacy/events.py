"""What a mechanism did to the data, as a tree: the only thing that an accountant is told.

The kinds and their fields are dp-accounting's (Google, `dp_event.py`), so that each has one meaning, and two that it lacks, for integer noise
under secure aggregation; here they are values that can be compared, counted and kept as canonical JSON in a ledger. An event that is not one of these is refused, never guessed.

`noise_multiplier` is always standard deviation / L2 sensitivity, and the sensitivity is that of the relation the event is accounted under:
for a sum of vectors clipped to C it is C when one unit is added or removed, and 2 C when one is replaced.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Final

from fedlearn.errors import StateError, StudyError

MAX_COUNT: Final = 10**12
"""The most repetitions of one event."""
MAX_DEPTH: Final = 16
"""How deeply events may be nested."""
MAX_PARTS: Final = 10_000
"""The most events of one composition."""


class Relation(Enum):
    """Which two data sets are neighbours."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    """One has a unit more than the other; sizes are private."""
    REPLACE_ONE = "replace-one"
    """One unit is another; sizes are public."""


@dataclass(frozen=True)
class Gaussian:
    """One release of a sum plus Gaussian noise. `noise_multiplier` is above 0 and finite."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        _positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True)
class ZeroConcentrated:
    """A mechanism of which only zCDP is known: (xi, rho), Bun and Steinke 2016, definition 8.1."""

    rho: float
    xi: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("rho", self.rho), ("xi", self.xi)):
            if not (math.isfinite(value) and value >= 0):
                raise StudyError(f"event: {name}: got {value}, expected a finite number from 0")


@dataclass(frozen=True)
class PoissonSampled:
    """`event` on a batch in which every unit is with `rate`, by a coin of its own that nobody sees. 0 < rate <= 1."""

    rate: float
    event: Gaussian

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise StudyError(f"event: sampling rate: got {self.rate}, expected above 0 and at most 1")


@dataclass(frozen=True)
class SampledWithoutReplacement:
    """`event` on `size` units drawn uniformly out of `population`, the same number each time."""

    size: int
    population: int
    event: Gaussian

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.population:
            raise StudyError(f"event: sample size: got {self.size}, expected 1 to the population of {self.population}")


@dataclass(frozen=True)
class Repeated:
    """`event`, `count` times, each after seeing the ones before."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= MAX_COUNT:
            raise StudyError(f"event: count: got {self.count}, expected 0 to {MAX_COUNT}")


@dataclass(frozen=True)
class Composed:
    """All `events`, each after seeing the ones before. None at all costs nothing."""

    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if len(self.events) > MAX_PARTS:
            raise StudyError(f"event: got {len(self.events)} parts, limit MAX_PARTS is {MAX_PARTS}")


@dataclass(frozen=True)
class Skellam:
    """One release of an integer vector plus independent Skellam noise, of which honest clients add so much together.

    Args:
        variance: of each number.
        l2: sensitivity of the vector, in the same integer units.
        l1: sensitivity.
    """

    variance: float
    l2: float
    l1: float

    def __post_init__(self) -> None:
        for one in fields(self):
            _positive(one.name, getattr(self, one.name))


@dataclass(frozen=True)
class DiscreteGaussians:
    """One release of an integer vector plus the sum of independent discrete Gaussian noise of so many honest clients.

    Args:
        variance: parameter of each client's noise; at least 1/4.
        shares: honest clients that add noise.
        dimension: numbers in the vector.
        l2: sensitivity of the vector, in the same integer units.
        l1: sensitivity.
    """

    variance: float
    shares: int
    dimension: int
    l2: float
    l1: float

    def __post_init__(self) -> None:
        for name in ("variance", "l2", "l1"):
            _positive(name, getattr(self, name))
        if self.variance < 0.25 or not 1 <= self.shares <= MAX_COUNT or not 1 <= self.dimension <= MAX_COUNT:
            raise StudyError(
                f"event: got {self.shares} shares of variance {self.variance:g} on {self.dimension} numbers,"
                " expected at least one share of at least 1/4, and a number"
            )


Leaf = Gaussian | ZeroConcentrated | PoissonSampled | SampledWithoutReplacement | Skellam | DiscreteGaussians
Event = Leaf | Repeated | Composed
_KINDS: Final[Mapping[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        *(Gaussian, ZeroConcentrated, PoissonSampled, SampledWithoutReplacement, Skellam, DiscreteGaussians),
        *(Repeated, Composed),
    )
}


def leaves(event: Event) -> Counter[Leaf]:
    """Every elementary release of the tree, and how often it happened."""
    found: Counter[Leaf] = Counter()
    _collect(event, 1, found)
    return +found


def _collect(event: Event, count: int, found: Counter[Leaf]) -> None:
    match event:
        case Repeated(inner, times):
            _collect(inner, count * times, found)
        case Composed(events):
            for one in events:
                _collect(one, count, found)
        case _:
            found[event] += count


def to_tree(event: Event) -> dict[str, Any]:
    """The event as JSON's objects."""
    tree: dict[str, Any] = {"event": type(event).__name__}
    for one in fields(event):
        value = getattr(event, one.name)
        name = "of" if one.name == "event" else one.name
        if isinstance(value, tuple):
            tree[name] = [to_tree(part) for part in value]
        else:
            tree[name] = to_tree(value) if type(value).__name__ in _KINDS else value
    return tree


def from_tree(tree: Any, depth: int = 0) -> Event:
    """The event that `to_tree` wrote.

    Raises:
        StateError: it is no event, or one that could not have been written.
    """
    if depth > MAX_DEPTH:
        raise StateError(f"event: nested more than MAX_DEPTH = {MAX_DEPTH} deep")
    if not isinstance(tree, dict) or tree.get("event") not in _KINDS:
        raise StateError(f"event: got {str(tree)[:200]!r}, expected one of {', '.join(_KINDS)}")
    kind = _KINDS[tree["event"]]
    values = {("event" if name == "of" else name): value for name, value in tree.items() if name != "event"}
    declared = {one.name: one.type for one in fields(kind)}
    if set(values) != set(declared):
        raise StateError(f"event {kind.__name__}: got {sorted(values)}, expected {sorted(declared)}")
    try:
        return _made(kind, {name: _read(declared[name], value, depth) for name, value in values.items()})
    except (StudyError, TypeError) as error:
        raise StateError(f"event {kind.__name__}: {error}") from None


def _made(kind: type[Any], values: dict[str, Any]) -> Event:
    event: Event = kind(**values)
    return event


def _read(declared: Any, value: Any, depth: int) -> Any:
    """One field's value, of the kind that the field is declared with."""
    if declared == "float" and isinstance(value, float | int) and not isinstance(value, bool):
        return float(value)
    if declared == "int" and type(value) is int:
        return value
    if declared in {"Event", "Gaussian"}:
        event = from_tree(value, depth + 1)
        if declared == "Event" or isinstance(event, Gaussian):
            return event
    if declared == "tuple[Event, ...]" and isinstance(value, list):
        return tuple(from_tree(one, depth + 1) for one in value)
    raise StateError(f"event: got {str(value)[:200]!r}, expected {declared}")


@dataclass(frozen=True)
class Cost:
    """What one release costs: an event, and the relation that it is accounted under."""

    event: Event
    relation: Relation = Relation.ADD_OR_REMOVE_ONE

    def to_text(self) -> str:
        """Canonical JSON: equal costs give equal text."""
        tree = {"relation": self.relation.value, **to_tree(self.event)}
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_text(cls, text: str) -> Cost:
        """The cost that `to_text` wrote.

        Raises:
            StateError: it is no cost.
        """
        try:
            tree = json.loads(text)
            relation = Relation(tree.pop("relation"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise StateError(f"cost: got {text[:200]!r}, expected an event with its relation") from None
        return cls(from_tree(tree), relation)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise StudyError(
            f"event: {name}: got {value}, expected a finite number above 0",
            hint="without noise nothing is private: leave the privacy plan out" if value == 0 else "",
        )
