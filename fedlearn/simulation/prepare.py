"""What is asked for and what a run folder says, put together: everything that a simulation needs before its first round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn.app import App, load_app
from fedlearn.data.population import build_population
from fedlearn.errors import StudyError
from fedlearn.learning.combine import check_combination
from fedlearn.meter import span
from fedlearn.simulation.backends import check_backend
from fedlearn.simulation.profile import DATA
from fedlearn.simulation.workspace import Recorded, Setting
from fedlearn.study import Study, load_study
from fedlearn.tasks import task_of

if TYPE_CHECKING:
    from fedlearn.learning.population import Population
    from fedlearn.learning.strategy import Strategy


@dataclass(frozen=True)
class Ready:
    """A study with its data, ready to be run.

    Args:
        study: overrides applied.
        population: everybody's data.
        strategy: both rules.
        setting: where the data and the app are, and what the run is done on.
    """

    study: Study
    population: Population = field(repr=False)
    strategy: Strategy
    setting: Setting


@dataclass(frozen=True)
class Request:
    """What somebody asks for; see `fedlearn.simulate`."""

    study: Study | Path | str | None = None
    rounds: int | None = None
    overrides: Sequence[str] = ()
    data: Path | str | None = None
    app: App | Path | str | None = None
    device: str | None = None
    backend: str | None = None
    resume: Path | str | None = None

    def setting(self, recorded: Recorded | None) -> Setting:
        """As asked for; on a resumed run, else as it was started."""
        root = self.app.root if isinstance(self.app, App) else self.app
        asked = {
            "data": None if self.data is None else str(Path(self.data).resolve()),
            "app": None if root is None else str(Path(root).resolve()),
            "device": self.device,
            "backend": self.backend,
        }
        base = Setting() if recorded is None else recorded.setting
        return replace(base, **{key: value for key, value in asked.items() if value is not None})

    def ready(self) -> Ready:
        """Read, check and load everything.

        Raises:
            FedlearnError: the study, its data, their combination or the run folder is refused.
        """
        recorded = None if self.resume is None else Recorded.read(Path(self.resume))
        setting = self.setting(recorded)
        app = self.app if isinstance(self.app, App) else load_app(setting.app)
        study = self._study(app, recorded)
        strategy = app.strategy(study.strategy.name, study.strategy.options)
        check_backend(setting.backend)
        check_combination(study, strategy)
        with span(DATA):
            task = task_of(study)
            population = build_population(study, task, None if setting.data is None else Path(setting.data))
        return Ready(study, population, strategy, setting)

    def _study(self, app: App, recorded: Recorded | None) -> Study:
        extra = (*self.overrides, *([f"rounds={self.rounds}"] if self.rounds is not None else []))
        asked: Any = self.study
        if asked is None:
            if recorded is None:
                raise StudyError("no study given", hint="name a study file, or a run folder to resume")
            asked = recorded.study
        if not isinstance(asked, Study):
            study = load_study(app.study(str(asked)), extra)
        else:
            study = asked.with_overrides(extra) if extra else asked
        if recorded is not None:
            recorded.check_same(study)
        return study
