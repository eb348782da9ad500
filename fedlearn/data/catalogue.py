"""What data there is: tasks with their cards, and who holds how much of which label. Values only; the command line prints them."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import numpy as np

from fedlearn.data.partition import make_partition
from fedlearn.learning.rows import ClientRows, IntArray, in_order
from fedlearn.learning.task import Examples, TaskCard
from fedlearn.tasks import load_task, task_class, task_names

EVERYBODY: Final = "everybody"
NOT_SPLIT: Final = "none"
MAX_CLASSES: Final = 100
"""More distinct labels than this are values, not classes."""
MAX_SHARES: Final = 10_000
"""Of more clients than this, so many are looked at, evenly spaced: a picture shows no more, and a million would take minutes."""


class Availability(Enum):
    """Whether a task's data is here."""

    INCLUDED = "included"
    INSTALLED = "installed"
    NOT_INSTALLED = "not installed"
    YOUR_OWN = "your own"


@dataclass(frozen=True)
class Option:
    """One option of a task: its name, the kind of value it takes, and its default; required where the default is None."""

    name: str
    kind: str
    default: str | None


@dataclass(frozen=True)
class TaskEntry:
    """One line of the catalogue, and what `show` says beyond it."""

    name: str
    card: TaskCard
    availability: Availability
    options: tuple[Option, ...]


@dataclass(frozen=True)
class ClientShare:
    """What one client holds.

    Args:
        client_id: its id.
        examples: its rows.
        labels: rows of each class, in the order of `DataSummary.labels`; empty where labels are no classes.
    """

    client_id: str
    examples: int
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataSummary:
    """A task's data, and how it is spread over clients.

    Args:
        entry: the task.
        examples: rows altogether.
        feature_shape: of one raw example.
        missing: share of raw feature values that are missing, 0 to 1.
        labels: names of the classes; empty where labels are no classes.
        partition: as in a study; "natural" for the clients that the data names, `NOT_SPLIT` for none.
        clients: one entry each, in the order of their ids; of more than `MAX_SHARES` clients, that many.
        population: how many clients there are.
    """

    entry: TaskEntry
    examples: int
    feature_shape: tuple[int, ...]
    missing: float
    labels: tuple[str, ...]
    partition: str
    clients: tuple[ClientShare, ...]
    population: int


def list_data() -> tuple[TaskEntry, ...]:
    """All tasks that come with fedlearn; reads no data."""
    return tuple(entry_of(name) for name in task_names())


def entry_of(name: str) -> TaskEntry:
    """One task's entry; reads no data.

    Raises:
        StudyError: no such task.
    """
    cls = task_class(name)
    hints = get_type_hints(cls.__init__)
    options = tuple(
        Option(p.name, _kind(hints.get(p.name)), None if p.default is p.empty else _shown(p.default))
        for p in inspect.signature(cls).parameters.values()
    )
    return TaskEntry(name, cls.card, _availability(cls.card), options)


def summarise(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    partition: str | None = None,
    clients: int | None = None,
    partition_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    source: Path | None = None,
) -> DataSummary:
    """Read a task's data and count.

    Args:
        name: the task.
        options: its options.
        partition: as in a study; None takes the natural clients, or one client that holds everything where there are none.
        clients: for a made partition.
        partition_options: of the partition.
        seed: of the partition.
        source: a file of one's own.

    Raises:
        StudyError: unknown task, option or partition.
        DataError: the data is not here, or does not fit.
    """
    task = load_task(name, options)
    examples = task.load(source).whole()
    if partition is None and examples.client is None:
        partition = NOT_SPLIT
        rows: Mapping[str, IntArray] = {EVERYBODY: np.arange(len(examples), dtype=np.int64)}
    else:
        partition = partition or "natural"
        rows = make_partition(examples, partition, clients, seed, partition_options)
    names, shares = _shares(examples, _looked_at(rows), task.label_names)
    x = examples.x
    missing = float(np.isnan(x).mean()) if x.dtype.kind == "f" and x.size else 0.0
    return DataSummary(entry_of(name), len(examples), tuple(x.shape[1:]), missing, names, partition, shares, len(rows))


def _looked_at(rows: Mapping[str, IntArray]) -> dict[str, IntArray]:
    ids = rows.ids if isinstance(rows, ClientRows) else in_order(tuple(rows))
    step = max(1, -(-len(ids) // MAX_SHARES))
    return {client: rows[client] for client in (ids[number] for number in range(0, len(ids), step))}


def _shares(
    examples: Examples, rows: Mapping[str, IntArray], known_names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[ClientShare, ...]]:
    y = examples.y
    values = np.unique(y) if y.ndim == 1 and y.dtype.kind in "iub" else np.empty(0)
    if not 0 < len(values) <= MAX_CLASSES:
        return (), tuple(ClientShare(client, len(mine)) for client, mine in rows.items())
    count = max(len(known_names), int(values[-1]) + 1)
    names = known_names if len(known_names) == count else tuple(str(value) for value in range(count))
    return names, tuple(
        ClientShare(client, len(mine), tuple(np.bincount(y[mine], minlength=count).tolist()))
        for client, mine in rows.items()
    )


def _availability(card: TaskCard) -> Availability:
    if card.own_data:
        return Availability.YOUR_OWN
    if not card.package:
        return Availability.INCLUDED
    try:
        importlib.metadata.distribution(card.package)
    except importlib.metadata.PackageNotFoundError:
        return Availability.NOT_INSTALLED
    return Availability.INSTALLED


_KINDS: Final = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _kind(hint: Any) -> str:
    """What a value of this type is called in a study."""
    if hint in _KINDS:
        return _KINDS[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(str(value) for value in inner)
    if origin is tuple:
        return "a list" if len(inner) == 2 and inner[1] is ... else f"a list of {len(inner)}"
    return "a table" if origin is Mapping else "a value"


def _shown(default: Any) -> str:
    # dataclasses mark a default that is made anew each time with a private object
    return "{}" if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS" else repr(default)
