"""`fedlearn compare`: the results of several run folders side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.options import Debug, Json
from fedlearn.cli.output import print_json, print_table
from fedlearn.errors import StateError

if TYPE_CHECKING:
    from fedlearn.report.runs import SideBySide


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a sweep's folder.")],
    plot: Annotated[Path, typer.Option("--plot", metavar="FILE", help="Where the curves go, as PNG.")] = Path(
        "comparison.png"
    ),
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show what several runs differ in and what came out, and plot their curves.

    Runs that differ in their seed alone are one row: mean and standard deviation over seeds. The plot's x axis is virtual time where all
    runs have it, else the round.
    """
    del debug
    from fedlearn.report.runs import Run, SideBySide, run_folders

    runs = SideBySide.of([Run.read(one) for folder in folders for one in run_folders(folder)])
    save_plot(runs, plot, "")
    if json:
        privacy = list(runs.privacy)
        print_json(
            {
                "metric": runs.metric,
                "along": runs.along,
                "groups": runs.table(),
                "privacy": privacy,
                "plot": str(plot),
            }
        )
        return 0
    print_groups(runs)
    print(f"\ncurves by {'virtual time' if runs.along != 'round' else 'round'} are in {plot}")
    return 0


def print_groups(runs: SideBySide) -> None:
    """One row a group, what it differs in first."""
    rows = runs.table()
    header = [_words(name, runs.metric) for name in rows[0]]
    values = [[_shown(value) if name in runs.keys else value for name, value in row.items()] for row in rows]
    print_table(values, header)
    for line in runs.privacy:
        print(f"privacy: {line}")


def save_plot(runs: SideBySide, path: Path, title: str) -> None:
    """Write the curves.

    Raises:
        StateError: the file cannot be written.
    """
    try:
        runs.plot(path, title=title)
    except (OSError, ValueError) as error:  # matplotlib refuses endings that it does not know
        raise StateError(
            f"{path}: the plot cannot be written: {error}", hint="name another file, such as x.png"
        ) from None


def _words(name: str, metric: str) -> str:
    if name == metric:
        return f"{metric} mean"
    short = name.removesuffix(".name") if name in {"strategy.name", "task.name"} else name
    return short.replace("_", " ")


def _shown(value: Any) -> Any:
    """A key's value: 1e-05 is not 0.0000."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else value
