"""A run as it is stored, and where it can stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Final


@unique
class RunStatus(Enum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True when the run will never go on."""
        return not RUN_TRANSITIONS[self]


RUN_TRANSITIONS: Final[Mapping[RunStatus, frozenset[RunStatus]]] = {
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.STOPPED}),
    RunStatus.RUNNING: frozenset({RunStatus.FINISHED, RunStatus.STOPPED, RunStatus.FAILED}),
    RunStatus.FINISHED: frozenset(),
    RunStatus.STOPPED: frozenset(),
    RunStatus.FAILED: frozenset(),
}


@dataclass(frozen=True)
class RunRow:
    """One run as it is stored. Times are seconds since 1970-01-01 UTC."""

    run: str
    name: str
    status: RunStatus
    study: str = field(repr=False)
    overrides: tuple[str, ...]
    round: int
    rounds: int
    submitted_at: float
    ended_at: float | None
    submitter: str
    reason: str
    stop_asked: bool
