"""Pictures of a run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from fedlearn.report.history import History
    from fedlearn.report.runs import SideBySide

MAX_CLIENT_LINES: Final = 12
VIRTUAL: Final = "virtual_seconds"
"""The column that a simulated environment adds: what each round would have taken."""
_UNITS: Final = (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("seconds", 1.0))


def learning_curve(history: History, path: Path | None, title: str) -> Any:
    """The primary metric and the training loss by round; by virtual time where the run had a simulated environment.

    Under a privacy plan neither may be there: then the length of the mean update is.

    Args:
        history: the table.
        path: where to save a PNG; None for nowhere.
        title: shown above.

    Returns:
        A matplotlib figure that no window manages.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    along, name = _axis(history)
    for client in history.clients[:MAX_CLIENT_LINES]:
        _line(top, along, history.column(f"{history.metric}@{client}"), label=client, linewidth=1, alpha=0.6)
    if history.metric in history.columns:
        _line(top, along, history.column(history.metric), label="mean over clients", linewidth=2.5, color="black")
        top.legend(fontsize=8, ncols=3, frameon=False)
    top.set_ylabel(history.metric.upper() if len(history.metric) <= 3 else history.metric)
    top.set_title(title, loc="left")
    below, label = ("train_loss", "training loss") if history.has("train_loss") else ("update_norm", "update norm")
    _line(bottom, along, history.column(below), color="black")
    bottom.set_ylabel(label)
    if not history.has(history.metric):
        top.text(
            0.5, 0.5, "no metric left the clients", ha="center", va="center", transform=top.transAxes, color="#57606a"
        )
    bottom.set_xlabel(name)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if name == "round":
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def side_by_side(runs: SideBySide, path: Path | None, title: str) -> Any:
    """The primary metric of several groups of runs, by round or by virtual time.

    Args:
        runs: what to draw.
        path: where to save a PNG; None for nowhere.
        title: shown above.

    Returns:
        A matplotlib figure that no window manages.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    along = runs.along
    curves = [(group.label, points) for group in runs.groups if (points := group.curve(runs.metric, along))]
    longest = max((points[-1][0] for _, points in curves), default=0.0)
    name, unit = ("round", 1.0) if along == "round" else _unit(longest)
    for label, points in curves:
        x, mean, spread = zip(*((place / unit, m, s) for place, m, s in points), strict=True)
        (line,) = axes.plot(x, mean, marker="." if len(points) < 30 else None, linewidth=2, label=label)
        if any(spread):
            low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if axes.lines:
        axes.legend(
            fontsize=8, frameon=False, title="\n".join([", ".join(runs.keys), *runs.privacy]) or None, title_fontsize=8
        )
    axes.set_xlabel(name if along == "round" else f"virtual time, {name}")
    axes.set_ylabel(runs.metric.upper() if len(runs.metric) <= 3 else runs.metric)
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if along == "round":
        axes.locator_params(axis="x", integer=True)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _axis(history: History) -> tuple[list[float], str]:
    """Where each row stands, and what that is called."""
    seconds = history.column(VIRTUAL) if VIRTUAL in history.columns else []
    if not seconds or None in seconds:
        return history.column("round"), "round"
    times = list(itertools.accumulate(seconds))
    name, unit = _unit(times[-1])
    return [time_s / unit for time_s in times], f"virtual time, {name}"


def _unit(longest_s: float) -> tuple[str, float]:
    """A name and its seconds, so that the longest time is a number that reads well."""
    return next((name, unit) for name, unit in _UNITS if longest_s >= unit or unit == 1.0)


def _line(axes: Any, along: list[float], values: list[float | None], **style: Any) -> None:
    points = [(place, v) for place, v in zip(along, values, strict=True) if v is not None]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="." if len(points) < 30 else None, **style)
