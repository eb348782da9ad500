"""`fedlearn simulate`: a study with all its clients in this process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import typer

from fedlearn.cli.interrupt import Interrupts
from fedlearn.cli.options import AppFolder, BackendName, Data, Debug, Device, Json, Overrides, Rounds, Workers
from fedlearn.cli.output import print_json, print_table
from fedlearn.cli.view import RunView
from fedlearn.errors import INTERRUPTED_EXIT_CODE, StateError, WorkerCrashedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedlearn.simulation.profile import Profile
    from fedlearn.simulation.run import SimulationResult


MOST_CLIENTS: Final = 50
"""More clients than this are no table for a terminal; the run folder's history has them all."""


def simulate(
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own; not with --resume.")
    ] = None,
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    data: Data = None,
    device: Device = None,
    backend: BackendName = None,
    workers: Workers = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="With --backend ray: a running cluster, as HOST:PORT, ray://HOST:10001 or auto.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder; runs/STUDY-TIME without it.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Go on with a run folder's run, to the same bytes."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A client whose code raises ends the run.")] = False,
    inline: Annotated[
        str | None,
        typer.Option("--inline", metavar="CLIENT", help="Run just this client here; a debugger opens where it raises."),
    ] = None,
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, help="With --inline: on the model of this round.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a study with all its clients in this process.

    Seeded, hence reproducible: the same study gives the same model, byte for byte, as `fedlearn run` and `flwr run` do for small
    cohorts, and on one backend always. Ctrl-C finishes the round and saves; --resume goes on with it.
    """
    del debug
    # Before torch is loaded: its thread pool is sized once, and identical bytes are promised for equal thread counts.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if study is None and resume is None:
        raise click.UsageError("Missing argument 'STUDY', or a run folder with --resume.", click.get_current_context())
    if out is not None and resume is not None:
        raise StateError("--out with --resume: a resumed run stays in its folder", hint="leave --out away")
    asked = {
        "rounds": rounds,
        "overrides": overrides or (),
        "data": data,
        "app": app,
        "device": device,
        "backend": backend,
        "resume": resume,
    }
    if inline is not None:
        return _inline(study, inline, round_number, asked)
    arguments = asked | {"workers": workers, "address": address, "strict": strict, "profile": profile}
    if resume is not None:
        _say_what_changed(resume, asked)
        return _simulate(study, resume, json, arguments)
    with _run_folder(out, Path(study or "").stem) as folder:
        return _simulate(study, folder, json, arguments | {"out": folder})


def _simulate(study: str | None, folder: Path, json: bool, arguments: dict[str, Any]) -> int:
    from fedlearn.simulation.run import simulate as run

    view = RunView(rows=not json)
    try:
        with Interrupts("this round") as interrupts, view:
            result = run(
                study, **arguments, emit=view.take, told=view.client_raised, should_stop=interrupts.should_stop
            )
    except KeyboardInterrupt:
        print(f"interrupted {_where_it_stands(folder, view.rounds_done)}", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except (StateError, WorkerCrashedError) as error:  # a full disk, for one: what was committed is there
        if view.rounds_done:
            error.hint = "; ".join(filter(None, [error.hint, _how_to_go_on(folder)]))
        raise
    clients = view.evaluated.clients if view.evaluated is not None else {}
    if json:
        print_json(_report(result, folder, clients))
    elif result.history or not result.stopped:
        _print_end(result, folder, clients, view)
    if result.stopped:
        print(f"stopped {_where_it_stands(folder, view.rounds_done)}", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
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


def print_released(statement: Mapping[str, Any] | None) -> None:
    """What a run has cost, where its study asks for privacy."""
    if statement is not None:
        from fedlearn.privacy.statement import headline

        print(f"privacy: {headline(statement)}")


def print_profile(profile: Profile) -> None:
    """Seconds and percent by part, the largest first."""
    *parts, total = profile.table()
    rows = [
        (part, f"{spent:.2f}", f"{percent:.1f}")
        for part, spent, percent in [*sorted(parts, key=lambda row: -row[1]), total]
    ]
    print_table(rows, ("where the time went", "seconds", "percent"), indent="  ", right=(1, 2))
    print(f"  {profile.clients_per_s:.1f} clients/s in the rounds")


def _print_end(
    result: SimulationResult, folder: Path, clients: Mapping[str, Mapping[str, float]], view: RunView
) -> None:
    if clients and len(clients) <= MOST_CLIENTS:
        print()
        print_clients(clients, view.metric)
    if result.profile is not None:
        print()
        print_profile(result.profile)
    print()
    done = len(view.round_rows)
    if not done and not result.stopped:
        print(f"it was finished already, after {len(result.history)} rounds; --rounds N goes on to more")
    print_released(result.privacy)
    speed = f", {view.clients_per_s:.1f} clients/s" if done else ""
    print(f"{done} rounds in {result.seconds:.1f} s{speed}; model, history and plot are in {folder}")


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _where_it_stands(folder: Path, rounds_done: int) -> str:
    if not rounds_done:
        return "before a round was committed: there is nothing to go on from"
    return f"after round {rounds_done}; {_how_to_go_on(folder)}"


def _how_to_go_on(folder: Path) -> str:
    return f"fedlearn simulate --resume {folder} goes on"


def _say_what_changed(folder: Path, asked: dict[str, Any]) -> None:
    from fedlearn.simulation.prepare import Request
    from fedlearn.simulation.workspace import Recorded

    recorded = Recorded.read(folder)
    changed = recorded.other_bytes(Request(**asked).setting(recorded))
    if changed:
        print(f"note: equal bytes are not promised any more: {'; '.join(changed)}", file=sys.stderr)


def _inline(study: str | None, client: str, round_number: int | None, asked: dict[str, Any]) -> int:
    """One client's training and evaluation in this process; where it raises, a debugger opens."""
    import pdb  # noqa: T100  # it is what this is for
    import traceback

    from fedlearn.simulation.inline import Inline
    from fedlearn.simulation.prepare import Request

    one = Inline(Request(study, **asked).ready(), client, round_number, asked["resume"])
    if one.to_replay:
        print(f"running rounds 1 to {one.to_replay} again for the model of round {one.round}", file=sys.stderr)
    one.prepare()
    print(f"client {client}, round {one.round}: {one.training_rows} training rows, {one.test_rows} test rows")
    try:
        for line in one.run():
            print(line)
    except Exception as error:
        traceback.print_exc()
        pdb.post_mortem(error.__traceback__)
        return WorkerCrashedError.exit_code
    return 0


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
        "stopped": result.stopped,
        "seconds": round(result.seconds, 3),
        "metric": history.metric,
        "final": history.final() if history.metric in history.columns else None,
        "clients": clients,
        "model_digest": arrays.digest(result.weights),
        "privacy": result.privacy,
        "folder": str(folder),
        **({} if result.profile is None else {"profile": result.profile.to_dict()}),
        "history": list(history),
    }
