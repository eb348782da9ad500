"""`fedlearn check-model`: whether a model can have record-level privacy, and what it looks like rewritten."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fedlearn.cli.options import AppFolder, Data, Debug, Json, Overrides
from fedlearn.cli.output import print_json
from fedlearn.errors import StateError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from fedlearn.privacy.model_check import Report
    from fedlearn.privacy.rewriting import Rewritten

EXAMPLES: Final = 4


def check_model(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the model before and after, as a unified diff.")
    ] = None,
    overrides: Overrides = None,
    data: Data = None,
    app: AppFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Say whether a study's model can train under record-level privacy, which layer cannot, and why; and rewrite what can be.

    The model is built and run on a few examples of the task's data. Exit code 14 when it cannot train as it is. A task whose model needs it returns
    `fedlearn.privacy.rewrite(model).model`.
    """
    del debug
    import torch

    from fedlearn.app import load_app
    from fedlearn.data.population import build_population
    from fedlearn.learning.task import build_model
    from fedlearn.privacy.model_check import check_model as check
    from fedlearn.privacy.rewriting import rewrite
    from fedlearn.study import load_study
    from fedlearn.tasks import load_task

    loaded = load_app(app)
    asked = load_study(loaded.study(study), tuple(overrides or ()))
    task = load_task(asked.task.name, asked.task.options)
    population = build_population(asked, task, data)
    model = build_model(task, asked.seed)
    x = torch.from_numpy(population.client(population.client_ids[0]).train.x[:EXAMPLES])
    report = check(model, x)
    found = None if report.ok else rewrite(model, x)
    found = found if found is not None and found.changes else None
    after = report if found is None else check(found.model, x)
    if out is not None:
        _write(out, model, model if found is None else found.model)
    if json:
        print_json(
            {
                "ok": report.ok,
                "path": report.path.value,
                "parameters": report.parameters,
                "findings": [asdict(f) for f in report.findings],
                "rewrite": [] if found is None else [asdict(c) for c in found.changes],
                "ok_when_rewritten": after.ok,
                "findings_when_rewritten": [asdict(f) for f in after.findings],
                "parameters_when_rewritten": after.parameters,
                "difference_of_equal_changes": None if found is None else found.difference,
                "out": out,
            }
        )
    else:
        _print(asked.task.name, report, found, after)
    return 0 if report.ok else UnsupportedError.exit_code


def _write(out: Path, before: nn.Module, after: nn.Module) -> None:
    lines = difflib.unified_diff(
        repr(before).splitlines(), repr(after).splitlines(), "as it is", "rewritten", lineterm=""
    )
    try:
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise StateError(f"{out}: cannot be written: {error}", hint="name a file in a folder that exists") from None


def _print(task: str, report: Report, found: Rewritten | None, after: Report) -> None:
    verdict = {"fast": "yes, on the fast path", "opacus": "yes, by Opacus' per-example gradients", "none": "no"}
    print(f"{task}: {report.parameters} trainable numbers; record-level privacy: {verdict[report.path.value]}")
    _print_findings(report)
    if found is None:
        return
    for change in found.changes:
        print(f"\n{change.where or 'the model'}\n  - {change.before}\n  + {change.after}")
        print(f"  {'same outputs' if change.equal else 'other outputs'}{f'; {change.note}' if change.note else ''}")
    print(f"\ntrainable numbers: {found.parameters_before} before, {found.parameters_after} after")
    if found.difference is not None:
        print(f"largest difference of outputs by the changes that should make none: {found.difference:.2g}")
    print(f"rewritten so, it {'can' if after.ok else 'still cannot'} train under record-level privacy")
    if after.ok:
        print("in the task: return fedlearn.privacy.rewrite(model).model")
    else:
        _print_findings(after)


def _print_findings(report: Report) -> None:
    for one in report.findings:
        print(f"\n{one.where or 'the model'} {f'({one.kind})' if one.kind else ''}".rstrip())
        print(f"  {one.why}" + (f"\n  instead: {one.remedy}" if one.remedy else ""))
