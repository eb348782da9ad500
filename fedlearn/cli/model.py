"""`fedlearn model`: fetch a run's model, export it, score a file with it."""

from __future__ import annotations

import csv
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlearn.cli.options import AppFolder, Debug, Json, Server, Tls
from fedlearn.cli.output import print_json
from fedlearn.errors import StateError

ModelFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A folder that `fedlearn simulate`, `run --out` or `model get` wrote."),
]


class Format(StrEnum):
    """Formats as the command line names them."""

    safetensors = "safetensors"
    torchscript = "torchscript"
    onnx = "onnx"


def get(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's id, as `fedlearn runs` shows it.")],
    server: Server,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the run folder.")],
    tls: Tls = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a run's model, with its study, history and plot. A site may fetch the runs that it took part in.

    A run that failed or was stopped has the model of its last committed round.
    """
    del debug
    from fedlearn.cli.fetch import fetch
    from fedlearn.cli.runs import connect

    with connect(server, tls) as control:
        folder = fetch(control, run, out)
        found = control.show(run).summary
    if json:
        print_json({"run": run, "folder": str(folder), "files": sorted(p.name for p in folder.iterdir())})
    else:
        early = "" if found.status == "finished" else f", which {found.status} after round {found.round}"
        print(f"run {run}{early}: model, study, history and plot are in {folder}")


def export(
    folder: ModelFolder,
    kind: Annotated[Format, typer.Option("--format", help="What to write.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows to check with, where no data ships with the task."),
    ] = None,
    app: AppFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a model. The exported model takes prepared features (as `Task.prepare` makes them) and gives raw outputs.

    Before the file gets its name it is loaded back and must give the model's own outputs.
    """
    del debug
    from fedlearn.report.export import export_model
    from fedlearn.report.scoring import open_model

    found = export_model(open_model(folder, app), kind.value, out, data)
    if json:
        print_json({"file": str(out), "format": kind.value, **found})
    else:
        shape = " x ".join(map(str, found["features"]))
        print(f"{out}: {kind.value}, {found['parameters']} parameters; features: {shape}; outputs checked")


def predict(
    folder: ModelFolder,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="What to score, as the task's schema says.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the scores here; CSV.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="FILE", help="Data that missing values are imputed from; DATA without it."),
    ] = None,
    app: AppFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a site's own file with a model, here: nothing is sent anywhere.

    The label column may be absent; where it is there, the metrics on it are reported too. What a task learns from a
    site's training rows (what stands in for a missing value, say) is learnt from --reference, or else from the file itself.
    """
    del debug
    from fedlearn.report.scoring import open_model, score_file

    scored = score_file(open_model(folder, app), data, reference)
    source = "the scored file itself" if reference is None else str(reference)
    if out is not None:
        _write_csv(out, scored.header, scored.rows)
    if json:
        rows = [dict(zip(scored.header, row, strict=True)) for row in scored.rows]
        print_json({"rows": len(rows), "metrics": scored.metrics, "imputed_from": source, "out": out, "scores": rows})
        return
    if out is None:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(scored.header)
        writer.writerows(scored.rows)
    where = f" in {out}" if out is not None else ""
    print(f"{len(scored.rows)} rows scored{where}; what is missing was imputed from {source}", file=sys.stderr)
    if scored.metrics:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scored.metrics.items())
        print(f"on the labels in the file: {shown}", file=sys.stderr)


def _write_csv(path: Path, header: tuple[str, ...], rows: Any) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise StateError(
            f"{path}: cannot be written: {error.strerror}", hint="choose another file with --out"
        ) from None
