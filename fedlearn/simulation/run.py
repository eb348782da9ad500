"""`fedlearn.simulate`: a whole federation in this process."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn import events
from fedlearn.app import App, load_app
from fedlearn.clock import SystemClock
from fedlearn.errors import RunFailedError, StudyError
from fedlearn.meter import measuring
from fedlearn.release.journal import DictJournal
from fedlearn.report.folder import PROFILE, RunFolder
from fedlearn.report.history import History
from fedlearn.simulation.backends import make_backend
from fedlearn.simulation.failures import ReportingBackend
from fedlearn.simulation.prepare import Ready, Request
from fedlearn.simulation.profile import MeasuredBackend, MeasuredEvents, MeasuredJournal, Profile
from fedlearn.simulation.states import ClientStates
from fedlearn.simulation.workspace import Setting, Workspace, made_with, mark_of
from fedlearn.study import Study

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Backend
    from fedlearn.learning.federation import Outcome
    from fedlearn.learning.population import Population
    from fedlearn.learning.task import Task
    from fedlearn.release.journal import Journal
    from fedlearn.simulation.failures import ClientFailure


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation gives.

    Args:
        study: what was run, overrides applied.
        outcome: the server's state and the recorded history.
        seconds: wall time of the rounds that were run here.
        task: what was learnt.
        profile: where the time went, if that was asked for.
    """

    study: Study
    outcome: Outcome = field(repr=False)
    seconds: float
    task: Task = field(repr=False)
    profile: Profile | None = None

    @cached_property
    def history(self) -> History:
        """A table, one row a round."""
        return History(self.outcome.history, self.task.card.metric)

    @property
    def stopped(self) -> bool:
        """True when the run was stopped before its last round."""
        return self.outcome.stopped

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        """What was released, with its epsilon in all its meaning (`fedlearn.privacy.statement.statement`); None without [privacy].

        A simulation is seeded: its `epsilon` is the text "not private", and `rehearsed_epsilon` what a private run of it would cost.
        """
        return self.outcome.privacy

    @property
    def weights(self) -> Arrays:
        """The final global weights by name."""
        return self.outcome.state.model

    @cached_property
    def model(self) -> torch.nn.Module:
        """The final global model, in evaluation mode."""
        from fedlearn.learning.local import set_weights
        from fedlearn.learning.task import build_model

        model = build_model(self.task, self.study.seed)
        if self.study.train.precision == "float64":
            model = model.double()
        set_weights(model, self.weights)
        return model.eval()

    def save(self, folder: Path | str) -> Path:
        """Write everything into a run folder: study, history, plot, model, versions. Returns the folder."""
        return RunFolder(Path(folder)).save(
            self.study,
            self.weights,
            self.history,
            manifest(self.study, self.seconds) | {"stopped": self.stopped, "privacy": self.privacy},
        )

    def plot(self, path: Path | str | None = None) -> Any:
        """The learning curve as a matplotlib figure; saved as PNG where a path is given."""
        return self.history.plot(path, title=self.study.name)


def simulate(
    study: Study | Path | str | None = None,
    *,
    rounds: int | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    data: Path | str | None = None,
    app: App | Path | str | None = None,
    device: str | None = None,
    backend: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    strict: bool = False,
    profile: bool = False,
    emit: events.Emit | None = None,
    told: Callable[[ClientFailure], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SimulationResult:
    """Run a study with all its clients in this process. Seeded, hence reproducible, hence not private.

    Args:
        study: a study, or the path of its TOML file (as it stands, or among the app's own studies). None with `resume`.
        rounds: overrides the study's.
        overrides: `key=value` strings, such as "strategy.name=fedprox".
        data: everybody's data in one file, in place of what ships with the task.
        app: a folder with tasks of your own, or a loaded app.
        device: `auto`, `cpu` or `cuda:N`; None for cpu.
        backend: how clients are trained, see `fedlearn.simulation.backends`; None for `auto`.
        workers: of the backend; None for as many as there are cores. Results do not depend on it.
        address: of a running Ray cluster, for the backend `ray`; None starts Ray on this machine.
        out: a run folder: rounds are kept there as they are committed, and the results in the end.
        resume: the run folder of a run that was stopped or died: goes on after its last committed round, to the bytes that it
            would have ended with. A run that is finished gives its result again; with more `rounds` it goes on.
        strict: a client whose code raises ends the run; else the round goes on without it.
        profile: measure where the time goes.
        emit: takes events as they happen.
        told: takes what clients raise; None logs it.
        should_stop: asked between rounds; a run that is stopped can be resumed.

    Raises:
        FedlearnError: the study, its data or its combination of settings is refused, or the run failed.

    Example:
        >>> result = simulate("simulations/heart.toml", rounds=2)
        >>> len(result.history)
        2
    """
    with ExitStack() as stack:
        meter = stack.enter_context(measuring()) if profile else None
        ready = Request(study, rounds, overrides, data, app, device, backend, resume).ready()
        heard = emit if emit is not None else _ignore
        counted = None if meter is None else MeasuredEvents(meter, heard)
        manner = Manner(workers, address, strict, counted or heard, told, should_stop, measured=profile)
        place = resume if resume is not None else out
        if place is None:
            result = run_ready(ready, manner)
        else:
            folder = RunFolder(Path(place))
            mark = mark_of(ready.population)
            work = stack.enter_context(Workspace(folder.path, ready.study, ready.setting, mark, fresh=resume is None))
            result = run_ready(ready, manner, work.journal, folder.path)
            result.save(folder.path)
        if meter is not None and counted is not None:
            measured = Profile.of(meter, counted)
            result = replace(result, profile=measured)
            if place is not None:
                folder.add(PROFILE, measured.to_dict())
    return result


def simulate_population(
    study: Study,
    population: Population,
    *,
    app: App | None = None,
    device: str = "cpu",
    backend: str = "auto",
    emit: events.Emit | None = None,
) -> SimulationResult:
    """Run a study on data that is in memory already; see `simulate`."""
    app = app if app is not None else load_app()
    strategy = app.strategy(study.strategy.name, study.strategy.options)
    ready = Ready(study, population, strategy, Setting(device=device, backend=backend))
    return run_ready(ready, Manner(emit=emit if emit is not None else _ignore))


def _ignore(event: events.Event) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Manner:
    """How a run is run, whatever the study: see `simulate`."""

    workers: int | None = None
    address: str | None = None
    strict: bool = False
    emit: events.Emit = _ignore
    told: Callable[[ClientFailure], None] | None = None
    should_stop: Callable[[], bool] = lambda: False
    measured: bool = False


def run_ready(
    ready: Ready, manner: Manner, journal: Journal | None = None, folder: Path | None = None
) -> SimulationResult:
    """Run what is ready; on a journal with committed rounds, those that are left.

    Args:
        ready: what to run.
        manner: how.
        journal: keeps rounds and clients' memories; None keeps them in this process.
        folder: for reports of what clients raise.
    """
    import torch

    from fedlearn.learning.device import resolve_device
    from fedlearn.learning.federation import Federation
    from fedlearn.learning.local import initial_weights
    from fedlearn.simulation.masked import secure_rounds
    from fedlearn.simulation.virtual import EnvironmentBackend

    study, population = ready.study, ready.population
    _check_cohort(study, len(population.client_ids))
    if journal is not None and manner.measured:
        journal = MeasuredJournal(journal)
    threads = torch.get_num_threads()
    torch.set_num_threads(study.runtime.threads)
    started = time.monotonic()
    try:
        backend: Backend = make_backend(
            ready.setting.backend,
            study,
            population,
            ready.strategy,
            device=resolve_device(ready.setting.device),
            workers=manner.workers,
            memories=ClientStates(journal),
            address=manner.address,
        )
        backend = ReportingBackend(backend, population, folder, strict=manner.strict, told=manner.told)
        if manner.measured:
            backend = MeasuredBackend(backend)
        world: EnvironmentBackend | None = None
        if study.environment is not None:
            backend = world = EnvironmentBackend(backend, study, study.environment, population, ready.strategy)
        journal = journal if journal is not None else DictJournal()
        initial = initial_weights(population.task, study)
        with closing(backend):
            federation = Federation(
                study,
                study.name,
                ready.strategy,
                initial,
                backend,
                journal,
                metric=population.task.card.metric,
                emit=manner.emit,
                should_stop=manner.should_stop,
                may_join=False,
                rehearsal=True,
                conditions=world,
                secure=secure_rounds(study, ready.strategy, initial, backend, journal, len(population.client_ids)),
            )
            try:
                outcome = federation.run()
            except RunFailedError as error:
                if folder is not None and federation.kept is not None:
                    kept = SimulationResult(study, federation.kept, time.monotonic() - started, population.task)
                    _keep(kept, folder, error)
                raise
    finally:
        torch.set_num_threads(threads)
    return SimulationResult(study, outcome, time.monotonic() - started, population.task)


def _keep(result: SimulationResult, folder: Path, error: RunFailedError) -> None:
    """Save what a run that failed has committed, and say where."""
    rounds = len(result.history)
    where = "no round was committed, so there is no model"
    if rounds:
        facts = manifest(result.study, result.seconds) | {"failed": error.message, "privacy": result.privacy}
        RunFolder(folder).save(result.study, result.weights, result.history, facts)
        where = f"the model of round {rounds}, the last that was committed, is in {folder}"
    error.hint = "; ".join(filter(None, [error.hint, where]))


def _check_cohort(study: Study, clients: int) -> None:
    """In a simulation nobody else can come: a cohort that is too large will never be full."""
    for key, asked in (("cohort.size", study.cohort.size), ("cohort.minimum", study.cohort.minimum)):
        if asked is not None and asked > clients:
            raise StudyError(
                f"{key}: got {asked}, this study has {clients} clients",
                hint=f"{key} may be up to {clients}; a partition makes more clients with data.clients",
            )


def manifest(study: Study, seconds: float) -> dict[str, Any]:
    """What made a run: versions, seed, threads and the time it took. Equal manifests promise equal bytes."""
    return {
        **made_with(),
        "flwr": importlib.metadata.version("flwr"),
        "seed": study.seed,
        "threads": study.runtime.threads,
        "study_sha256": study.digest,
        "mode": "seeded (not private)",
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(SystemClock().wall())),
        "study": json.loads(study.to_json()),
    }
