"""A picture of a split: who holds how much of which label."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.data.catalogue import NOT_SPLIT, DataSummary

MAX_BARS: Final = 40
"""More clients than this are drawn as a heat map."""
MAX_LEGEND: Final = 12
MAX_COLUMNS: Final = 500
"""More clients than this are grouped: a screen has no more columns."""


def picture_of_split(summary: DataSummary, path: Path | None = None) -> Any:
    """Stacked bars of label counts, one bar a client; or, for many clients, their sizes above a heat map of label shares.

    Args:
        summary: what `catalogue.summarise` returned.
        path: where to save a PNG; None for nowhere.

    Returns:
        A matplotlib figure that no window manages.
    """
    from matplotlib.figure import Figure

    draw = _bars if len(summary.clients) <= MAX_BARS else _heat_map
    figure = Figure(
        figsize=(9, max(2.6, 1.6 + 0.34 * len(summary.clients)) if draw is _bars else 5.5), layout="constrained"
    )
    draw(figure, summary)
    shown = f" ({len(summary.clients):,} shown)" if len(summary.clients) < summary.population else ""
    synthetic = " (synthetic)" if summary.entry.card.synthetic else ""
    figure.suptitle(
        f"{summary.entry.name}{synthetic}: {summary.examples:,} examples, {summary.population:,} "
        f"client{'' if summary.population == 1 else 's'}{shown}, "
        f"{'not split' if summary.partition == NOT_SPLIT else summary.partition + ' partition'}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _counts(summary: DataSummary) -> npt.NDArray[np.int64]:
    """Shape (clients, labels); one column of sizes where there are no labels."""
    rows = [share.labels if summary.labels else (share.examples,) for share in summary.clients]
    return np.array(rows, dtype=np.int64)


def _colours(count: int) -> list[Any]:
    import matplotlib as mpl

    if count <= 10:
        return [mpl.colormaps["tab10"](i) for i in range(count)]
    return [mpl.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _bars(figure: Any, summary: DataSummary) -> None:
    axes = figure.subplots()
    counts = _counts(summary)
    places = np.arange(len(counts))
    left = np.zeros(len(counts))
    names = summary.labels or ("examples",)
    for label, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        axes.barh(places, counts[:, label], left=left, color=colour, label=name, height=0.75)
        left += counts[:, label]
    for place, total in zip(places, left, strict=True):
        axes.annotate(f" {int(total):,}", (total, place), va="center", fontsize=8)
    axes.set_yticks(places, [share.client_id for share in summary.clients], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("examples")
    axes.spines[["top", "right"]].set_visible(False)
    if summary.labels and len(names) <= MAX_LEGEND:
        axes.legend(fontsize=8, frameon=False, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="label")


def _heat_map(figure: Any, summary: DataSummary) -> None:
    counts = _counts(summary)
    counts = counts[np.argsort(-counts.sum(axis=1), kind="stable")]
    sizes = counts.sum(axis=1)
    if not summary.labels:
        top = figure.subplots()
    else:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        shares = counts / np.maximum(sizes, 1)[:, None]
        groups = np.array_split(np.arange(len(counts)), min(len(counts), MAX_COLUMNS))
        columns = np.stack([shares[group].mean(axis=0) for group in groups], axis=1)
        image = bottom.imshow(
            columns,
            aspect="auto",
            cmap="magma_r",
            vmin=0,
            vmax=1,
            extent=(0, len(counts), len(summary.labels) - 0.5, -0.5),
        )
        bottom.set_yticks(range(len(summary.labels)), summary.labels, fontsize=8)
        bottom.set_ylabel("label")
        bottom.set_xlabel("clients, largest first")
        figure.colorbar(image, ax=bottom, label="share of the client's examples", fraction=0.03, pad=0.01)
    top.fill_between(np.arange(len(sizes)) + 0.5, sizes, step="mid", color="tab:blue", alpha=0.8)
    top.set_ylim(bottom=0)
    top.set_xlim(0, len(sizes))
    top.set_ylabel("examples")
    if not summary.labels:
        top.set_xlabel("clients, largest first")
    top.spines[["top", "right"]].set_visible(False)
