"""Tasks for data of one's own by configuration alone: a CSV, a MedMNIST-layout .npz, or a folder of images.

What a model needs to know of the data (columns, levels, classes, channels) stands in the study, because the server builds the model
without seeing any data, and because every site must code a level the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedlearn.data.images import NPZ_SCHEMA, read_folder, read_npz
from fedlearn.data.partition import client_ids
from fedlearn.data.tables import FloatArray, Table, read_table
from fedlearn.errors import DataError, StudyError
from fedlearn.learning.metrics import accuracy, balanced_accuracy, roc_auc
from fedlearn.learning.task import Batch, ClientData, Examples, Task, TaskCard
from fedlearn.privacy.scoring import BinaryScores, Scoring, ShareRight, SquaredErrors
from fedlearn.tasks.classify import ImageClassification

if TYPE_CHECKING:
    import torch

OWN_DATA = "your own"


@dataclass(frozen=True)
class TabularTask(Task):
    """A table: classification or regression by a small net.

    Numeric columns are imputed with the client's own training median, marked where they were missing, and scaled: by the public
    range in `ranges` where one is given, else by the client's own training mean and deviation, which hides differences in
    level between sites. Give ranges where you know them. Under a privacy plan for records or groups nothing may be learnt from
    other rows: every numeric column needs a range, the middle of which stands in for what is missing.

    Args:
        label: the column to predict.
        features: numeric columns.
        categorical: categorical columns and their levels; a missing value is a level of its own.
        ranges: usual low and high of a numeric column, mapped to -1 and 1.
        client: the column that names the client; empty when a file is one client's.
        group: the column that names whose each row is; a study's privacy.group sets it.
        scaling: "own", as said above; or "public", by ranges alone, as under a privacy plan.
        kind: "classification" or "regression".
        classes: the label's values in the order of their ids (classification).
        target_range: usual low and high of the label (regression): the model's last layer works between -1 and 1 of it.
        hidden: widths of the hidden layers.
        path: where the table is, for a simulation; a site names its own.
    """

    label: str
    features: tuple[str, ...] = ()
    categorical: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    client: str = ""
    group: str = ""
    scaling: Literal["own", "public"] = "own"
    kind: Literal["classification", "regression"] = "classification"
    classes: tuple[str, ...] = ()
    target_range: tuple[float, float] = (-1.0, 1.0)
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (32,)
    path: str = ""

    name: ClassVar[str] = "tabular/csv"
    card: ClassVar[TaskCard] = TaskCard(
        title="A table of your own: classification or regression",
        data=OWN_DATA,
        licence=OWN_DATA,
        synthetic=False,
        clients="the values of the column named by the option client, or one file a client",
        metric="accuracy (classification), r2 (regression)",
        obtain="bring a CSV file, and name its columns in [task.options]",
        schema=(
            "CSV with a header; an empty cell, ? or NA is a missing value",
            "features: numeric columns, named in the option features",
            "categorical: columns with the levels that the option categorical lists",
            "label: never missing; one of the option classes, or a number",
            "client (optional): whose row it is",
        ),
        own_data=True,
    )

    def __post_init__(self) -> None:
        columns = [*self.features, *self.categorical]
        if not columns:
            raise StudyError(
                "task 'tabular/csv': no feature columns", hint="list them in features, categorical or both"
            )
        for column in (self.label, self.client):
            if column in columns:
                raise StudyError(f"task 'tabular/csv': column {column!r} is a feature and the label or client too")
        if self.kind == "classification" and len(self.classes) < 2:
            raise StudyError(
                f"task 'tabular/csv': got {len(self.classes)} classes, expected 2 or more",
                hint='list the label\'s values, such as classes = ["no", "yes"], or set kind = "regression"',
            )
        for column, (low, high) in {**self.ranges, "target_range": self.target_range}.items():
            if not low < high:
                raise StudyError(
                    f"task 'tabular/csv': range of {column!r}: got {low} to {high}, expected low below high"
                )
        unknown = sorted(set(self.ranges) - set(self.features))
        if unknown:
            raise StudyError(f"task 'tabular/csv': ranges names {unknown[0]!r}, which is not among the features")
        open_ended = sorted(set(self.features) - set(self.ranges)) if self.scaling == "public" else []
        if open_ended:
            raise StudyError(
                f"task 'tabular/csv': column {open_ended[0]!r} has no public range, and its own mean and deviation would be learnt from "
                "everybody's rows, which a privacy plan for records or groups forbids",
                hint=f"give its usual low and high: [task.options.ranges] {open_ended[0]} = [0, 100]",
            )
        # The card of this very study: its primary metric depends on the kind.
        metric = "accuracy" if self.kind == "classification" else "r2"
        object.__setattr__(self, "card", replace(type(self).card, metric=metric))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each prepared feature is, in order."""
        numeric = [name for column in self.features for name in (column, f"{column} missing")]
        levels = [f"{column}={level}" for column, known in self.categorical.items() for level in (*known, "missing")]
        return (*numeric, *levels)

    def load(self, source: Path | None = None) -> Examples:
        path = source or _own_path(self.path)
        table = read_table(path, (*self.features, *self.categorical, self.label), keep_others=True)
        columns = [table.numbers(column) for column in self.features]
        columns += [table.codes(column, levels) for column, levels in self.categorical.items()]
        if self.kind == "classification":
            y: npt.NDArray[Any] = table.codes(self.label, self.classes, required=True).astype(np.int64)
        else:
            y = table.numbers(self.label, required=True).astype(np.float32)
        groups = np.array(table.columns[self.group], dtype=np.str_) if self.group and self.group in table else None
        return table.examples(np.stack(columns, axis=1), y, self._clients(table, from_site=source is not None), groups)

    def _clients(self, table: Table, *, from_site: bool) -> npt.NDArray[np.str_] | None:
        if not self.client or (from_site and self.client not in table):
            return None
        if self.client not in table:
            raise DataError(f"{table.path}: missing column {self.client!r}, the study's client column")
        return client_ids(table.text(self.client), merge=from_site)

    def prepare(self, train: Examples, test: Examples) -> ClientData:
        columns = [self._scaling(train.x[:, i], column) for i, column in enumerate(self.features)]
        parts = (Batch(self._features(part.x, columns), part.y) for part in (train, test))
        return ClientData(*parts)

    def _scaling(self, values: FloatArray, column: str) -> tuple[float, float, float]:
        """What stands in for a missing value, and the centre and scale: from training rows and public ranges only."""
        present = values[~np.isnan(values)] if self.scaling == "own" else values[:0]
        if column in self.ranges:
            low, high = self.ranges[column]
            middle = float(np.median(present)) if len(present) else (low + high) / 2
            return middle, (low + high) / 2, (high - low) / 2
        if not len(present):
            return 0.0, 0.0, 1.0
        return float(np.median(present)), float(present.mean()), float(present.std()) or 1.0

    def _features(self, x: FloatArray, columns: list[tuple[float, float, float]]) -> npt.NDArray[np.float32]:
        parts: list[npt.NDArray[Any]] = []
        for i, (middle, centre, scale) in enumerate(columns):
            missing = np.isnan(x[:, i])
            parts += [(np.where(missing, middle, x[:, i]) - centre) / scale, missing]
        for i, levels in enumerate(self.categorical.values(), start=len(columns)):
            parts += [x[:, i] == code for code in range(len(levels))]
            parts.append(np.isnan(x[:, i]))
        return np.stack(parts, axis=1).astype(np.float32)

    def for_units(self, group: str = "") -> TabularTask:
        """Public ranges in place of means and medians; groups are the values of a column."""
        return replace(self, scaling="public", group=group)

    def scoring(self) -> Scoring:
        if self.kind == "regression":
            return SquaredErrors(*self.target_range)
        return BinaryScores() if len(self.classes) == 2 else ShareRight()

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def label_stand_in(self) -> dict[str, str]:
        return {self.label: self.classes[0] if self.classes else "0"}

    def model(self) -> torch.nn.Module:
        from fedlearn.models.tabular import TabularNet

        if self.kind == "classification":
            return TabularNet(len(self.feature_names), len(self.classes), self.hidden)
        low, high = self.target_range
        return TabularNet(len(self.feature_names), 1, self.hidden, centre=(low + high) / 2, scale=(high - low) / 2)

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        if self.kind == "classification":
            return cross_entropy(outputs, y, reduction="none")
        low, high = self.target_range
        return ((outputs[:, 0] - y) * (2 / (high - low))) ** 2

    def metrics(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        if self.kind == "regression":
            if not len(y):
                return {"r2": float("nan"), "mae": float("nan")}
            error = outputs[:, 0].astype(np.float64) - y
            spread = float(((y - y.mean()) ** 2).sum())
            r2 = 1 - float((error**2).sum()) / spread if spread > 0 else float("nan")
            return {"r2": r2, "mae": float(np.abs(error).mean())}
        predicted = outputs.argmax(axis=1)
        scores = {"accuracy": accuracy(predicted, y), "balanced_accuracy": balanced_accuracy(predicted, y)}
        if len(self.classes) == 2:
            scores["auc"] = roc_auc(outputs[:, 1] - outputs[:, 0], y)
        return scores


@dataclass(frozen=True)
class ImageNpzTask(ImageClassification):
    """Images in a MedMNIST-layout .npz, classified by a small CNN.

    Args:
        classes: how many.
        channels: 1 for grey, 3 for colour.
        path: where the file is, for a simulation; a site names its own.
        group: the arrays that name whose each image is (train_GROUP ...); a study's privacy.group sets it.
    """

    classes: Annotated[int, Field(ge=2)]
    channels: Literal[1, 3] = 3
    path: str = ""
    group: str = ""

    name: ClassVar[str] = "image/npz"
    card: ClassVar[TaskCard] = TaskCard(
        title="Images of your own in an .npz file",
        data=OWN_DATA,
        licence=OWN_DATA,
        synthetic=False,
        clients="the arrays named ..._clients, one file a client, or a partition",
        metric="accuracy",
        obtain="bring an .npz file, and say its classes and channels in [task.options]",
        schema=NPZ_SCHEMA,
        own_data=True,
    )

    def load(self, source: Path | None = None) -> Examples:
        return read_npz(source or _own_path(self.path), self.channels, self.classes, self.group)

    def for_units(self, group: str = "") -> ImageNpzTask:
        """Images are scaled one by one; groups are what an array says."""
        return replace(self, group=group)

    def model(self) -> torch.nn.Module:
        from fedlearn.models.cnn import ImageNet

        return ImageNet(self.channels, self.classes)


@dataclass(frozen=True)
class ImageFolderTask(ImageClassification):
    """Images in a folder with one subfolder a class, classified by a small CNN. Needs Pillow.

    Args:
        classes: names of the subfolders, in the order of their class ids.
        size: height and width that images are resized to, pixels.
        channels: 1 for grey, 3 for colour.
        path: where the folder is, for a simulation; a site names its own.
    """

    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    size: Annotated[int, Field(ge=8, le=512)] = 64
    channels: Literal[1, 3] = 3
    path: str = ""

    name: ClassVar[str] = "image/folder"
    card: ClassVar[TaskCard] = TaskCard(
        title="Images of your own in a folder",
        data=OWN_DATA,
        licence=OWN_DATA,
        synthetic=False,
        clients="one folder a client, or a partition",
        metric="accuracy",
        obtain="bring a folder, and name its classes in [task.options]",
        schema=(
            "one subfolder a class, named as in the option classes",
            "in it: .png, .jpg, .tif, .bmp or .webp files",
        ),
        own_data=True,
    )

    def load(self, source: Path | None = None) -> Examples:
        return read_folder(source or _own_path(self.path), self.classes, self.size, self.channels)

    def model(self) -> torch.nn.Module:
        from fedlearn.models.cnn import ImageNet

        return ImageNet(self.channels, len(self.classes))

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.classes


def _own_path(path: str) -> Path:
    if not path:
        raise DataError(
            "this task has no data of its own; expected a file or folder",
            hint="set path in [task.options] for a simulation, or start the client with --data",
        )
    return Path(path).expanduser()
