"""`fedlearn run`, `runs`, `show`, `watch`, `stop` and `nodes`: what an operator asks of a coordinator."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedlearn import events
from fedlearn.cli.options import AppFolder, Debug, Json, Overrides, Rounds, Server, Tls
from fedlearn.cli.output import print_json, print_table
from fedlearn.cli.processes import bundle
from fedlearn.cli.view import RunView, indented
from fedlearn.errors import INTERRUPTED_EXIT_CODE, LinkError, ProtocolError, RunFailedError, StudyError

if TYPE_CHECKING:
    from fedlearn.link.control import ControlClient, RunSummary

RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `fedlearn runs` shows it.")]
RECONNECT_S: Final = 60.0
"""How long a live view tries to reach a coordinator that went away, before it gives up; the run itself goes on."""
RETRY_S: Final = 0.5
UNDER_WAY: Final = frozenset({"queued", "running"})


def run(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    server: Server,
    tls: Tls = None,
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit and leave; do not watch.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Fetch the model into this folder when the run ends.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Submit a study to a coordinator and watch it live. Ctrl-C leaves the run going."""
    del debug
    from fedlearn.app import load_app
    from fedlearn.study import load_study

    found = load_app(app)
    path = found.study(study)
    extra = (*(overrides or ()), *([f"rounds={rounds}"] if rounds is not None else []))
    if found.native:  # a foreign app's run config is its coordinator's to read
        asked = load_study(path, extra)  # refused here, with file and line, before anything is sent
        if asked.environment is not None:
            print(f"{path}: its [environment] is for simulations and is ignored by a real federation", file=sys.stderr)
    text = _read(path)
    with connect(server, tls) as control:
        run_id = control.submit(text, extra)
        if detach:
            print_json({"run": run_id}) if json else print(run_id)
            return 0
        if not json:
            print(f"run {run_id} at {server}")
        return _follow(control, run_id, json=json, out=out)


def runs(server: Server, tls: Tls = None, json: Json = False, debug: Debug = False) -> None:
    """List the coordinator's runs, newest first."""
    del debug
    with connect(server, tls) as control:
        found = control.runs()
    if json:
        print_json([_summary(one) for one in found])
    elif not found:
        print("no runs yet")
    else:
        header = ("run", "study", "status", "round", "submitted")
        print_table(
            [(r.run_id, r.name, r.status, f"{r.round}/{r.rounds}", _when(r.submitted_at)) for r in found], header
        )


def show(run: RunId, server: Server, tls: Tls = None, json: Json = False, debug: Debug = False) -> None:
    """Show one run: where it stands, its rounds, and its clients' last scores."""
    del debug
    with connect(server, tls) as control:
        found = control.show(run)
    detail = jsonlib.loads(found.detail_json or "{}")
    if json:
        print_json({**_summary(found.summary), **detail})
        return
    summary = found.summary
    print(f"run        {summary.run_id}")
    print(f"study      {summary.name}")
    print(f"status     {summary.status}, round {summary.round} of {summary.rounds}")
    print(f"submitted  {_when(summary.submitted_at)}" + (f" by {detail['submitter']}" if "submitter" in detail else ""))
    if detail.get("reason"):
        print(f"reason     {detail['reason']}")
    for client, reason in sorted((detail.get("refused") or {}).items()):
        print(f"refused    {client}: {indented(reason, 11)}")
    if summary.status in {"failed", "stopped"}:
        print(f"model      {_left_by(summary.run_id, summary.round)}")
    if detail.get("privacy"):
        from fedlearn.privacy.statement import lines

        print("\n" + "\n".join(lines(detail["privacy"])))
    rows = detail.get("history") or ()
    if rows:
        from fedlearn.report.history import History

        print(f"\n{History(rows, detail.get('metric') or 'loss')!r}")
    scores = next((row["clients_metrics"] for row in reversed(rows) if row.get("clients_metrics")), None)
    if scores is not None:
        from fedlearn.cli.simulate import print_clients

        print()
        print_clients(scores, detail.get("metric") or "loss")


def watch(run: RunId, server: Server, tls: Tls = None, json: Json = False, debug: Debug = False) -> int:
    """Watch a run from its first event on, live. Ctrl-C leaves the run going."""
    del debug
    with connect(server, tls) as control:
        return _follow(control, run, json=json, out=None)


def stop(run: RunId, server: Server, tls: Tls = None, json: Json = False, debug: Debug = False) -> None:
    """Stop a run after the round that it is in; what was committed is kept."""
    del debug
    with connect(server, tls) as control:
        found = control.stop(run)
    if json:
        print_json(_summary(found))
    else:
        print(f"run {found.run_id}: {found.status}, round {found.round} of {found.rounds}")


def nodes(server: Server, tls: Tls = None, json: Json = False, debug: Debug = False) -> None:
    """List the sites that the coordinator knows, and whether they are connected now."""
    del debug
    with connect(server, tls) as control:
        found = sorted(control.nodes(), key=lambda node: node.client_id)
    if json:
        print_json([vars(node) for node in found])
    elif not found:
        print("no site has connected yet")
    else:
        rows = [
            (n.client_id, "yes" if n.connected else "no", ", ".join(f"{k}={v}" for k, v in sorted(n.facts.items())))
            for n in found
        ]
        print_table(rows, ("site", "connected", "says of itself"))


def connect(server: str, tls: Path | None) -> ControlClient:
    """A connection to a coordinator under this person's certificate."""
    from fedlearn.link.control import ControlClient
    from fedlearn.link.tls import TlsBundle

    return ControlClient(server, TlsBundle.load(bundle(tls)))


def _follow(control: ControlClient, run_id: str, *, json: bool, out: Path | None) -> int:
    view = RunView(rows=not json)
    try:
        with view:
            follow(control, run_id, view)
    except KeyboardInterrupt:
        print(f"detached: run {run_id} goes on; `fedlearn watch {run_id}` shows it again", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    if isinstance(view.ended, events.RunFailed):
        reason = view.ended.reason.removeprefix(f"run {run_id}: ")
        raise RunFailedError(f"run {run_id}: {reason}", hint=_left_by(run_id, view.rounds_done, view.ended.hint))
    if view.ended is None and (found := control.show(run_id)).summary.status == "failed":
        reason = jsonlib.loads(found.detail_json or "{}").get("reason") or "no reason was recorded"
        raise RunFailedError(f"run {run_id}: {reason}", hint=_left_by(run_id, found.summary.round))
    folder = None
    if out is not None and isinstance(view.ended, events.RunFinished):
        from fedlearn.cli.fetch import fetch

        folder = fetch(control, run_id, out)
    if json:
        print_json(_outcome(run_id, view, folder))
        return 0
    from fedlearn.cli.simulate import print_clients, print_released

    if view.evaluated is not None:
        print()
        print_clients(view.evaluated.clients, view.metric)
    print()
    print_released(view.privacy)
    if isinstance(view.ended, events.RunFinished):
        where = f"it is in {folder}" if folder else f"fedlearn model get {run_id} --out DIR fetches the model"
        print(f"{view.rounds_done} rounds in {view.ended.seconds:.1f} s; {where}")
    else:
        print(f"run {run_id} was stopped after round {view.rounds_done}; {_left_by(run_id, view.rounds_done)}")
    return 0


def _left_by(run_id: str, rounds_done: int, hint: str = "") -> str:
    """What a run that ended early has left."""
    model = (
        f"fedlearn model get {run_id} --out DIR fetches the model of round {rounds_done}, the last that was committed"
        if rounds_done
        else "no round was committed, so there is no model"
    )
    return f"{hint}\n       {model}" if hint else model


def follow(control: ControlClient, run_id: str, view: RunView) -> None:
    """Feed a run's events to a view until the run ends; a coordinator that restarts meanwhile is dialled again.

    Raises:
        LinkError: it stayed away for `RECONNECT_S`.
    """
    next_index, lost_at = 0, None
    while view.ended is None:
        try:
            for index, line in control.watch(run_id, next_index):
                next_index, lost_at = index + 1, None
                view.take(events.from_json(line)[0])
            # A coordinator that stops ends the stream too: the run itself has not ended then.
            if view.ended is None and control.show(run_id).summary.status not in UNDER_WAY:
                return
        except ProtocolError:
            raise
        except LinkError:
            lost_at = lost_at if lost_at is not None else time.monotonic()
            if time.monotonic() - lost_at > RECONNECT_S:
                raise
        if view.ended is None:
            time.sleep(RETRY_S)


def _outcome(run_id: str, view: RunView, folder: Path | None) -> dict[str, Any]:
    ended = view.ended
    return {
        "run": run_id,
        "status": "finished" if isinstance(ended, events.RunFinished) else "stopped",
        "rounds": view.rounds_done,
        "seconds": ended.seconds if isinstance(ended, events.RunFinished) else None,
        "metric": view.metric,
        "final": view.evaluated.mean.get(view.metric) if view.evaluated is not None else None,
        "clients": view.evaluated.clients if view.evaluated is not None else {},
        "model_digest": ended.model_digest if isinstance(ended, events.RunFinished) else None,
        "privacy": view.privacy,
        "folder": str(folder) if folder else None,
        "history": view.round_rows,
    }


def _summary(run: RunSummary) -> dict[str, Any]:
    return {**vars(run), "submitted": _when(run.submitted_at)}


def _when(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read as a study: {error}") from None
