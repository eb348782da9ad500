"""Runs the arms of a comparison over seeds, and shows them as a table and a figure."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedlearn.study import Study, load_study

if TYPE_CHECKING:
    from fedlearn.privacy.plan import PrivacyPlan

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Comparison:
    """Arms that differ in their overrides alone.

    Args:
        study: the file's name, relative to this folder.
        title: of the figure.
        metric: of the history.
        arms: label to overrides; a fixed hyper-parameter of each arm is part of its label.
        common: overrides of all arms.
        reach: count the rounds until the metric is at least this.
        by_fold: each seed tests on another fold.
        apart: arms that run another study: label to its name.
        last: a run's score is the mean of its last so many evaluations: one round's accuracy jumps under label skew.
        backend: of the simulations. Runs are what is done in parallel here, and one client after another gives the bytes of a real federation.
        results: where tables and figures go, relative to this folder.
        data: a file that is not here by itself.
    """

    study: str
    title: str
    metric: str
    arms: dict[str, tuple[str, ...]]
    common: tuple[str, ...] = ()
    reach: float | None = None
    by_fold: bool = False
    apart: Mapping[str, str] = field(default_factory=dict)
    last: int = 5
    backend: str = "sequential"
    results: str = "results"
    data: str = ""

    @property
    def private_arms(self) -> dict[str, PrivacyPlan]:
        """The arms whose studies have a privacy plan."""
        from fedlearn.privacy.study import plan_of

        plans = {arm: plan_of(self.study_of(arm, 0)) for arm in self.arms}
        return {arm: plan for arm, plan in plans.items() if plan is not None}

    def study_of(self, arm: str, seed: int) -> Study:
        """One run's study."""
        fold = (f"data.fold={seed % 5}",) if self.by_fold else ()
        overrides = (*self.common, *self.arms[arm], f"seed={seed}", *fold)
        return load_study(HERE / f"{self.apart.get(arm, self.study)}.toml", overrides)


def curve(study_json: str, metric: str, backend: str) -> list[tuple[int, float]]:
    """(round, metric) of one run."""
    import warnings

    import fedlearn
    from fedlearn.study import study_from_json

    warnings.simplefilter("ignore", RuntimeWarning)  # a perplexity that overflows is shown as missing
    history = fedlearn.simulate(study_from_json(study_json), backend=backend).outcome.history
    return [(row["round"], row["metrics"][metric]) for row in history if "metrics" in row]


def run(comparison: Comparison, seeds: int, jobs: int, out: Path) -> dict[str, list[list[tuple[int, float]]]]:
    """Arm to its seeds' curves; those in `out` are not run again."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[tuple[str, int], Path] = {}
    missing: dict[Path, Study] = {}
    for seed in range(seeds):  # so that a run that is stopped has its first seeds complete
        for arm in comparison.arms:
            study = comparison.study_of(arm, seed)
            path = files[arm, seed] = out / f"{study.digest[:16]}.json"
            if not path.exists():
                missing[path] = study
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun = {
            pool.submit(curve, s.to_json(), comparison.metric, comparison.backend): path for path, s in missing.items()
        }
        for number, future in enumerate(as_completed(begun), start=1):
            path = begun[future]
            path.with_suffix(".part").write_text(json.dumps(future.result()), encoding="utf-8")
            path.with_suffix(".part").replace(path)
            sys.stderr.write(f"\r{comparison.title}: {number}/{len(begun)} runs")
    sys.stderr.write("\n")
    return {
        arm: [json.loads(files[arm, seed].read_text(encoding="utf-8")) for seed in range(seeds)]
        for arm in comparison.arms
    }


def score(points: list[tuple[int, float]], last: int = 5) -> float:
    """A run's score: the mean of its last so many evaluations."""
    return statistics.fmean(value for _, value in points[-last:])


def rounds_to(points: list[tuple[int, float]], level: float) -> int | None:
    """The first evaluated round at or above a level; None where there is none."""
    return next((number for number, value in points if value >= level), None)


def table(name: str, comparison: Comparison, found: dict[str, list[list[tuple[int, float]]]]) -> str:
    """The result as a page."""
    seeds = len(next(iter(found.values())))
    private = comparison.private_arms
    of = f"the last {comparison.last} evaluations of a run" if comparison.last > 1 else "a run's last model"
    lines = [
        f"# {comparison.title}",
        "",
        (
            f"`python -m simulations.reproduce {name} --seeds {seeds}`. `{comparison.metric}` of {of}; "
            f"mean and standard deviation over {seeds} seeds."
        ),
        "",
        *_about_privacy(private),
        f"| | {comparison.metric} |"
        + (f" rounds to {comparison.reach:g} |" if comparison.reach else "")
        + (" noise multiplier |" if private else ""),
        "|---|---|" + "---|" * (bool(comparison.reach) + bool(private)),
    ]
    for arm, curves in found.items():
        scores = [score(points, comparison.last) for points in curves]
        line = f"| {arm} | {statistics.fmean(scores):.3f} ± {statistics.stdev(scores):.3f} |"
        if comparison.reach:
            reached = [r for points in curves if (r := rounds_to(points, comparison.reach)) is not None]
            line += f" {statistics.median(reached):g} |" if reached else " none |"
            if 0 < len(reached) < seeds:
                line = f"{line[:-1]}({seeds - len(reached)} of {seeds} never) |"
        if private:
            line += f" {private[arm].noise_multiplier:.3f} |" if arm in private else " none |"
        lines.append(line)
    return "\n".join([*lines, "", f"![{comparison.title}]({name}.png)", ""])


def _about_privacy(private: Mapping[str, PrivacyPlan]) -> list[str]:
    """What the epsilons of the arms are about: they are never shown without it."""
    from fedlearn.privacy.statement import kind, sampling_in_words, statement

    kinds = dict.fromkeys(
        f"{kind(statement(plan, seeded=True))}. {sampling_in_words(plan).capitalize()}; {plan.rounds} rounds."
        for plan in private.values()
    )
    return ["\n\n".join(f"Privacy: {one}" for one in kinds), ""] if kinds else []


def figure(comparison: Comparison, found: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Curves with a band of one standard deviation."""
    import numpy as np
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(7, 4), layout="constrained")
    axes = sheet.subplots()
    for arm, curves in found.items():
        rounds = [number for number, _ in curves[0]]
        values = np.array([[value for _, value in points] for points in curves])
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
        (line,) = axes.plot(rounds, mean, label=arm, linewidth=1.6)
        axes.fill_between(rounds, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.12, linewidth=0)
    if private := comparison.private_arms:
        plan = next(iter(private.values()))
        about = f"unit {plan.unit.value}, delta {plan.delta:g}; seeded rehearsals, not private"
        axes.text(0.0, -0.2, about, transform=axes.transAxes, fontsize=8)
    axes.set_xlabel("round")
    axes.set_ylabel(comparison.metric)
    axes.set_title(comparison.title, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    sheet.savefig(path, dpi=90)
