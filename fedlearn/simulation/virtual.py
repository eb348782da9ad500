"""A backend in a world: clients that are away are not asked, and who vanishes or is too slow is not trained in vain.

Which clients arrive is known before anybody trains, since how long a client takes depends on how much it has to move and to do. A virtual clock
goes from round to round; it starts again where the history of committed rounds ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Backend, Failed, Scored, Work
from fedlearn.learning.rows import in_order
from fedlearn.release.keys import AttemptId
from fedlearn.simulation.environment import MAX_LOOKS, Close, Course, Drawn, Environment, Loads

if TYPE_CHECKING:
    from fedlearn.environment import EnvironmentTable
    from fedlearn.learning.backend import Fitted, Summed
    from fedlearn.learning.population import Population
    from fedlearn.learning.rows import IntArray
    from fedlearn.learning.strategy import Strategy
    from fedlearn.simulation.traffic import Traffic
    from fedlearn.study import Study, TrainTable


@dataclass(frozen=True)
class _Attempt:
    """An attempt that was worked out; `seconds` is the virtual time of its round, void attempts before it included."""

    at: AttemptId
    seconds: float
    drawn: Drawn
    course: Course
    close: Close


class EnvironmentBackend:
    """A `Backend`, and the `Conditions` of its rounds.

    An evaluation is the researcher's instrument: everybody can be asked, and it costs no virtual time.

    Args:
        inner: trains those that arrive.
        study: with an [environment].
        table: that environment.
        population: everybody's data.
        strategy: the client rule.

    Raises:
        DataError: the availability trace cannot be read.
    """

    def __init__(
        self, inner: Backend, study: Study, table: EnvironmentTable, population: Population, strategy: Strategy
    ) -> None:
        self._inner, self._study, self._table = inner, study, table
        self._population, self._strategy = population, strategy
        self._environment = Environment(table, study.seed, in_order(population.client_ids))
        self._needed = max(study.cohort.minimum, strategy.min_clients)
        self._traffic: Traffic | None = None
        self._passes = 0
        self._round, self._start_s, self._end_s = 0, 0.0, 0.0
        self._drawn: tuple[AttemptId, Drawn] | None = None
        self._last: _Attempt | None = None

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        """Everybody there is; who can be asked in a round is `cohort`'s to say."""
        return self._inner.clients(at_least, timeout_s)

    def resume(self, history: Sequence[Mapping[str, Any]]) -> None:
        self._round = len(history)
        self._end_s = 0.0
        for row in history:  # in the order in which the rounds went: the same bits
            self._end_s += row["virtual_seconds"]
        self._start_s, self._drawn, self._last = self._end_s, None, None

    def cohort(self, at: AttemptId) -> tuple[str, ...]:
        drawn = self._draw(at)
        if len(drawn.clients) < self._needed:
            raise RunFailedError(
                f"round {at.round}: {len(drawn.clients)} clients are available, needs {self._needed}",
                hint=f"the virtual coordinator looked {MAX_LOOKS} times in a week; raise [environment.availability], "
                "or lower cohort.minimum",
            )
        return drawn.clients

    def facts(self, at: AttemptId) -> Mapping[str, float]:
        last = self._last
        assert last is not None
        assert last.at == at, "asked about another attempt than the one that was worked out last"
        close = last.close
        return {
            "virtual_seconds": last.seconds,
            "bytes_down": close.bytes_down,
            "bytes_up": close.bytes_up,
            "unavailable": last.drawn.unavailable,
            "dropouts": int(close.dropped.sum()),
            "stragglers": int((~close.arrived & ~close.dropped).sum()),
        }

    def fit(self, work: Work) -> Iterator[Fitted | Summed | Failed]:
        attempt = self._work_out(work)
        arrived = {client for client, there in zip(attempt.drawn.clients, attempt.close.arrived, strict=True) if there}
        reasons = dict(self._reasons(attempt))
        for client in work.cohort:
            if client not in arrived:
                yield Failed(client, reasons[client], virtual=True)
        if cohort := tuple(client for client in work.cohort if client in arrived):
            yield from self._inner.fit(replace(work, cohort=cohort))

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        return self._inner.evaluate(work)

    def close(self) -> None:
        self._inner.close()

    def _draw(self, at: AttemptId) -> Drawn:
        if self._drawn is None or self._drawn[0] != at:
            if at.round != self._round:
                self._round, self._start_s = at.round, self._end_s
            begins_s = self._start_s + self._lost_s(at)
            self._drawn = at, self._environment.draw(at, self._study.cohort.size, self._needed, begins_s)
        return self._drawn[1]

    def _lost_s(self, at: AttemptId) -> float:
        """What the round's void attempts took."""
        return (at.attempt - 1) * self._environment.void_s

    def _work_out(self, work: Work) -> _Attempt:
        at = AttemptId(work.round, work.attempt)
        drawn = self._draw(at)
        loads = self._loads(work, drawn.clients)
        course = self._environment.course(drawn.numbers, at, loads)
        close = self._environment.close(course, loads, self._study.cohort.size)
        seconds = self._lost_s(at) + drawn.waited_s + close.seconds + self._table.server_s
        self._end_s = self._start_s + seconds
        self._last = _Attempt(at, seconds, drawn, course, close)
        return self._last

    def _loads(self, work: Work, clients: tuple[str, ...]) -> Loads:
        from fedlearn.simulation.traffic import Traffic

        if self._traffic is None:
            self._traffic = Traffic.of(self._study, self._strategy, work)
            self._passes = _passes(self._strategy, work)
        sizes = self._sizes(clients)
        return Loads(
            self._traffic.down(work, clients),
            self._examples(sizes),
            self._traffic.up(work, clients, sizes),
        )

    def _examples(self, sizes: IntArray) -> IntArray:
        """How many examples clients of these sizes go through. The pass that DP-SGD makes draws its own batches: as many are expected."""
        each, table = examples_processed(self._study.train, sizes), self._study.privacy
        if table is None or table.unit == "client":
            return each * self._passes
        drawn: IntArray = np.rint(sizes * (table.sampling_rate * table.steps)).astype(np.int64)
        return drawn + each * (self._passes - 1)

    def _sizes(self, clients: tuple[str, ...]) -> IntArray:
        try:
            return self._population.train_sizes(clients)
        except Exception:  # somebody's data cannot be prepared: it has nothing to do, and training it says why
            return np.array([self._size(client) for client in clients], dtype=np.int64)

    def _size(self, client: str) -> int:
        try:
            return int(self._population.train_sizes((client,))[0])
        except Exception:  # as above
            return 0

    def _reasons(self, attempt: _Attempt) -> Iterator[tuple[str, str]]:
        """Why each client that did not arrive did not."""
        course, close = attempt.course, attempt.close
        needs = np.asarray(course.upload_s[1])
        for place in np.flatnonzero(~close.arrived).tolist():
            vanished = f"vanished after {course.vanishes_s[place]:.4g} virtual s"
            late = f"too late: needs {needs[place]:.4g} virtual s, the round ended after {close.seconds:.4g}"
            yield attempt.drawn.clients[place], vanished if close.dropped[place] else late


def examples_processed(train: TrainTable, sizes: IntArray) -> IntArray:
    """How many examples a client of each size goes through in one pass."""
    if train.max_steps is None:
        return sizes * train.epochs
    steps = np.maximum(-(-sizes // train.batch_size), 1)
    whole, rest = np.divmod(train.max_steps, steps)
    limited = whole * sizes + np.minimum(rest * train.batch_size, sizes)
    done: IntArray = np.minimum(limited, sizes * train.epochs)
    return done


def _passes(strategy: Strategy, work: Work) -> int:
    """How often a client trains in a round: Ditto does so twice."""
    import torch

    from fedlearn.learning.strategy import ClientStart

    model, shared = (
        {name: torch.from_numpy(np.array(array)) for name, array in part.items()} for part in (work.model, work.shared)
    )
    return len(strategy.client_passes(ClientStart(model, shared)))
