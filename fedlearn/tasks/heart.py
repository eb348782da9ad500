"""hospital/heart: does this patient have coronary heart disease? Four real hospitals, 920 patients.

Data: UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano; CC BY 4.0), one CSV with a column naming the hospital:
Cleveland 303, Hungary 294, Switzerland 123, VA Long Beach 200 patients, of whom 46, 36, 93 and 75 % are ill.

Two facts about the file that matter:

- The row with id 304 is a Hungarian patient labelled Cleveland: the UCI's own files hold 303 and 294. It is moved on load.
- A cholesterol of 0 means "not measured": all of Switzerland, a quarter of VA. So does one blood pressure of 0.

What is missing differs by hospital, so it is imputed where it is missing: with the median of that hospital's own training
rows, or with a public constant where a hospital never measured the value at all. Nothing is standardised by statistics of
the data: centres and scales are clinical constants, so a hospital that holds only its own file computes what a simulation does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedlearn.data.partition import client_ids
from fedlearn.data.tables import Table, read_table
from fedlearn.errors import DataError
from fedlearn.learning.metrics import accuracy, roc_auc
from fedlearn.learning.task import Batch, ClientData, Examples, LeftOut, Task, TaskCard
from fedlearn.privacy.scoring import BinaryScores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measure:
    """A numeric column: its plausible range, its public centre and scale, and what stands in where a site never measured it."""

    low: float
    high: float
    centre: float
    scale: float
    fallback: float


MEASURES: Final[dict[str, Measure]] = {
    "age": Measure(0, 120, centre=55, scale=10, fallback=55),
    "trestbps": Measure(0, 300, centre=130, scale=20, fallback=120),  # resting blood pressure, mm Hg; 120 is normal
    "chol": Measure(0, 1000, centre=220, scale=50, fallback=200),  # serum cholesterol, mg/dl; below 200 is desirable
    "thalch": Measure(0, 300, centre=140, scale=25, fallback=150),  # highest heart rate; about 220 minus the age
    "oldpeak": Measure(-10, 20, centre=1, scale=1, fallback=0),  # ST depression by exercise, mm; 0 is normal
    "ca": Measure(0, 3, centre=0, scale=1, fallback=0),  # major vessels coloured by fluoroscopy
}
FLAGS: Final = ("fbs", "exang")
"""True or false: fasting blood sugar above 120 mg/dl, angina by exercise. Public stand-in: false."""

LEVELS: Final[dict[str, tuple[str, ...]]] = {
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "slope": ("upsloping", "flat", "downsloping"),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
COMMON: Final = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalch", "exang", "oldpeak")
"""The ten columns that all four hospitals recorded for most patients; FLamby keeps the same ten."""
SCARCE: Final = ("slope", "ca", "thal")
NEVER_MISSING: Final = frozenset({"age", "sex", "cp"})
ZERO_IS_MISSING: Final = frozenset({"chol", "trestbps"})
MISLABELLED_ID: Final = "304"


@dataclass(frozen=True)
class HeartTask(Task):
    """Binary diagnosis from ten clinical columns.

    Args:
        variant: "full", all 920 patients; or "flamby", the 740 patients of FLamby's Fed-Heart-Disease benchmark (du Terrail
            et al. 2022): those with no missing value in the ten columns, an unmeasured cholesterol of 0 counting as a value.
            303, 261, 46 and 130 patients.
        columns: "common", the ten columns that all hospitals recorded; or "all", which adds slope, ca and thal.
        hidden: width of the net's hidden layer; 0 makes it a logistic regression.
        imputation: "median" of the hospital's own training rows for what is missing; or "public", constants of the literature, as under a
            privacy plan for records.
    """

    variant: Literal["full", "flamby"] = "full"
    columns: Literal["common", "all"] = "common"
    hidden: Annotated[int, Field(ge=0)] = 16
    imputation: Literal["median", "public"] = "median"

    name: ClassVar[str] = "hospital/heart"
    card: ClassVar[TaskCard] = TaskCard(
        title="Coronary heart disease from clinical findings",
        data="UCI Heart Disease: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano (doi 10.24432/C52P4X)",
        licence="CC BY 4.0",
        synthetic=False,
        clients="one hospital; 4 by nature: cleveland 303, hungary 294, switzerland 123, va-long-beach 200 patients",
        metric="auc",
        obtain="included",
        schema=(
            "CSV with a header; an empty cell or ? is a missing value",
            "age: years",
            "sex: Male or Female",
            "cp: typical angina, atypical angina, non-anginal or asymptomatic",
            "trestbps: resting blood pressure, mm Hg; 0 is missing",
            "chol: serum cholesterol, mg/dl; 0 is missing",
            "fbs: fasting blood sugar above 120 mg/dl, TRUE or FALSE",
            "restecg: normal, st-t abnormality or lv hypertrophy",
            "thalch: highest heart rate reached",
            "exang: angina by exercise, TRUE or FALSE",
            "oldpeak: ST depression by exercise, mm",
            "slope, ca, thal: only with the option columns = all",
            "num: diagnosis, 0 is healthy, 1 to 4 is ill",
            "dataset (optional): the hospital; without it all rows are one site's",
        ),
    )

    def __post_init__(self) -> None:
        # Incomplete rows are dropped there, so a file's rows are not one to one with what is scored.
        object.__setattr__(self, "keeps_rows", self.variant == "full")

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """Columns of `Examples.x`, in order."""
        return COMMON if self.columns == "common" else COMMON + SCARCE

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each prepared feature is, in order."""
        names: list[str] = []
        for column in self.raw_columns:
            if column in LEVELS:
                names += [f"{column}={level}" for level in LEVELS[column]]
            else:
                names.append(column)
            if column not in NEVER_MISSING:
                names.append(f"{column} missing")
        return tuple(names)

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("healthy", "ill")

    @property
    def label_stand_in(self) -> dict[str, str]:
        return {"num": "0"}

    def load(self, source: Path | None = None) -> Examples:
        path = Path(str(files("fedlearn.data") / "files" / "heart_disease_uci.csv")) if source is None else source
        table = read_table(path, (*self.raw_columns, "num"), keep_others=True)
        x = np.stack([_raw_column(table, column) for column in self.raw_columns], axis=1)
        y = (table.numbers("num", low=0, high=4, required=True) > 0).astype(np.int64)
        client = None
        if "dataset" in table:
            hospital = table.text("dataset")
            if source is None:
                hospital[np.array(table.columns["id"]) == MISLABELLED_ID] = "Hungary"
            client = client_ids(hospital, merge=source is not None)
        examples = table.examples(x, y, client)
        if self.variant == "flamby":
            common = examples.x[:, : len(COMMON)]
            complete = examples.take(np.flatnonzero(~np.isnan(common).any(axis=1)))
            none = DataError(f"{path}: every row has a missing value, and the flamby variant keeps complete rows only")
            left_out = examples.left_out or (None if len(complete) else LeftOut(len(examples), none))
            examples = replace(complete, left_out=left_out)
        return examples

    def prepare(self, train: Examples, test: Examples) -> ClientData:
        x_train, x_test = self._unmeasured(train.x), self._unmeasured(test.x)
        learnt = x_train if self.imputation == "median" else x_train[:0]
        middle = [_middle(learnt[:, i], column) for i, column in enumerate(self.raw_columns)]
        return ClientData(
            Batch(self._features(x_train, middle), train.y), Batch(self._features(x_test, middle), test.y)
        )

    def for_units(self, group: str = "") -> HeartTask:
        """Public constants in place of medians. Each row is a patient of its own, so there are no groups."""
        if group:
            super().for_units(group)
        return replace(self, imputation="public")

    def scoring(self) -> BinaryScores:
        return BinaryScores()

    def _unmeasured(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        x = x.astype(np.float64)  # a copy
        for i, column in enumerate(self.raw_columns):
            if column in ZERO_IS_MISSING:
                x[x[:, i] == 0, i] = np.nan
        return x

    def _features(self, x: npt.NDArray[Any], middle: list[float]) -> npt.NDArray[np.float32]:
        parts: list[npt.NDArray[Any]] = []
        for i, column in enumerate(self.raw_columns):
            values, missing = x[:, i], np.isnan(x[:, i])
            if column in LEVELS:
                parts += [values == code for code in range(len(LEVELS[column]))]
            else:
                measure = MEASURES.get(column)
                centre, scale = (measure.centre, measure.scale) if measure else (0.0, 1.0)
                parts.append((np.where(missing, middle[i], values) - centre) / scale)
            if column not in NEVER_MISSING:
                parts.append(missing)
        return np.stack(parts, axis=1).astype(np.float32)

    def model(self) -> torch.nn.Module:
        from fedlearn.models.tabular import TabularNet

        return TabularNet(len(self.feature_names), 1, (self.hidden,) if self.hidden else ())

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype), reduction="none")

    def metrics(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        return {"auc": roc_auc(outputs[:, 0], y), "accuracy": accuracy(outputs[:, 0] > 0, y == 1)}


def _raw_column(table: Table, column: str) -> npt.NDArray[np.float64]:
    required = column in NEVER_MISSING
    if column in LEVELS:
        return table.codes(column, LEVELS[column], required=required)
    if column in FLAGS:
        return table.codes(column, ("FALSE", "TRUE"), required=required)
    measure = MEASURES[column]
    return table.numbers(column, low=measure.low, high=measure.high, required=required)


def _middle(training_values: npt.NDArray[Any], column: str) -> float:
    """What stands in for a missing value: this client's training median, or the public constant where it has none."""
    present = training_values[~np.isnan(training_values)]
    if len(present):
        return float(np.median(present))
    return MEASURES[column].fallback if column in MEASURES else 0.0


TASK = HeartTask
