"""A site's own file, scored with a model from a run folder."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.errors import DataError, UnsupportedError
from fedlearn.learning.task import Examples, build_model
from fedlearn.report.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Array
    from fedlearn.learning.task import Batch, Task
    from fedlearn.study import Study


@dataclass(frozen=True)
class TrainedModel:
    """A model from a run folder, in evaluation mode, with its task and study."""

    study: Study
    task: Task
    weights: Mapping[str, Array] = field(repr=False)
    module: torch.nn.Module = field(repr=False)


@dataclass(frozen=True)
class Scored:
    """Scores of a file's rows, in its order.

    Args:
        header: "row" (from 1), "client" where the file names clients, then the task's own columns.
        rows: one a row of the file.
        metrics: on the file's labels; empty where it has none.
    """

    header: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(repr=False)
    metrics: Mapping[str, float]


def open_model(folder: Path, app: Path | None = None) -> TrainedModel:
    """Read a model from a run folder.

    Raises:
        StateError: it is not a run folder.
        StudyError: its task is not installed here.
        UpdateError: the weights do not fit the task's model.
    """
    from fedlearn import arrays
    from fedlearn.app import load_app
    from fedlearn.learning.local import get_weights, set_weights
    from fedlearn.tasks import task_of

    load_app(app)
    run = RunFolder(folder)
    study, weights = run.study(), run.weights()
    task = task_of(study)
    module = build_model(task, study.seed)
    if study.train.precision == "float64":
        module = module.double()
    arrays.check_same(weights, arrays.specs_of(get_weights(module)), what=f"{folder}: model")
    set_weights(module, weights)
    return TrainedModel(study, task, weights, module.eval())


def score_file(model: TrainedModel, path: Path, reference: Path | None = None) -> Scored:
    """Score every row of a file.

    Args:
        model: from `open_model`.
        path: as the task's schema says; the label column may be absent.
        reference: what stands in for missing values is learnt from it; None takes `path` itself.

    Raises:
        DataError: a file is missing or does not fit the schema.
        UnsupportedError: the task does not score rows one by one.
    """
    from fedlearn.learning import local

    task, study = model.task, model.study
    if not task.keeps_rows:
        raise UnsupportedError(
            f"task {task.name!r} reads rows in their context, not one by one",
            hint="its metrics come from evaluation rounds; score such data with the task's own code",
        )
    examples, labelled = load_rows(task, path)
    known = examples if reference is None else load_rows(task, reference)[0]
    outputs: Any = None
    for rows, batch in _prepared(task, examples, known):
        part, _ = local.predict(task, model.module, study.train, batch, model.weights, study.evaluate.batch_size)
        if outputs is None:
            outputs = np.zeros((len(examples), *part.shape[1:]), dtype=part.dtype)
        outputs[rows] = part
    columns = {name: np.asarray(values) for name, values in readable(task, outputs).items()}
    header = ("row", *(("client",) if examples.client is not None else ()), *columns)
    rows_out = [
        (
            i + 1,
            *((str(examples.client[i]),) if examples.client is not None else ()),
            *(_item(v[i]) for v in columns.values()),
        )
        for i in range(len(examples))
    ]
    return Scored(header, rows_out, task.metrics(outputs, examples.y) if labelled else {})


def readable(task: Task, outputs: Array) -> dict[str, Any]:
    """Outputs as a person reads them: a class and its probabilities where the labels are classes, else the numbers themselves.

    Args:
        task: names its classes.
        outputs: float, shape (n, 1) or (n, classes).

    Raises:
        UnsupportedError: outputs of another shape, such as a language model's.
    """
    if outputs.ndim != 2:
        raise UnsupportedError(f"outputs of shape {outputs.shape}: expected one row of numbers an example")
    names, values = task.label_names, outputs.astype(np.float64)
    width = values.shape[1]
    if width == 1 and len(names) == 2:
        return {f"probability_{names[1]}": 1 / (1 + np.exp(-values[:, 0]))}
    if width == 1:
        return {"output": values[:, 0]}
    names = names if len(names) == width else tuple(f"class_{i}" for i in range(width))
    odds = np.exp(values - values.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    best = np.array(names, dtype=object)[odds.argmax(axis=1)]
    return {"predicted": best, **{f"probability_{name}": odds[:, i] for i, name in enumerate(names)}}


def _prepared(task: Task, examples: Examples, known: Examples) -> Iterator[tuple[Any, Batch]]:
    """Rows and what the model is fed, one client at a time: a site's missing values are a matter of that site alone."""
    if examples.client is None:
        yield np.arange(len(examples)), task.prepare(known, examples).test
        return
    for client in np.unique(examples.client):
        rows = np.flatnonzero(examples.client == client)
        own = known if known.client is None else known.take(np.flatnonzero(known.client == client))
        mine = examples.take(rows)
        yield rows, task.prepare(own if len(own) else mine, mine).test


def load_rows(task: Task, path: Path) -> tuple[Examples, bool]:
    """A file's examples, and whether it holds labels.

    Raises:
        DataError: it is missing or does not fit the schema.
    """
    with _labelled(path, task.label_stand_in) as (readable, labelled):
        try:
            return task.load(readable).whole(), labelled
        except DataError as error:
            message = error.message.replace(str(readable), str(path))
            raise DataError(message, hint=error.hint) from None


@contextmanager
def _labelled(path: Path, stand_in: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """The file, or a copy with a stand-in for the label columns that it lacks."""
    missing = {} if not stand_in else _lacking(path, stand_in)
    if not missing:
        yield path, True
        return
    with tempfile.TemporaryDirectory() as folder, path.open(encoding="utf-8-sig", newline="") as file:
        copy = Path(folder) / path.name
        with copy.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            for number, row in enumerate(csv.reader(file)):
                if row:
                    writer.writerow([*row, *(missing if number == 0 else missing.values())])
        yield copy, False


def _lacking(path: Path, stand_in: Mapping[str, str]) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = [name.strip() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}  # the task's own reader says what is wrong
    return {name: cell for name, cell in stand_in.items() if name not in header}


def _item(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return round(plain, 6) if isinstance(plain, float) else plain
