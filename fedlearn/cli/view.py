"""What a person sees while a run goes on: rows as rounds end, and on a terminal a bar with the time that is left.

Fed by events alone, so a simulation here and a federation elsewhere look the same.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from fedlearn import events
from fedlearn.cli.output import cell
from fedlearn.cli.progress import duration, plain_progress

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedlearn.simulation.failures import ClientFailure

MOST_ROWS: Final = 40
"""On a terminal a longer run shows every n-th row only; a pipe gets them all."""
REDRAW_S: Final = 0.1
"""Clients may end by the thousand a second; the bar need not know of each."""
MOST_TRACES: Final = 3
"""Tracebacks that are shown; each is in the run folder."""
MOST_OUT: Final = 5
"""Clients that are named as they drop out of a round; of more, how many."""
MOST_REFUSED: Final = 50
"""Clients that are named as they refuse."""
_WIDTHS: Final = (7, 9, 9, 11, 10)


class RunView:
    """Takes events and shows them. A context manager.

    Args:
        rows: print a row a round to standard output.
        bar: None draws a bar where standard error is a terminal.
    """

    def __init__(self, *, rows: bool = True, bar: bool | None = None) -> None:
        self._rows = rows
        self._terminal = sys.stdout.isatty()
        self._bar = sys.stderr.isatty() if bar is None else bar
        self._progress: Progress | None = None
        self._task: Any = None
        self._pending: events.RoundFinished | None = None
        self.started: events.RunStarted | None = None
        self.evaluated: events.Evaluated | None = None
        self.ended: events.RunFinished | events.RunStopped | events.RunFailed | None = None
        self.privacy: Mapping[str, Any] | None = None
        self.opened: events.SumOpened | None = None
        self.rounds_done = 0
        self.round_rows: list[dict[str, Any]] = []
        self._refused: dict[str, str] = {}
        self._trained = self._of_round = self._cohort = self._out = 0
        self._rounds_s = self._drawn_s = 0.0
        self._raised = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        if self._progress is not None:
            self._progress.stop()

    @property
    def metric(self) -> str:
        """The task's primary metric."""
        return self.started.metric if self.started is not None else "metric"

    @property
    def clients_per_s(self) -> float:
        """Local trainings a second of the rounds that ended."""
        return self._trained / self._rounds_s if self._rounds_s > 0 else 0.0

    def client_raised(self, failure: ClientFailure) -> None:
        """Show where a client's code raised; only the first few times, since the others are much the same."""
        self._raised += 1
        if self._raised <= MOST_TRACES:
            self._aside(f"client {failure.client} raised in round {failure.round} ({failure.exchange}):")
            self._aside("\n".join(f"  {line}" for line in failure.excerpt().splitlines()))

    def take(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.RunStarted():
                self._start(event)
            case events.PrivacyStated():
                self.privacy = event.statement
            case events.SumOpened():
                self.opened = event
            case events.RoundStarted():
                self._flush()
                self._of_round, self._cohort, self._out = 0, event.cohort_size, 0
                if event.attempt > 1:
                    self._line(f"  round {event.round}: attempt {event.attempt}")
            case events.ClientFinished():
                self._of_round += 1
                self._advance(seldom=True)
            case events.ClientDropped():
                self._of_round += 1
                self._out += not event.virtual  # the row counts those
                if event.refused:
                    self._refuse(event.client, event.reason, f"refused in round {event.round}")
                elif self._out <= MOST_OUT and not event.virtual:
                    self._line(f"  round {event.round}: {event.client} is out: {indented(event.reason, 4)}")
            case events.ClientRefused():
                self._refuse(event.client, event.reason, "refused" if event.final else "not taking part yet")
            case events.RunWaiting():
                self._line(
                    f"  waiting for clients: {event.here} of {event.needed} are here, {duration(event.left_s)} are left for the others"
                )
            case events.RoundVoid():
                self._line(f"  round {event.round}: void: {event.reason}")
            case events.RoundFinished():
                self._flush()
                if self._out > MOST_OUT:
                    self._line(f"  round {event.round}: {self._out - MOST_OUT} more are out")
                self._pending, self.rounds_done = event, event.round
                self._of_round = 0
                self._trained += event.clients
                self._rounds_s += event.seconds
                self._advance()
            case events.Evaluated():
                self.evaluated = event
                self._advance()
                if self._pending is not None and self._pending.round == event.round:
                    self._flush(event.mean)
            case events.RunFinished() | events.RunStopped() | events.RunFailed():
                self._flush()
                self.ended = event
            case _:
                pass

    def _refuse(self, client: str, reason: str, how: str) -> None:
        """Name who does not take part, once for each of its reasons."""
        if self._refused.get(client) == reason:
            return
        self._refused[client] = reason
        if len(self._refused) <= MOST_REFUSED:
            self._line(f"  {how}: {client}: {indented(reason, 4)}")

    def _start(self, event: events.RunStarted) -> None:
        again = self.started is not None
        self.started, self.rounds_done = event, event.rounds_done
        if self._bar and self._progress is None:
            self._progress = plain_progress()
            self._progress.start()
            self._task = self._progress.add_task(event.study, total=event.rounds, note="")
        self._advance()
        if again:
            self._line(f"  resumed after round {event.rounds_done}")
            return
        self._line(f"{event.study}: {event.population} clients, {event.rounds} rounds, {event.parameters} parameters")
        if self.privacy is not None:
            from fedlearn.privacy.statement import lines

            for line in lines(self.privacy):
                self._line(line)
        self._line(_row("round", "clients", "seconds", "train loss", event.metric))

    def _advance(self, *, seldom: bool = False) -> None:
        now = time.monotonic()
        if self._progress is None or (seldom and now - self._drawn_s < REDRAW_S):
            return
        self._drawn_s = now
        value = self.evaluated.mean.get(self.metric, math.nan) if self.evaluated is not None else math.nan
        shown = "" if math.isnan(value) else f"{self.metric} {value:.4f}"
        speed = f"{self.clients_per_s:.3g} clients/s" if self._rounds_s else ""
        # A round that is under way counts for as much of it as is done: a long one moves the bar and the time left too.
        part = min(self._of_round / self._cohort, 1.0) if self._cohort else 0.0
        rounds = "" if self.started is None else f"{self.rounds_done}/{self.started.rounds}"
        note = "  ".join(filter(None, [rounds, shown, speed]))
        self._progress.update(self._task, completed=self.rounds_done + part, note=note)

    def _flush(self, mean: Mapping[str, float] | None = None) -> None:
        done, self._pending = self._pending, None
        if done is None:
            return
        value = None if mean is None else mean.get(self.metric)
        self.round_rows.append(
            {
                "round": done.round,
                "clients": done.clients,
                "dropped": done.dropped,
                "attempt": done.attempt,
                "seconds": done.seconds,
                "train_loss": done.train_loss,
                "update_norm": done.update_norm,
                **done.environment,
                **(dict(mean) if mean is not None else {}),
            }
        )
        rounds = self.started.rounds if self.started is not None else done.round
        every = -(-rounds // MOST_ROWS) if self._terminal else 1
        if done.round % every == 0 or done.round in {1, rounds}:
            row = _row(done.round, done.clients, f"{done.seconds:.2f}", done.train_loss, value)
            self._line(row + _world(done.environment))

    def _line(self, text: str) -> None:
        if not self._rows:
            return
        if self._progress is not None and self._terminal:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _aside(self, text: str) -> None:
        """To standard error, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def indented(text: str, spaces: int) -> str:
    """Text whose further lines begin so far in."""
    return text.replace("\n", "\n" + " " * spaces)


def _world(facts: Mapping[str, float]) -> str:
    """What a round would have cost, where a world is simulated."""
    if not facts:
        return ""
    moved = (facts.get("bytes_down", 0) + facts.get("bytes_up", 0)) / 1e6
    words = {"unavailable": "away", "dropouts": "vanished", "stragglers": "late"}
    out = "".join(f", {facts[key]:.0f} {word}" for key, word in words.items() if facts.get(key))
    return f"   {facts.get('virtual_seconds', 0):.4g} s virtual, {moved:.4g} MB{out}"


def _row(*cells: Any) -> str:
    return "".join(cell(value).rjust(width) for value, width in zip(cells, _WIDTHS, strict=True))
