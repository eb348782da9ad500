"""Who is there: the clients that a run begins with, and the cohort of each attempt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fedlearn.errors import RunFailedError
from fedlearn.learning.cohort import pick_cohort
from fedlearn.release.keys import AttemptId, record_key

if TYPE_CHECKING:
    from fedlearn.learning.backend import Backend, Failed
    from fedlearn.learning.conditions import Conditions
    from fedlearn.privacy.central import CentralPlan
    from fedlearn.release.journal import Journal
    from fedlearn.study import Study

FIRST = AttemptId(1, 1)
MOST_NAMED: Final = 5
MOST_REASONS: Final = 5
"""Clients of one reason, and reasons, that an error names."""


@dataclass(frozen=True)
class Attendance:
    """Waits for clients and draws cohorts, for one run.

    Args:
        study: says how many it waits for.
        run: its name.
        backend: knows who is here.
        journal: of the run.
        least: fewest clients that the strategy can work with.
        central: draws the cohorts of a client-level plan.
        conditions: of a simulated world, which then draws them; None in the real one.
        may_join: False where nobody else can come.
    """

    study: Study
    run: str
    backend: Backend
    journal: Journal
    least: int
    central: CentralPlan | None
    conditions: Conditions | None
    may_join: bool

    def cohort(self, at: AttemptId) -> tuple[str, ...]:
        """Who is asked in an attempt that begins, sorted.

        Raises:
            RunFailedError: too few clients came.
        """
        if self.conditions is not None:
            return self.conditions.cohort(at)
        clients = self.wait(first=at == FIRST)
        if self.central is not None:
            return self.central.cohort(self._everybody(clients), at)
        return pick_cohort(clients, self.study.cohort.size, self.study.seed, "train", at.round)

    def returned(self) -> Sequence[str]:
        """The clients of a resumed run once those of its first start are back, or have had the time to be; empty in a new run."""
        if (known := self.journal.get(self._place("population"))) is None:
            return ()
        runtime = self.study.runtime
        return self.backend.clients(int(known), min(runtime.wait_s, runtime.deadline_s))

    def wait(self, *, first: bool) -> Sequence[str]:
        """The clients that are here, once they are enough.

        Args:
            first: before the run's first attempt, for which a study may want more of them.

        Raises:
            RunFailedError: they are too few for too long.
        """
        table = self.study.cohort
        needed = least = max(table.minimum, self.least)
        if first and self.may_join:
            planned = self.central.least_clients if self.central is not None else 0
            needed = max(table.wait_for or table.size or 0, least, planned)
        wait_s = self.study.runtime.wait_s
        over = not first and self._out_of_reach(needed)
        clients = self.backend.clients(needed, 0.0 if over else wait_s)
        if len(clients) >= needed:
            return clients
        what = f"{len(clients)} clients {'are left' if over else f'connected within {wait_s:g} s'}"
        refused = getattr(self.backend, "refusals", ())
        raise RunFailedError(
            f"run {self.run}: {what}, needs {needed}" + "".join(f"; refused: {one}" for one in _in_words(refused)),
            hint=_hint(refused),
        )

    def _out_of_reach(self, needed: int) -> bool:
        """Whether so many have refused the rest of this run that it cannot go on, however long it waits for those that took part so far."""
        could_come: int | None = getattr(self.backend, "could_come", None)
        return could_come is not None and could_come < needed

    def population(self, connected: int) -> int:
        """How many clients the study has: settled when the run begins, since server rules depend on it.

        Raises:
            RunFailedError: a client-level plan counts on more.
        """
        place = self._place("population")
        if (known := self.journal.get(place)) is not None:
            return int(known)
        if self.central is not None:
            self.central.check_population(connected)
        opening = {} if self.central is None else self.central.opening()
        self.journal.write({**opening, place: str(connected).encode()})
        return connected

    def _everybody(self, here: Sequence[str]) -> Sequence[str]:
        """All whom a client-level plan counts on: those of the run's beginning. A simulation's are always here.

        Correlated noise counts on nobody: clients come when they can.
        """
        if not self.may_join or (self.central is not None and self.central.ftrl is not None):
            return here
        place = self._place("everybody")
        if (known := self.journal.get(place)) is not None:
            return tuple(json.loads(known))
        self.journal.write({place: json.dumps(list(here)).encode()})
        return here

    def _place(self, what: str) -> str:
        return record_key(what, self.run)


def _in_words(refused: Sequence[Failed]) -> Iterator[str]:
    """Who refused, and why; one reason is said once, and of each its first line: what to do about it was said as it came."""
    by_reason: dict[str, list[str]] = {}
    for one in refused:
        by_reason.setdefault(one.reason.partition("\n")[0], []).append(one.client)
    for reason, clients in list(by_reason.items())[:MOST_REASONS]:
        more = f" and {len(clients) - MOST_NAMED} more" if len(clients) > MOST_NAMED else ""
        yield f"{', '.join(clients[:MOST_NAMED])}{more}: {reason}"
    if len(by_reason) > MOST_REASONS:
        yield f"others, for {len(by_reason) - MOST_REASONS} more reasons"


def _hint(refused: Sequence[Failed]) -> str:
    if not refused:
        return "start the missing clients, or lower cohort.wait_for, cohort.size or cohort.minimum"
    return (
        "what a site refuses is for its operator to change; or start the missing clients, or submit the study again with a "
        "lower cohort.minimum, cohort.wait_for or cohort.size"
    )
