"""A sweep: a grid of studies in one folder, as many at a time as there are cores; what is finished is never run again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedlearn.errors import StateError
from fedlearn.report.folder import MANIFEST
from fedlearn.report.runs import CELLS
from fedlearn.simulation.crew import Crew
from fedlearn.simulation.workspace import RUN, Recorded

if TYPE_CHECKING:
    from fedlearn.simulation.grid import Cell
    from fedlearn.simulation.workspace import Setting

LOG: Final = "workers.log"


class CellStatus(StrEnum):
    """How a cell stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class CellState:
    """A cell and how far it is.

    Args:
        cell: its values and study.
        folder: its run folder.
        status: how it stands.
        round: rounds done.
        reason: why it failed.
        scored: the last score in words, once it is there.
        skipped: True when it was finished before this sweep began.
        hint: what to do about a failure.
    """

    cell: Cell
    folder: Path
    status: CellStatus = CellStatus.WAITING
    round: int = 0
    reason: str = ""
    scored: str = ""
    skipped: bool = False
    hint: str = field(default="", repr=False)


def is_finished(folder: Path, digest: str) -> bool:
    """Whether a run folder holds the results of a study with this digest."""
    try:
        facts = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.get("study_sha256") == digest and not facts.get("stopped")


class Sweep:
    """A grid's cells, each with a run folder of its own.

    Args:
        cells: what to run.
        folder: of the sweep; made when missing.
        setting: of every run.
        at_once: processes; None for as many as there are cores.

    Raises:
        StateError: the folder cannot be made.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path, setting: Setting, at_once: int | None = None) -> None:
        self.folder, self._setting = folder, setting
        try:
            (folder / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"sweep folder {folder}: cannot be made: {error.strerror}", hint="choose another folder with --out"
            ) from None
        self.states = [CellState(cell, folder / CELLS / cell.folder) for cell in cells]
        for state in self.states:
            self._look(state)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.at_once = max(1, min(at_once or cores, len(self.to_do)))
        self._threads = max(1, cores // self.at_once)

    def _look(self, state: CellState) -> None:
        """What the folder says of an earlier try."""
        if not (state.folder / RUN).exists():
            return
        was, now = Recorded.read(state.folder).setting, self._setting
        other = [f"{key} {getattr(was, key)}" for key in ("data", "app") if getattr(was, key) != getattr(now, key)]
        if other:
            state.status, state.reason = CellStatus.FAILED, f"its run folder is of another run: {', '.join(other)}"
            state.hint = "choose another folder with --out"
        elif is_finished(state.folder, state.cell.study.digest):
            state.status, state.round, state.skipped = CellStatus.FINISHED, state.cell.study.rounds, True

    @property
    def to_do(self) -> list[CellState]:
        """The cells that may still run."""
        return [state for state in self.states if state.status not in {CellStatus.FINISHED, CellStatus.FAILED}]

    @property
    def failed(self) -> list[CellState]:
        """The cells that failed."""
        return [state for state in self.states if state.status is CellStatus.FAILED]

    @property
    def rounds_left(self) -> int:
        """Of all cells that may still run."""
        return sum(state.cell.study.rounds - state.round for state in self.to_do)

    def run(self, changed: Callable[[CellState], None], should_stop: Callable[[], bool] = lambda: False) -> None:
        """Run what is to do. A cell that fails is one cell less.

        Args:
            changed: told of a cell whenever it has moved on.
            should_stop: asked all the time; the rounds under way are finished then.
        """

        def take(index: int, message: Mapping[str, Any]) -> None:
            state = self.states[index]
            if message["kind"] == "progress":
                state.status, state.round = CellStatus.RUNNING, int(message["round"])
            else:
                state.status = CellStatus(message["kind"])
                state.reason, state.hint = str(message.get("reason", "")), str(message.get("hint", ""))
                state.scored = str(message.get("scored", ""))
            changed(state)

        with Crew(self.at_once, self.folder / LOG) as crew:
            crew.run(self._jobs(), take, should_stop)

    def _jobs(self) -> Iterator[dict[str, Any]]:
        for index, state in enumerate(self.states):
            if state.status is CellStatus.WAITING:
                yield {
                    "index": index,
                    "study": state.cell.study.to_json(),
                    "folder": str(state.folder.resolve()),
                    "setting": asdict(self._setting),
                    "workers": self._threads,
                }
