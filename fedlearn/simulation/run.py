"""`fedlearn.simulate`: a whole federation in this process."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn import events
from fedlearn.app import App, load_app
from fedlearn.clock import SystemClock
from fedlearn.data.population import build_population
from fedlearn.release.journal import DictJournal
from fedlearn.report.folder import RunFolder
from fedlearn.report.history import History
from fedlearn.study import Study, load_study
from fedlearn.tasks import load_task

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Arrays
    from fedlearn.learning.federation import Outcome
    from fedlearn.learning.task import Population, Task


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation gives.

    Args:
        study: what was run, overrides applied.
        outcome: the server's state and the recorded history.
        seconds: wall time of the rounds.
    """

    study: Study
    outcome: Outcome = field(repr=False)
    seconds: float
    task: Task = field(repr=False)

    @cached_property
    def history(self) -> History:
        """A table, one row a round."""
        return History(self.outcome.history, self.task.card.metric)

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
        return RunFolder(Path(folder)).save(self.study, self.weights, self.history, manifest(self.study, self.seconds))

    def plot(self, path: Path | str | None = None) -> Any:
        """The learning curve as a matplotlib figure; saved as PNG where a path is given."""
        return self.history.plot(path, title=self.study.name)


def simulate(
    study: Study | Path | str,
    *,
    rounds: int | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    data: Path | str | None = None,
    app: App | Path | str | None = None,
    device: str = "cpu",
    emit: events.Emit | None = None,
) -> SimulationResult:
    """Run a study with all its clients in this process. Seeded, hence reproducible, hence not private.

    Args:
        study: a study, or the path of its TOML file (as it stands, or among the app's own studies).
        rounds: overrides the study's.
        overrides: `key=value` strings, such as "strategy.name=fedprox".
        data: everybody's data in one file, in place of what ships with the task.
        app: a folder with tasks of your own, or a loaded app.
        device: `auto`, `cpu` or `cuda:N`.
        emit: takes events as they happen.

    Raises:
        FedlearnError: the study, its data or its combination of settings is refused, or the run failed.

    Example:
        >>> result = simulate("simulations/heart.toml", rounds=2)
        >>> len(result.history)
        2
    """
    loaded = app if isinstance(app, App) else load_app(app)
    extra = (*overrides, *([f"rounds={rounds}"] if rounds is not None else []))
    if not isinstance(study, Study):
        study = load_study(loaded.study(str(study)), tuple(extra))
    elif extra:
        study = study.with_overrides(extra)
    task = load_task(study.task.name, study.task.options)
    population = build_population(study, task, None if data is None else Path(data))
    return simulate_population(study, population, app=loaded, device=device, emit=emit)


def simulate_population(
    study: Study,
    population: Population,
    *,
    app: App | None = None,
    device: str = "cpu",
    emit: events.Emit | None = None,
) -> SimulationResult:
    """Run a study on data that is in memory already; see `simulate`."""
    import torch

    from fedlearn.learning.device import resolve_device
    from fedlearn.learning.federation import Federation
    from fedlearn.learning.local import initial_weights
    from fedlearn.simulation.sequential import SequentialBackend

    app = app if app is not None else load_app()
    strategy = app.strategy(study.strategy.name, study.strategy.options)
    threads = torch.get_num_threads()
    torch.set_num_threads(study.runtime.threads)
    started = time.monotonic()
    try:
        backend = SequentialBackend(study, population, strategy, resolve_device(device))
        federation = Federation(
            study,
            study.name,
            strategy,
            initial_weights(population.task, study),
            backend,
            DictJournal(),
            metric=population.task.card.metric,
            emit=emit if emit is not None else _ignore,
            may_join=False,
        )
        outcome = federation.run()
        backend.close()
    finally:
        torch.set_num_threads(threads)
    return SimulationResult(study, outcome, time.monotonic() - started, population.task)


def manifest(study: Study, seconds: float) -> dict[str, Any]:
    """What made a run: versions, seed, threads and the time it took. Equal manifests promise equal bytes."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "flwr")}
    return {
        "fedlearn": _own_version(),
        "python": platform.python_version(),
        **versions,
        "seed": study.seed,
        "threads": study.runtime.threads,
        "study_sha256": study.digest,
        "mode": "seeded (not private)",
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(SystemClock().wall())),
        "study": json.loads(study.to_json()),
    }


def _own_version() -> str:
    from fedlearn import __version__

    return __version__


def _ignore(event: events.Event) -> None:
    """Nobody listens."""
