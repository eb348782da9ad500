"""The Flower ServerApp: the round loop over a grid, the same under our coordinator and on stock Flower."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.serverapp import ServerApp

from fedlearn import events
from fedlearn.app import app_of
from fedlearn.arrays import to_bytes
from fedlearn.clock import SystemClock
from fedlearn.errors import RunFailedError, StudyError
from fedlearn.learning.messages import RequestEncoder
from fedlearn.privacy.study import plan_of
from fedlearn.release.journal import DictJournal
from fedlearn.report.folder import RunFolder
from fedlearn.report.history import History
from fedlearn.simulation.run import manifest
from fedlearn.study import load_study, parse_study
from fedlearn.tasks import task_of
from server.rounds import GridBackend

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from fedlearn.arrays import Arrays
    from fedlearn.learning.federation import Federation, Outcome
    from fedlearn.learning.runtime import RunRuntime
    from fedlearn.learning.secure_sum import SecureRounds
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Task
    from fedlearn.release.journal import Journal
    from fedlearn.study import Study

app = ServerApp()
log = logging.getLogger("fedlearn.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study to its end.

    Under our coordinator `grid.runtime` lends a journal, an event sink and the submitted study. On stock Flower the study
    is named in the run's config (`study`, `overrides`), events go to the log, and nothing outlives the process.
    """
    import torch

    from fedlearn.learning.federation import Federation
    from fedlearn.learning.local import initial_weights
    from fedlearn.link.grid import LinkGrid

    runtime: RunRuntime | None = getattr(grid, "runtime", None)
    study = _study(runtime, context)
    if study.environment is not None:
        log.warning("study %s: its [environment] is for simulations and is ignored; these clients are real", study.name)
    run = runtime.run_id if runtime is not None else f"flower-{context.run_id}"
    torch.set_num_threads(study.runtime.threads)
    task = task_of(study)
    own = app_of(__file__)
    backend = GridBackend(
        grid,
        RequestEncoder(run, study.to_json(), own.digest, model_with_shares=isinstance(grid, LinkGrid)),
        client_name=runtime.client_name if runtime is not None else None,
        heads=runtime.heads if runtime is not None else None,
        emit=runtime.emit if runtime is not None else _log_event,
    )
    strategy = own.strategy(study.strategy.name, study.strategy.options)
    initial = initial_weights(task, study)
    journal = runtime.journal if runtime is not None else DictJournal()
    authority = str(context.run_config.get("authority", ""))
    authority_pem = runtime.authority_pem if runtime is not None else Path(authority).read_bytes() if authority else b""
    federation = Federation(
        study,
        run,
        strategy,
        initial,
        backend,
        journal,
        metric=task.card.metric,
        emit=runtime.emit if runtime is not None else _log_event,
        should_stop=runtime.should_stop if runtime is not None else lambda: False,
        secure=_secure(study, run, strategy, initial, backend, journal, authority_pem),
    )
    clock = SystemClock()
    started_s = clock.monotonic()
    try:
        outcome = federation.run()
    except RunFailedError:
        _close(study, federation, backend, runtime)
        raise
    _close(study, federation, backend, runtime)
    if runtime is not None and not outcome.stopped:
        runtime.checkpoints.finish(to_bytes(outcome.state.model), {"study": study.to_json()})
    elif runtime is None:
        _save_beside(context, study, task, outcome, clock.monotonic() - started_s)


def _close(study: Study, federation: Federation, backend: GridBackend, runtime: RunRuntime | None) -> None:
    """Where sites were charged for a whole run and not all of it took place, give them this end's word for what did."""
    if runtime is None or runtime.closing is None or study.privacy is None or study.privacy.unit != "client":
        return
    plan = plan_of(study)
    if plan is not None and plan.central and plan.matrix is None and federation.attempts < plan.rounds:
        backend.tell_end(runtime.closing(federation.attempts))


def _secure(
    study: Study,
    run: str,
    strategy: Strategy,
    initial: Arrays,
    backend: GridBackend,
    journal: Journal,
    authority_pem: bytes,
) -> SecureRounds | None:
    """The rounds' masks where the study asks for them. Clients are whom the authority certifies; without one, whoever says so."""
    if not study.secure_aggregation.enabled:
        return None
    from fedlearn.learning.masked import MaskedRounds
    from fedlearn.link.enrolment import CertificateEnrolment
    from fedlearn.secagg.enrolment import Declared

    enrolment = CertificateEnrolment(authority_pem) if authority_pem else Declared()
    return MaskedRounds(study, run, strategy, initial, backend, journal, enrolment)


def _study(runtime: RunRuntime | None, context: Context) -> Study:
    if runtime is not None:
        return parse_study(runtime.study_text, runtime.overrides)
    name = context.run_config.get("study")
    if not isinstance(name, str):
        raise StudyError("run config: no 'study'", hint="flwr run . --run-config 'study=\"simulations/heart.toml\"'")
    return load_study(app_of(__file__).study(name), tuple(shlex.split(str(context.run_config.get("overrides", "")))))


def _log_event(event: events.Event) -> None:
    log.warning("%s", events.to_json(event, SystemClock().wall()))


def _save_beside(context: Context, study: Study, task: Task, outcome: Outcome, seconds: float) -> None:
    """On stock Flower: write the run folder that the run's config names as `out`, if it does."""
    if folder := str(context.run_config.get("out", "")):
        history = History(outcome.history, task.card.metric)
        facts = manifest(study, seconds) | {
            "runtime": "stock Flower: a rehearsal, nothing was enforced at the sites",
            "privacy": outcome.privacy,
        }
        RunFolder(Path(folder)).save(study, outcome.state.model, history, facts)
