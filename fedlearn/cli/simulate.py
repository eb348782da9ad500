"""`fedlearn simulate`: a study with all its clients in this process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.options import AppFolder, Debug, Json, Overrides, Rounds
from fedlearn.cli.output import print_json, print_table
from fedlearn.cli.view import RunView
from fedlearn.errors import INTERRUPTED_EXIT_CODE, StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedlearn.simulation.run import SimulationResult


def simulate(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="Everybody's data, in place of what ships with the task."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder; runs/STUDY-TIME without it.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a study with all its clients in this process.

    Seeded, hence reproducible: the same study gives the same model, byte for byte, as `fedlearn run` and `flwr run`.
    """
    del debug
    with _run_folder(out, Path(study).stem) as folder:
        return _simulate(study, rounds, overrides, app, data, device, folder, json)


def _simulate(
    study: str,
    rounds: int | None,
    overrides: list[str] | None,
    app: Path | None,
    data: Path | None,
    device: str,
    folder: Path,
    json: bool,
) -> int:
    # Before torch is loaded: its thread pool is sized once, and identical bytes are promised for equal thread counts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from fedlearn.simulation.run import simulate as run

    view = RunView(rows=not json)
    try:
        with view:
            result = run(
                study, rounds=rounds, overrides=overrides or (), data=data, app=app, device=device, emit=view.take
            )
    except KeyboardInterrupt:
        print(f"interrupted after round {view.rounds_done}; nothing was written", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    result.save(folder)
    clients = view.evaluated.clients if view.evaluated is not None else {}
    if json:
        print_json(_report(result, folder, clients))
        return 0
    if clients:
        print()
        print_clients(clients, view.metric)
    print()
    print(f"{len(result.history)} rounds in {result.seconds:.1f} s; model, history and plot are in {folder}")
    return 0


def print_clients(clients: Mapping[str, Mapping[str, float]], metric: str) -> None:
    """The last scores of each client on its own test rows, the primary metric first."""
    names = dict.fromkeys([metric, *(name for scores in clients.values() for name in scores)])
    last = [name for name in names if name != "examples"]
    rows = [
        (client, *(scores.get(name) for name in last), _whole(scores.get("examples")))
        for client, scores in sorted(clients.items())
    ]
    print_table(rows, ("client", *last, "test rows"), indent="  ")


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


@contextmanager
def _run_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Made before the first round, so that a place that cannot be written costs no training; gone again if it stays empty."""
    folder = out if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file, expected a folder" if folder.is_file() else f"cannot be made: {error.strerror}"
        raise StateError(f"--out {folder}: {reason}", hint="choose another folder with --out") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StateError(f"--out {folder}: may not be written", hint="choose another folder with --out")
    try:
        yield folder
    finally:
        with suppress(OSError):  # it is not empty: everything is there
            folder.rmdir()


def _report(result: SimulationResult, folder: Path, clients: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    from fedlearn import arrays

    history = result.history
    return {
        "study": result.study.name,
        "rounds": len(history),
        "seconds": round(result.seconds, 3),
        "metric": history.metric,
        "final": history.final() if history.metric in history.columns else None,
        "clients": clients,
        "model_digest": arrays.digest(result.weights),
        "folder": str(folder),
        "history": list(history),
    }
