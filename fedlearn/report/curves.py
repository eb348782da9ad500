"""Pictures of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fedlearn.report.history import History

MAX_CLIENT_LINES = 12


def learning_curve(history: History, path: Path | None, title: str) -> Any:
    """The primary metric and the training loss by round.

    Args:
        history: the table.
        path: where to save a PNG; None for nowhere.
        title: shown above.

    Returns:
        A matplotlib figure that no window manages.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    rounds = history.column("round")
    for client in history.clients[:MAX_CLIENT_LINES]:
        _line(top, rounds, history.column(f"{history.metric}@{client}"), label=client, linewidth=1, alpha=0.6)
    if history.metric in history.columns:
        _line(top, rounds, history.column(history.metric), label="mean over clients", linewidth=2.5, color="black")
        top.legend(fontsize=8, ncols=3, frameon=False)
    top.set_ylabel(history.metric.upper() if len(history.metric) <= 3 else history.metric)
    top.set_title(title, loc="left")
    _line(bottom, rounds, history.column("train_loss"), color="black")
    bottom.set_ylabel("training loss")
    bottom.set_xlabel("round")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _line(axes: Any, rounds: list[int], values: list[float | None], **style: Any) -> None:
    points = [(r, v) for r, v in zip(rounds, values, strict=True) if v is not None]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="." if len(points) < 30 else None, **style)
