"""`fedlearn data`, `strategies` and `exit-codes`: what there is."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedlearn import errors
from fedlearn.cli.entry import BROKEN_PIPE_EXIT_CODE
from fedlearn.cli.options import AppFolder, Debug, Json
from fedlearn.cli.output import print_json, print_table
from fedlearn.errors import (
    INTERRUPTED_EXIT_CODE,
    USAGE_EXIT_CODE,
    DataError,
    FedlearnError,
    StateError,
    StudyError,
)

if TYPE_CHECKING:
    from fedlearn.data.catalogue import DataSummary, TaskEntry
    from fedlearn.learning.task import TaskCard

MOST_CLIENTS: Final = 30
MOST_LABELS: Final = 12

_OTHER_CODES: Final = {
    0: ("ok", "Everything was done."),
    USAGE_EXIT_CODE: ("usage", "The command line cannot be read: an unknown command or option."),
    INTERRUPTED_EXIT_CODE: ("interrupted", "Ctrl-C."),
    BROKEN_PIPE_EXIT_CODE: ("pipe", "The program that read the output went away."),
}


def strategies(json: Json = False, debug: Debug = False) -> None:
    """List the federated algorithms, their papers and options."""
    del debug
    from fedlearn.app import load_app

    load_app()
    registry: Any = importlib.import_module("strategies")
    found = [registry.describe(name) for name in registry.names()]
    if json:
        print_json([asdict(one) for one in found])
        return
    rows = [
        (
            one.name,
            "sum" if one.linear else "stack",
            ", ".join(f"{o.name}={o.default}" for o in one.options) or "-",
            one.paper,
        )
        for one in found
    ]
    print_table(rows, ("strategy", "takes", "options", "paper"))
    print(
        "\nsum: a weighted sum, in flat memory; secure aggregation fits. stack: needs every client's update by itself."
    )


def exit_codes(json: Json = False, debug: Debug = False) -> None:
    """List the exit codes."""
    del debug
    table = exit_code_table()
    if json:
        print_json([{"code": code, "kind": kind, "meaning": text} for code, kind, text in table])
    else:
        print_table(table, ("code", "kind", "meaning"))


def exit_code_table() -> list[tuple[int, str, str]]:
    """(code, kind, meaning) of every exit code, in order; of the errors that share a code the most general one."""
    table = dict(_OTHER_CODES)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, FedlearnError):
            text = "Anything else, and defects." if kind is FedlearnError else (kind.__doc__ or "").partition("\n")[0]
            table.setdefault(kind.exit_code, (kind.kind, text))
    return [(code, *table[code]) for code in sorted(table)]


def list_tasks(json: Json = False, debug: Debug = False) -> None:
    """List the tasks: what they learn, from whose data, under which licence, and whether the data is here."""
    del debug
    from fedlearn.data.catalogue import list_data

    found = list_data()
    if json:
        print_json([_plain(entry) for entry in found])
        return
    rows = [(e.name, e.card.title, nature(e.card), e.card.licence, e.availability.value) for e in found]
    print_table(rows, ("task", "learns", "data", "licence", "is"))
    print("\nfedlearn data show TASK: its clients, its schema, and how to get the data")


def show_task(
    task: Annotated[str, typer.Argument(metavar="TASK", help="A name from `fedlearn data list`, or module:attribute.")],
    study: Annotated[
        str | None, typer.Option("--study", metavar="STUDY", help="Count and split the data as this study does.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="PATH", help="Count a file of your own.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw who holds which labels; PNG.")
    ] = None,
    app: AppFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a task: its data, licence, clients, and what a site's own file must look like."""
    del debug
    from fedlearn.app import load_app
    from fedlearn.data.catalogue import Availability, entry_of, summarise
    from fedlearn.study import load_study

    loaded = load_app(app)
    entry = entry_of(task)
    here = entry.availability in {Availability.INCLUDED, Availability.INSTALLED}
    summary = None
    if study is not None:
        asked = load_study(loaded.study(study))
        if asked.task.name != task:
            raise StudyError(
                f"{study}: is about task {asked.task.name!r}, not {task!r}",
                hint=f"fedlearn data show {asked.task.name}",
            )
        split = asked.data
        summary = summarise(
            task,
            asked.task.options,
            partition=split.partition,
            clients=split.clients,
            partition_options=split.options,
            seed=asked.seed,
            source=data,
        )
    elif here or data is not None:
        summary = summarise(task, source=data)
    if plot is not None:
        _draw(summary, plot, entry)
    if json:
        print_json({**_plain(entry), "summary": None if summary is None else _plain_summary(summary), "plot": plot})
        return
    _print_entry(entry)
    if summary is not None:
        _print_summary(summary)
    if plot is not None:
        print(f"\n{plot}: who holds which labels")


def _draw(summary: DataSummary | None, plot: Path, entry: TaskEntry) -> None:
    from fedlearn.data.picture import picture_of_split

    if summary is None:
        raise DataError(f"--plot: the data of {entry.name} is not here", hint=entry.card.obtain)
    try:
        picture_of_split(summary, plot)
    except (OSError, ValueError) as error:
        raise StateError(
            f"{plot}: cannot be written: {error}", hint="name a .png file in a folder that exists"
        ) from None


def _print_entry(entry: TaskEntry) -> None:
    card = entry.card
    print(f"{entry.name}: {card.title}\n")
    for name, text in (
        ("data", card.data),
        ("kind", "synthetic: no real person or thing was measured" if card.synthetic else nature(card)),
        ("licence", card.licence),
        ("clients", card.clients),
        ("metric", f"{card.metric} (higher is better)"),
        ("obtain", f"{card.obtain} ({entry.availability.value} here)" if card.package else card.obtain),
    ):
        print(f"{name:<9}{text}")
    if card.schema:
        print("\na site's own file:")
        for line in card.schema:
            print(f"  {line}")
    if entry.options:
        print("\noptions ([task.options] in a study):")
        rows = [(o.name, o.kind, "required" if o.default is None else o.default) for o in entry.options]
        print_table(rows, ("option", "is", "default"), indent="  ")


def _print_summary(summary: DataSummary) -> None:
    shape = " x ".join(map(str, summary.feature_shape)) or "one value"
    print(f"\n{summary.examples} examples of {shape}, {summary.missing:.1%} of the values missing;", end=" ")
    print(f"{summary.population} clients, split: {summary.partition}\n")
    shown = summary.clients[:MOST_CLIENTS]
    labels = summary.labels if len(summary.labels) <= MOST_LABELS else ()
    rows = [(c.client_id, c.examples, *(c.labels if labels else ())) for c in shown]
    print_table(rows, ("client", "examples", *labels), indent="  ")
    if len(shown) < summary.population:
        print(f"  ... and {summary.population - len(shown)} more; --json lists {len(summary.clients)}")


def nature(card: TaskCard) -> str:
    """Where a task's data comes from, in a word or two."""
    return "your own" if card.own_data else "synthetic" if card.synthetic else "real"


def _plain(entry: TaskEntry) -> dict[str, Any]:
    return {
        "task": entry.name,
        **asdict(entry.card),
        "availability": entry.availability.value,
        "options": [asdict(option) for option in entry.options],
    }


def _plain_summary(summary: DataSummary) -> dict[str, Any]:
    tree = asdict(summary)
    del tree["entry"]
    return tree
