"""A client whose code raises: who it is, which rows it has, and where it happened; the round goes on without it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedlearn.errors import StateError, WorkerCrashedError
from fedlearn.learning.backend import Failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedlearn.learning.backend import Backend, Fitted, Scored, Summed, Work
    from fedlearn.learning.population import Population

TRAIN, EVALUATE = "train", "evaluate"
FOLDER: Final = "errors"
MAX_FILES: Final = 100
"""Of a run; what raises more often than that raises the same thing."""
MAX_ROWS: Final = 200
"""Row numbers that a report names; it says how many there are."""
SHOWN_LINES: Final = 12

log = logging.getLogger("fedlearn.simulation")


@dataclass(frozen=True)
class ClientFailure:
    """One client's code raised.

    Args:
        client: its id.
        round: of the model that it worked on.
        exchange: "train" or "evaluate".
        reason: the exception in one line.
        trace: the traceback.
        rows: the client's row numbers in the population's examples, the first `MAX_ROWS` of them.
        row_count: how many there are.
        file: where the report was written; None without a run folder, and beyond `MAX_FILES`.
    """

    client: str
    round: int
    exchange: str
    reason: str
    trace: str = field(repr=False)
    rows: tuple[int, ...] = field(repr=False)
    row_count: int
    file: Path | None = None

    @property
    def inline_round(self) -> int:
        """The round that starts from the model which the client worked on."""
        return self.round + (self.exchange == EVALUATE)

    def report(self) -> str:
        """Everything that is known, as text."""
        more = f", and {self.row_count - len(self.rows)} more" if self.row_count > len(self.rows) else ""
        return (
            f"client    {self.client}\nround     {self.round}\nexchange  {self.exchange}\nraised    {self.reason}\n"
            f"rows      {self.row_count}: {json.dumps(self.rows)[1:-1]}{more}\n\n{self.trace}"
        )

    def excerpt(self) -> str:
        """The end of the traceback, where the user's own code is: `SHOWN_LINES` lines at the most."""
        return "\n".join(self.trace.rstrip().splitlines()[-SHOWN_LINES:])


class ReportingBackend:
    """A backend whose clients' exceptions are written down.

    Args:
        inner: does the work.
        population: knows whose rows are whose.
        folder: the run folder; None writes no file.
        strict: end the run at the first exception.
        told: takes each failure; None logs it.
    """

    def __init__(
        self,
        inner: Backend,
        population: Population,
        folder: Path | None,
        *,
        strict: bool = False,
        told: Callable[[ClientFailure], None] | None = None,
    ) -> None:
        self._inner, self._population, self._strict = inner, population, strict
        self._folder = None if folder is None else folder / FOLDER
        self._told = told if told is not None else _log
        self._files = 0 if self._folder is None or not self._folder.is_dir() else len(list(self._folder.iterdir()))

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        return self._inner.clients(at_least, timeout_s)

    def fit(self, work: Work) -> Iterator[Fitted | Summed | Failed]:
        for reply in self._inner.fit(work):
            yield self._looked_at(work, reply, TRAIN) if isinstance(reply, Failed) and reply.trace else reply

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        for reply in self._inner.evaluate(work):
            yield self._looked_at(work, reply, EVALUATE) if isinstance(reply, Failed) and reply.trace else reply

    def close(self) -> None:
        self._inner.close()

    def _looked_at(self, work: Work, reply: Failed, exchange: str) -> Failed:
        rows = self._population.rows.get(reply.client, ())
        failure = self._written(
            ClientFailure(
                reply.client,
                work.round,
                exchange,
                reply.reason,
                reply.trace,
                tuple(int(row) for row in rows[:MAX_ROWS]),
                len(rows),
            )
        )
        self._told(failure)
        where = "" if failure.file is None else f" (traceback in {failure.file})"
        if self._strict:
            raise WorkerCrashedError(
                f"client {reply.client!r} raised in round {work.round}: {reply.reason}{where}",
                hint=f"--inline {reply.client} --round {failure.inline_round} runs it under a debugger",
            )
        return replace(reply, reason=f"{reply.reason}{where}")

    def _written(self, failure: ClientFailure) -> ClientFailure:
        if self._folder is None or self._files >= MAX_FILES:
            return failure
        # A client id may hold anything: the file's name says who it is as far as a name can.
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", failure.client)[:60]
        if plain != failure.client:
            plain += "-" + hashlib.sha256(failure.client.encode()).hexdigest()[:8]
        file = self._folder / f"round-{failure.round:04d}-{failure.exchange}-{plain}.txt"
        try:
            self._folder.mkdir(exist_ok=True)
            file.write_text(failure.report(), encoding="utf-8")
        except OSError as error:
            raise StateError(
                f"run folder: {file} cannot be written: {error.strerror or error}",
                hint="free some space; the run can be resumed",
            ) from None
        self._files += 1
        return replace(failure, file=file)


def _log(failure: ClientFailure) -> None:
    log.error("round %d: client %s raised\n%s", failure.round, failure.client, failure.excerpt())
