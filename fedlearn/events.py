"""Events are the one record of a run: whatever is shown, logged, stored or reported was an event first.

Each event is a frozen value. `to_json` and `from_json` are inverses, but for values that are not finite: JSON has none, so all of
them come back as NaN. The line format is one JSON object with the event's name, a wall
clock time for people, and its fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Final

from fedlearn.errors import StateError


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    KINDS: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Event.KINDS[cls.__name__] = cls


MOST_NAMED: Final = 10_000
"""Clients that a `RunStarted` names; of a larger population only these. A coordinator's link serves no more at a time."""


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins, or resumes after `rounds_done` rounds.

    `clients` are those that are here at the start, `MOST_NAMED` at the most; `population` is how many there are.
    """

    run: str
    study: str
    rounds: int
    rounds_done: int
    clients: tuple[str, ...]
    parameters: int
    metric: str
    population: int = 0

    def __post_init__(self) -> None:
        # A record that is older than the field has none.
        object.__setattr__(self, "population", max(self.population, len(self.clients)))


@dataclass(frozen=True)
class PrivacyStated(Event):
    """What the run promises, just before it begins, and what it has cost, before it ends; only where the study asks for privacy.

    `statement` is of `fedlearn.privacy.statement.statement`: plain JSON types, its epsilon with all that it means.
    """

    run: str
    statement: Mapping[str, Any]


@dataclass(frozen=True)
class RoundStarted(Event):
    """A cohort was picked and the model is on its way."""

    run: str
    round: int
    attempt: int
    cohort_size: int


@dataclass(frozen=True)
class ClientFinished(Event):
    """A client's update entered the sum."""

    run: str
    round: int
    client: str
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientDropped(Event):
    """A client's update did not enter the sum: it vanished, refused, crashed, or what it sent was rejected.

    `virtual` is True where it vanished, or came too late, in a simulated environment only; `refused` where it said that it will answer
    nothing more of the run, in which it is asked nothing more then.
    """

    run: str
    round: int
    client: str
    reason: str
    virtual: bool = False
    refused: bool = False


@dataclass(frozen=True)
class ClientRefused(Event):
    """A client that is connected does not take part: from the start, or from here on. `final` where it says so for the whole run."""

    run: str
    client: str
    reason: str
    final: bool = False


@dataclass(frozen=True)
class RunWaiting(Event):
    """Too few clients take part to go on: `here` do, `needed` must; `left_s` seconds are left for the others to come."""

    run: str
    here: int
    needed: int
    left_s: float


@dataclass(frozen=True)
class RoundVoid(Event):
    """An attempt ended without a sum."""

    run: str
    round: int
    attempt: int
    reason: str


@dataclass(frozen=True)
class RoundFinished(Event):
    """The server rule made a new model and it was committed. `environment` is what the round cost in a simulated world."""

    run: str
    round: int
    attempt: int
    clients: int
    dropped: int
    seconds: float
    train_loss: float
    update_norm: float
    environment: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated(Event):
    """Clients scored the model of a round on their own test rows.

    `mean` weights clients by test examples and leaves out those where a metric is undefined.
    """

    run: str
    round: int
    mean: Mapping[str, float]
    clients: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class SumOpened(Event):
    """Masked updates became one sum. What the coordinator saw of one client beside what it read of all: samples, of all that it holds.

    `masked` are the first elements of the client's vector, integers from 0 up to 2 ** `ring_bits`; `mean` the first numbers of the mean update.
    """

    run: str
    round: int
    client: str
    ring_bits: int
    masked: tuple[int, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True)
class RunFinished(Event):
    """The last round is committed."""

    run: str
    rounds: int
    seconds: float
    model_digest: str


@dataclass(frozen=True)
class RunStopped(Event):
    """Somebody stopped the run; what was committed is kept."""

    run: str
    rounds_done: int


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended before its last round, for a reason. `hint` says what can be done about it."""

    run: str
    reason: str
    hint: str = ""


Emit = Callable[[Event], None]


def to_dict(event: Event, wall_s: float) -> dict[str, Any]:
    """The event as plain JSON types; NaN and infinities become null."""
    return {"event": type(event).__name__, "at": round(wall_s, 3), **_plain(asdict(event))}


def to_json(event: Event, wall_s: float) -> str:
    """The event as one line of JSON."""
    return json.dumps(to_dict(event, wall_s), separators=(",", ":"))


def from_json(line: str) -> tuple[Event, float]:
    """An event and its wall clock time back from `to_json`."""
    try:
        tree = json.loads(line)
        kind = Event.KINDS[tree.pop("event")]
        wall_s = float(tree.pop("at"))
        known = {f.name for f in fields(kind)}
        return kind(**{k: _restore(v) for k, v in tree.items() if k in known}), wall_s
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StateError(f"event: cannot be read back: {error!r}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_restore(v) for v in value)
    return math.nan if value is None else value
