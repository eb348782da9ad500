"""`--profile`: where a simulation's time went, in seconds by part, measured at the round loop's seams."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fedlearn import events
from fedlearn.meter import OTHER, Meter, span, spanned

if TYPE_CHECKING:
    from fedlearn.learning.backend import Backend, Failed, Fitted, Scored, Summed, Work
    from fedlearn.release.journal import Changes, Journal

DATA, TRAINING, SUMMING, EVALUATION, CHECKPOINT = "data", "training", "summing", "evaluation", "checkpoint"
PARTS: Final = (DATA, TRAINING, SUMMING, EVALUATION, CHECKPOINT, OTHER)
"""data: reading, splitting, preparing. training: local training. summing: sums and the server's rule. evaluation: scoring.
checkpoint: journal and client memories. other: imports, the first model, plots, everything else."""


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Args:
        seconds: wall seconds by part (`PARTS`).
        clients: local trainings done.
        rounds_s: from the first round's start to the last one's end, evaluation and checkpoints included.
    """

    seconds: dict[str, float]
    clients: int
    rounds_s: float

    @classmethod
    def of(cls, meter: Meter, heard: MeasuredEvents) -> Profile:
        """What a meter shows now."""
        seconds = meter.seconds()
        return cls({part: seconds.get(part, 0.0) for part in PARTS}, heard.clients, heard.rounds_s)

    @property
    def total_s(self) -> float:
        """Wall seconds of everything."""
        return sum(self.seconds.values())

    @property
    def clients_per_s(self) -> float:
        """Local trainings a second of the rounds."""
        return self.clients / self.rounds_s if self.rounds_s > 0 else 0.0

    def table(self) -> list[tuple[str, float, float]]:
        """(part, seconds, percent) of each part, the whole last."""
        whole = self.total_s or 1.0
        rows = [(part, spent, 100 * spent / whole) for part, spent in self.seconds.items()]
        return [*rows, ("total", self.total_s, 100.0)]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "seconds": {part: round(spent, 4) for part, spent, _ in self.table()},
            "percent": {part: round(percent, 2) for part, _, percent in self.table()},
            "clients": self.clients,
            "rounds_s": round(self.rounds_s, 4),
            "clients_per_s": round(self.clients_per_s, 2),
        }


class MeasuredBackend:
    """A backend whose training and evaluation are measured.

    Args:
        inner: does the work.
    """

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        return self._inner.clients(at_least, timeout_s)

    def fit(self, work: Work) -> Iterator[Fitted | Summed | Failed]:
        return spanned(TRAINING, self._inner.fit(work))

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        return spanned(EVALUATION, self._inner.evaluate(work))

    def close(self) -> None:
        self._inner.close()


class MeasuredJournal:
    """A journal whose calls are measured.

    Args:
        inner: keeps the records.
    """

    def __init__(self, inner: Journal) -> None:
        self._inner = inner

    def get(self, key: str) -> bytes | None:
        with span(CHECKPOINT):
            return self._inner.get(key)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        return spanned(CHECKPOINT, self._inner.scan(prefix))

    def write(self, changes: Changes) -> None:
        with span(CHECKPOINT):
            self._inner.write(changes)

    def close(self) -> None:
        with span(CHECKPOINT):
            self._inner.close()


class MeasuredEvents:
    """Counts what is done from a round's start to its end for the sums, but for what is measured by itself within it.

    Args:
        meter: takes the time.
        emit: where the events go.
    """

    def __init__(self, meter: Meter, emit: events.Emit) -> None:
        self._meter, self._emit = meter, emit
        self.clients = 0
        self._began_s = self._ended_s = 0.0

    @property
    def rounds_s(self) -> float:
        """From the first round's start to the last event."""
        return self._ended_s - self._began_s if self._began_s else 0.0

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.RoundFinished | events.RoundVoid):
            self._meter.unwind()
        with self._meter.span(OTHER):
            self._emit(event)
        self._ended_s = time.perf_counter()
        if isinstance(event, events.RoundStarted):
            self._meter.open(SUMMING)
            self._began_s = self._began_s or self._ended_s
        elif isinstance(event, events.ClientFinished):
            self.clients += 1
