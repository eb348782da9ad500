"""A run that ended, fetched from its coordinator as a run folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn import arrays, events
from fedlearn.report.folder import RunFolder
from fedlearn.report.history import History
from fedlearn.study import Study, parse_study

if TYPE_CHECKING:
    from fedlearn.link.control import ControlClient


def fetch(control: ControlClient, run_id: str, out: Path) -> Path:
    """Write a run folder from what the coordinator keeps: model, study and events.

    Raises:
        StateError: the run has no model (yet), or the folder cannot be written.
        LinkError: the coordinator went away.
    """
    detail = json.loads(control.show(run_id).detail_json or "{}")
    study = study_of(detail)
    with tempfile.TemporaryDirectory() as temporary:
        weights = arrays.from_bytes(control.model(run_id, Path(temporary)).read_bytes())
    history, facts = _events(control, run_id)
    facts.update({"run": run_id, "server": control.address, "study": json.loads(study.to_json())})
    return RunFolder(out).save(study, weights, history, facts)


def study_of(detail: dict[str, Any]) -> Study:
    """The study that a run was submitted with, overrides applied."""
    return parse_study(detail["study"], tuple(detail.get("overrides", ())), origin="the run's study")


def _events(control: ControlClient, run_id: str) -> tuple[History, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    metric, facts = "metric", {}
    for _, line in control.watch(run_id):
        match events.from_json(line)[0]:
            case events.RunStarted() as started:
                metric = started.metric
                facts = {"clients": list(started.clients), "parameters": started.parameters}
            case events.PrivacyStated() as said:
                facts["privacy"] = dict(said.statement)
            case events.RoundFinished() as done:
                rows[done.round] = {
                    "round": done.round,
                    "attempt": done.attempt,
                    "clients": done.clients,
                    "dropped": done.dropped,
                    "seconds": done.seconds,
                    "train_loss": done.train_loss,
                    "update_norm": done.update_norm,
                }
            case events.Evaluated() as scores if scores.round in rows:
                rows[scores.round].update(metrics=dict(scores.mean), clients_metrics=dict(scores.clients))
            case events.RunFinished() as ended:
                facts.update(seconds=ended.seconds, model_digest=ended.model_digest)
            case events.RunStopped():
                facts["stopped"] = True
            case events.RunFailed() as failed:
                facts["failed"] = failed.reason
            case _:
                pass
    return History([rows[number] for number in sorted(rows)], metric), facts
