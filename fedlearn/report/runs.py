"""Several run folders side by side: what their studies differ in, what came out, and their curves."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedlearn.errors import DataError, StateError
from fedlearn.report.folder import HISTORY_JSON, MANIFEST, RunFolder
from fedlearn.simulation.workspace import leaves

if TYPE_CHECKING:
    from fedlearn.study import Study

VIRTUAL: Final = "virtual_seconds"
"""A history's column: seconds that each round would have taken, where the study says how fast clients are."""
TIME: Final = "virtual_time_s"
"""When a round would have ended: the sum of those seconds so far."""
SEED: Final = "seed"
PRIVACY: Final = "privacy."
"""What the keys of a privacy plan begin with."""
COSTS: Final = ("privacy.epsilon", "privacy.noise_multiplier")
"""One of them says what a plan costs."""
NONE: Final = "none"
CELLS: Final = "cells"
"""The folder of a sweep's run folders, within its own."""


@dataclass(frozen=True)
class Run:
    """A finished or stopped run.

    Args:
        name: for people.
        study: what was run.
        rows: its history.
        metric: the primary metric's name.
        privacy: what it has cost, as `fedlearn.privacy.statement.statement` says it; None where its study asks for no privacy.
    """

    name: str
    study: Study
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    metric: str
    privacy: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.has_virtual_time:
            ends = itertools.accumulate(float(row[VIRTUAL]) for row in self.rows)
            object.__setattr__(self, "rows", [{**row, TIME: end} for row, end in zip(self.rows, ends, strict=True)])

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            StateError: it is none, or its run has no results yet.
        """
        place = RunFolder(folder)
        study = place.study()
        try:
            rows = json.loads((folder / HISTORY_JSON).read_bytes())
            facts = json.loads((folder / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise StateError(
                f"run folder {folder}: its history cannot be read: {error}",
                hint="expected a folder that `fedlearn simulate --out` wrote",
            ) from None
        return cls(folder.name, study, rows, facts.get("metric") or _metric_of(study), facts.get("privacy"))

    def values(self, column: str) -> list[float]:
        """A column's numbers, without the rounds that have none."""
        return [float(row[column]) for row in self.rows if row.get(column) is not None]

    def last(self, column: str) -> float:
        """A column's last number; NaN without one."""
        found = self.values(column)
        return found[-1] if found else math.nan

    @property
    def has_virtual_time(self) -> bool:
        """Whether every round says how long it would have taken."""
        return bool(self.rows) and all(row.get(VIRTUAL) is not None for row in self.rows)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Args:
        values: what this group differs in from the others: key to value.
        runs: at least one.
    """

    values: Mapping[str, Any]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """For a legend."""
        return ", ".join(str(value) for value in self.values.values()) or self.runs[0].study.name

    def mean(self, column: str) -> float:
        """The mean over runs of a column's last number; NaN where one has none."""
        return statistics.fmean(run.last(column) for run in self.runs)

    def deviation(self, column: str) -> float:
        """The sample standard deviation over runs (n - 1); NaN of one run."""
        values = [run.last(column) for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 and not any(map(math.isnan, values)) else math.nan

    def best(self, column: str) -> float:
        """The mean over runs of each run's best number; NaN where one has none."""
        return statistics.fmean(max(run.values(column), default=math.nan) for run in self.runs)

    def curve(self, column: str, along: str) -> list[tuple[float, float, float]]:
        """(place, mean, deviation) at each round that all runs have a number for; the place is the mean of `along`."""
        by_round: dict[int, list[Mapping[str, Any]]] = {}
        for run in self.runs:
            for row in run.rows:
                if row.get(column) is not None:
                    by_round.setdefault(int(row["round"]), []).append(row)
        points = []
        for number in sorted(by_round):
            rows = by_round[number]
            if len(rows) == len(self.runs):
                values = [float(row[column]) for row in rows]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((statistics.fmean(float(row[along]) for row in rows), statistics.fmean(values), spread))
        return points


@dataclass(frozen=True)
class SideBySide:
    """Groups of runs with one metric.

    Args:
        groups: in the order of their first run.
        metric: of all of them.
    """

    groups: Sequence[Group]
    metric: str

    @classmethod
    def of(cls, runs: Sequence[Run]) -> SideBySide:
        """Group runs by everything but their seed.

        Raises:
            DataError: they do not share a metric.
        """
        metrics = sorted({run.metric for run in runs})
        if len(metrics) != 1:
            raise DataError(
                f"runs: their metrics are {', '.join(metrics)}; expected one", hint="compare runs of one kind of task"
            )
        flat = [leaves(json.loads(run.study.to_json())) for run in runs]
        keys = [
            key for key in dict.fromkeys(k for one in flat for k in one) if key not in {SEED, "name", "description"}
        ]
        differing = _differing(keys, flat)
        groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
        for run, one in zip(runs, flat, strict=True):
            values = {key: one.get(key, NONE if key.startswith(PRIVACY) else None) for key in differing}
            groups.setdefault(json.dumps(values), (values, []))[1].append(run)
        return cls([Group(values, members) for values, members in groups.values()], metrics[0])

    @property
    def keys(self) -> tuple[str, ...]:
        """What the groups differ in."""
        return tuple(self.groups[0].values) if self.groups else ()

    @property
    def privacy(self) -> Sequence[str]:
        """What the epsilons of these runs are about, one line for each kind; empty without any."""
        from fedlearn.privacy.statement import kind

        runs = (run for group in self.groups for run in group.runs)
        return tuple(dict.fromkeys(kind(run.privacy) for run in runs if run.privacy is not None))

    @property
    def along(self) -> str:
        """The x axis: virtual time where every run has it, else the round."""
        return TIME if all(run.has_virtual_time for group in self.groups for run in group.runs) else "round"

    def table(self) -> list[dict[str, Any]]:
        """One row a group: what it differs in, how many runs, and what came out, mean and deviation over them."""
        return [
            {
                **group.values,
                "runs": len(group.runs),
                "rounds": max(len(run.rows) for run in group.runs),
                self.metric: group.mean(self.metric),
                "deviation": group.deviation(self.metric),
                "best": group.best(self.metric),
                "train_loss": group.mean("train_loss"),
                "seconds": statistics.fmean(sum(run.values("seconds")) for run in group.runs),
                **({TIME: group.mean(TIME)} if self.along == TIME else {}),
            }
            for group in self.groups
        ]

    def plot(self, path: Path | None = None, *, title: str = "") -> Any:
        """The metric's curve of each group, with the deviation as a band; saved as PNG where a path is given."""
        from fedlearn.report.curves import side_by_side

        return side_by_side(self, path, title)


def run_folders(folder: Path) -> list[Path]:
    """The run folders that a sweep's folder holds, of studies that have results; else the folder itself."""
    return sorted(path.parent for path in folder.glob(f"{CELLS}/*/{HISTORY_JSON}")) or [folder]


def _differing(keys: Sequence[str], flat: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that have more than one value. A study without privacy has none for the keys of its plan, but for how much it may cost."""
    private = [one for one in flat if PRIVACY.rstrip(".") not in one]
    found = []
    for key in keys:
        among = private if key.startswith(PRIVACY) else flat
        if key != PRIVACY.rstrip(".") and len({json.dumps(one.get(key)) for one in among}) > 1:
            found.append(key)
    if 0 < len(private) < len(flat) and not any(key in found for key in COSTS):
        found.append(next(key for key in COSTS if private[0].get(key) is not None))
    return found


def _metric_of(study: Study) -> str:
    """Of a folder from before manifests named it."""
    from fedlearn.tasks import load_task

    return load_task(study.task.name, study.task.options).card.metric
