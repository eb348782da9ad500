"""A task: data, model, loss per example and metrics, in one readable file each.

A `Task` is stateless. `load` reads raw examples from a file or a package; a partitioner says which rows are whose; `split` and
`prepare` turn one client's rows into tensors-to-be. Whatever is learnt from data (an imputation value, say) is learnt in
`prepare` from that client's own training rows, so a simulation and a hospital that holds only its own file compute the
same numbers.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.errors import DataError, UnsupportedError
from fedlearn.learning.folds import stratified_fold
from fedlearn.learning.rows import IntArray

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fedlearn.privacy.scoring import Scoring


@dataclass(frozen=True)
class LeftOut:
    """Rows that do not fit a task's schema.

    Args:
        rows: how many.
        error: what is wrong with the first. It quotes the data.
    """

    rows: int
    error: DataError = field(repr=False)


@dataclass(frozen=True)
class Examples:
    """Raw examples as they were read.

    Args:
        x: features, shape (n, ...); may hold NaN where a value is missing.
        y: labels, shape (n, ...).
        client: the natural client of each row (hospital, bank, user), shape (n,), or None where the data names none.
        groups: whose each row is (a patient, an account), text, shape (n,), empty where a row does not say; None where nobody asked, or the
            data does not say.
        left_out: rows of the source that do not fit the schema and are not here; None where all fit.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    client: npt.NDArray[np.str_] | None = None
    groups: npt.NDArray[np.str_] | None = field(default=None, repr=False)
    left_out: LeftOut | None = None

    def __post_init__(self) -> None:
        ids = {"client ids": self.client, "group ids": self.groups}
        counts = {"labels": len(self.y)} | {name: len(one) for name, one in ids.items() if one is not None}
        if set(counts.values()) != {len(self.x)}:
            got = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise DataError(f"examples: {len(self.x)} feature rows, {got}; expected equal counts")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: IntArray) -> Examples:
        """The named rows, in that order."""
        client, groups = (None if ids is None else ids[rows] for ids in (self.client, self.groups))
        return Examples(self.x[rows], self.y[rows], client, groups)

    def whole(self) -> Examples:
        """The same, where nothing had to be left out.

        Raises:
            DataError: of the first row that does not fit.
        """
        if self.left_out is not None:
            raise self.left_out.error
        return self


@dataclass(frozen=True)
class Batch:
    """Prepared examples: what a model is fed.

    Args:
        x: shape (n, ...), float32 features or int64 token ids, no NaN.
        y: shape (n, ...), int64 class ids or float32 targets.
        groups: whose each row is, shape (n,), text; None where the task names nobody, or nobody asked.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    groups: npt.NDArray[Any] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: IntArray) -> Batch:
        """The named rows, in that order."""
        return Batch(self.x[rows], self.y[rows], None if self.groups is None else self.groups[rows])

    def between(self, start: int, end: int) -> Batch:
        """The rows from `start` up to, not including, `end`; views."""
        groups = None if self.groups is None else self.groups[start:end]
        return Batch(self.x[start:end], self.y[start:end], groups)


@dataclass(frozen=True)
class ClientData:
    """One client's prepared training and test examples."""

    train: Batch
    test: Batch


@dataclass(frozen=True)
class TaskCard:
    """What a person wants to know of a task before using it.

    Args:
        title: one line.
        data: where the data comes from, who made it.
        licence: the data's licence.
        synthetic: True when no real person or thing was measured.
        clients: what one client is, and how many there are by nature.
        metric: the primary metric's name; higher is better.
        obtain: how a user gets the data ("included", or the command that installs it).
        schema: what a site's own file must look like, one line per column or array.
        package: the distribution that holds the data, where one must be installed for it.
        own_data: True when the task has no data but what the user brings.
    """

    title: str
    data: str
    licence: str
    synthetic: bool
    clients: str
    metric: str
    obtain: str
    schema: tuple[str, ...] = ()
    package: str = ""
    own_data: bool = False


class Task(ABC):
    """Base of all tasks.

    Options of a task (`[task.options]` in a study) are the keyword arguments of its constructor. A task is best written as
    a frozen dataclass: its fields are then its options, and `options` gives back those that differ from their defaults.
    """

    name: ClassVar[str]
    card: ClassVar[TaskCard]
    prepares_rows: ClassVar[bool] = True
    """Whether `prepare` treats each row by itself, so that many clients may be prepared in one call, and a row may be protected by itself
    (`for_units`). It is a promise of the class that defines `prepare`, and is not inherited by one that defines its own."""
    keeps_rows: ClassVar[bool] = True
    """Whether `load` gives a file's rows in their order, so that each can be scored by itself."""

    @abstractmethod
    def load(self, source: Path | None = None) -> Examples:
        """Read raw examples.

        A row that does not fit is not there, and `Examples.left_out` says so. Whoever needs all of them refuses (`Examples.whole`); under a
        privacy plan a site goes on without it. Were it to fail, a server could ask for one reading of the data after another, and learn of
        single rows from what fails, which no budget pays for.

        Args:
            source: a site's own file or folder; None for the data that ships with, or is installed beside, fedlearn.

        Raises:
            DataError: the file is missing, or as a whole not what the schema says; the message names the column or array.
        """

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """A freshly initialised model. Draws from torch's generator, which the caller has seeded (`build_model`)."""

    @abstractmethod
    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Loss of each example.

        Args:
            outputs: the model's outputs, shape (batch, ...).
            y: labels, shape (batch, ...).

        Returns:
            Shape (batch,), one loss an example, not reduced: DP-SGD and weighting need it so.
        """

    @abstractmethod
    def metrics(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        """Metrics over a whole test set, the card's primary metric among them; NaN where a metric is not defined.

        Args:
            outputs: the model's outputs as float32, shape (n, ...).
            y: labels, shape (n, ...).
        """

    def split(self, examples: Examples, seed: int, folds: int, fold: int) -> tuple[IntArray, IntArray]:
        """Training and test rows of one client: stratified k-fold, a function of the labels' order and the seed alone.

        Args:
            examples: one client's rows.
            seed: the seed of the split.
            folds: k; the test share is 1/k. 1 means that all rows train and none test.
            fold: which of the k folds is the test set, from 0.
        """
        return stratified_fold(examples.y, seed, folds, fold)

    def prepare(self, train: Examples, test: Examples) -> ClientData:
        """Raw rows to what the model is fed. Anything learnt from data is learnt from `train` alone."""
        return ClientData(Batch(train.x, train.y), Batch(test.x, test.y))

    def for_units(self, group: str = "") -> Task:
        """The task as a privacy plan for records or groups needs it: what a row is made into depends on nobody else's row.

        The plan's proof bounds what one unit changes by its own clipped gradients; were a median or a history of the others changed too,
        the bound would not hold. So the task that is returned reads (`load`) and prepares every row from that row, its own group's
        rows and public constants alone. That it is cut into training and test rows in the same way is `Population`'s to see to.

        A task whose `prepare` keeps its promise of `prepares_rows` is fit for records as it is, if its `load` makes no row of several.

        Args:
            group: of a group-level plan: what names each row's group (a column, an array), which `load` then gives in
                `Examples.groups`. Empty for records.

        Raises:
            UnsupportedError: the task cannot; the message says why, the hint what to do.
            StudyError: it lacks an option for it.
        """
        if group:
            raise UnsupportedError(
                f"task {self.name!r}: its data does not say whose each row is, so there are no groups to protect",
                hint='take [privacy] unit = "record", or a task that reads groups (tabular/csv, image/npz, bank/fraud, device/keyboard)',
            )
        if not prepares_apart(self):
            raise UnsupportedError(
                f"task {self.name!r}: its prepare learns from several rows, so that one row more would change the others",
                hint="prepare with public constants and declare prepares_rows = True, or override Task.for_units",
            )
        return self

    def scoring(self) -> Scoring:
        """How one example counts in an evaluation under [privacy]: right or wrong by the model's largest output, unless a task knows better."""
        from fedlearn.privacy.scoring import ShareRight

        return ShareRight()

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids; empty where labels are no classes, or have no better names."""
        return ()

    @property
    def label_stand_in(self) -> Mapping[str, str]:
        """Label columns of the task's CSV, each with a valid cell: what stands in when a file to be scored has no labels."""
        return {}

    @property
    def options(self) -> Mapping[str, Any]:
        """The constructor's arguments that differ from their defaults."""
        declared: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in declared if f.init
        }
        return {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}


def prepares_apart(task: Task) -> bool:
    """Whether the class that defines the task's `prepare` promises that each row is treated by itself."""
    return bool(vars(_definer(task, "prepare")).get("prepares_rows", False))


def for_units_of(task: Task, group: str) -> Task:
    """`Task.for_units`, where it was written for the task's own `load` and `prepare`.

    Raises:
        UnsupportedError: a class below the one that answers reads or prepares in a way that the answer does not know of; or as `for_units`.
        StudyError: likewise.
    """
    answers = _definer(task, "for_units")
    if answers is not Task:
        for name in ("load", "prepare"):
            if not issubclass(answers, other := _definer(task, name)):
                raise UnsupportedError(
                    f"task {task.name!r}: {other.__name__} has its own {name}, and for_units is {answers.__name__}'s, which knows nothing of it",
                    hint="override for_units beside it: it promises that one unit changes nothing of the others' rows",
                )
    return task.for_units(group)


def _definer(task: Task, name: str) -> type:
    """The class that a method of the task comes from."""
    return next(one for one in type(task).__mro__ if name in vars(one))


_GENERATOR = threading.Lock()


def build_model(task: Task, seed: int) -> torch.nn.Module:
    """The task's model with initial weights drawn from the study's seed; the global generator is left as it was."""
    import torch

    # Layers draw from torch's one generator: two runs of a coordinator that start together must not share it.
    with _GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "model"))
        return task.model()
