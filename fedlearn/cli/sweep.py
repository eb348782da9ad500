"""`fedlearn sweep`: a grid of studies, in parallel where cores allow, and a table and a plot of what came out."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer

from fedlearn.cli.compare import print_groups, save_plot
from fedlearn.cli.interrupt import Interrupts
from fedlearn.cli.options import AppFolder, BackendName, Data, Debug, Device, Json, Overrides, Rounds
from fedlearn.cli.output import print_json
from fedlearn.cli.progress import duration, plain_progress
from fedlearn.errors import INTERRUPTED_EXIT_CODE, DataError, RunFailedError

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedlearn.simulation.grid import Axis
    from fedlearn.simulation.sweep import CellState, Sweep
    from fedlearn.simulation.workspace import Setting
    from fedlearn.study import Study

PLOT, RESULT = "comparison.png", "sweep.json"
_SHOWN_FAILURES: Final = 20


def sweep(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="KEY=A,B",
            help="Values of a key: strategy=fedavg,fedprox or seed=0..4; again for more keys.",
        ),
    ],
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    data: Data = None,
    device: Device = None,
    backend: BackendName = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Studies at the same time; as many as cores without it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Sweep folder; runs/STUDY-sweep-... without it.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a study for every combination of the values given, and compare what came out.

    Keys are the study's (docs/study.md), or short: the last part of a key where only one key ends so (lr, epochs, batch_size, rounds,
    partition ...), strategy for strategy.name, task for task.name. seed=0..4 stands for seed=0,1,2,3,4.

    The same command again runs what is missing: finished studies are skipped, begun ones go on. A study that fails is reported and the
    others go on; the exit code is 11 then.
    """
    del debug
    # Before torch is loaded anywhere: as in `fedlearn simulate`, so that a study's bytes are the same in both.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from fedlearn.app import load_app
    from fedlearn.simulation.grid import make_cells, parse_axis
    from fedlearn.simulation.prepare import Request
    from fedlearn.simulation.sweep import Sweep
    from fedlearn.study import load_study

    axes = [parse_axis(text) for text in grid]
    extra = (*(overrides or ()), *([f"rounds={rounds}"] if rounds is not None else []))
    base = load_study(load_app(app).study(study), extra)
    setting = Request(data=data, app=app, device=device, backend=backend).setting(None)
    folder = out if out is not None else Path("runs") / _name(base, axes, setting)
    cells = Sweep(make_cells(base, axes), folder, setting, workers)
    view = SweepView(cells, quiet=json)
    with Interrupts("the rounds under way") as interrupts, view:
        try:
            cells.run(view.changed, interrupts.should_stop)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on with {folder}", file=sys.stderr)
            return INTERRUPTED_EXIT_CODE
    _end(cells, base, axes, json)
    if interrupts.asked and cells.to_do:
        print(f"stopped; the same command goes on with {len(cells.to_do)} studies in {folder}", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    return RunFailedError.exit_code if cells.failed else 0


class SweepView:
    """What a person sees of a sweep: a line for each study that ends, and on a terminal a bar. A context manager."""

    def __init__(self, sweep: Sweep, *, quiet: bool) -> None:
        self._sweep, self._quiet = sweep, quiet
        self._progress: Progress | None = None
        self._task: Any = None
        self._started_s, self._left_at_start = time.monotonic(), sweep.rounds_left

    def __enter__(self) -> Self:
        total, skipped = len(self._sweep.states), sum(state.skipped for state in self._sweep.states)
        again = f", {skipped} finished already" if skipped else ""
        self._line(f"{total} studies{again}; {self._sweep.at_once} at a time; in {self._sweep.folder}")
        if sys.stderr.isatty() and self._left_at_start:
            self._progress = plain_progress()
            self._progress.start()
            self._task = self._progress.add_task("sweep", total=self._left_at_start, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def changed(self, state: CellState) -> None:
        """A cell has moved on."""
        from fedlearn.simulation.sweep import CellStatus

        ended = sum(s.status not in {CellStatus.WAITING, CellStatus.RUNNING} for s in self._sweep.states)
        if self._progress is not None:
            note = f"{ended}/{len(self._sweep.states)} studies"
            self._progress.update(self._task, completed=self._left_at_start - self._sweep.rounds_left, note=note)
        if state.status in {CellStatus.WAITING, CellStatus.RUNNING}:
            return
        scored = f", {state.scored}" if state.scored else ""
        why = f": {state.reason}" if state.reason else f" after {state.round} rounds{scored}"
        self._line(f"[{ended}/{len(self._sweep.states)}] {state.cell.label} {state.status.value}{why}{self._left()}")

    def _left(self) -> str:
        left = self._sweep.rounds_left
        done = self._left_at_start - left
        if not left or done <= 0:
            return ""
        return f"; about {duration((time.monotonic() - self._started_s) * left / done)} left"

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)


def _end(sweep: Sweep, base: Study, axes: list[Axis], json: bool) -> None:
    """Table, plot and files of what is finished."""
    from fedlearn.report.folder import RunFolder
    from fedlearn.report.runs import Run, SideBySide
    from fedlearn.simulation.sweep import CellStatus

    done = [state for state in sweep.states if state.status is CellStatus.FINISHED]
    read = [Run.read(state.folder) for state in done]
    try:
        runs = SideBySide.of(read) if read else None
    except DataError as error:  # a grid over tasks, say: each result stands for itself
        runs = None
        print(f"note: no table: {error.message}", file=sys.stderr)
    scores = {str(state.folder): run.last(run.metric) for state, run in zip(done, read, strict=True)}
    report = {
        "study": base.name,
        "folder": str(sweep.folder),
        "grid": {axis.name: list(axis.values) for axis in axes},
        "metric": None if runs is None else runs.metric,
        "cells": [_cell(state, scores.get(str(state.folder))) for state in sweep.states],
        "groups": [] if runs is None else runs.table(),
        "privacy": [] if runs is None else list(runs.privacy),
        "plot": None if runs is None else str(sweep.folder / PLOT),
    }
    RunFolder(sweep.folder).add(RESULT, report)
    if runs is not None:
        save_plot(runs, sweep.folder / PLOT, base.description or base.name)
    if json:
        print_json(report)
        return
    if runs is not None:
        print()
        print_groups(runs)
        print(f"\ncurves and table are in {sweep.folder}")
    for state in sweep.failed[:_SHOWN_FAILURES]:
        print(f"failed: {state.cell.label}: {state.reason}", file=sys.stderr)
        if state.hint:
            print(f"        {state.hint}", file=sys.stderr)


def _cell(state: CellState, score: float | None) -> dict[str, Any]:
    return {
        **state.cell.values,
        "score": score,
        "status": state.status.value,
        "rounds": state.round,
        "folder": str(state.folder),
        **({"reason": state.reason} if state.reason else {}),
    }


def _name(base: Study, axes: list[Axis], setting: Setting) -> str:
    """The same for the same study, keys and setting, so that the command again, or with more values, finds what was done."""
    text = f"{base.digest} {sorted(axis.key for axis in axes)} {setting}"
    return f"{base.name}-sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
