"""A federation among whose clients there are canaries: coordinator, clipping, exact sums and noise are those of any simulation.

A canary is a client whose update is one number, far longer than the clip or just within it. One that is out sends nothing; under a
fixed cohort it sends the opposite.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn import events
from fedlearn.errors import StudyError
from fedlearn.learning.backend import Failed, Fitted
from fedlearn.learning.local import initial_weights
from fedlearn.learning.postprocess import apply_on_client, chain_of
from fedlearn.learning.rows import in_order
from fedlearn.learning.update import DELTA, UNCLIPPED, Aggregate, Update
from fedlearn.privacy.canaries import WIDENED, Canaries, Evidence
from fedlearn.privacy.plan import FixedCohort, PrivacyPlan, Spaced
from fedlearn.privacy.study import clip_in, plan_of
from fedlearn.simulation.audited import Audited, bare, company_of, federate, nobody_dropped, sizes_of
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.study import Study

if TYPE_CHECKING:
    import numpy.typing as npt

    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Scored, Work
    from fedlearn.learning.population import Population
    from fedlearn.learning.strategy import ServerState, Strategy
    from fedlearn.privacy.audit import Coins

_FAR: Final = 1e3
"""How many clips long a canary's update is before it is clipped."""
_JUST_WITHIN: Final = 1 - 1e-6


class _Crowd:
    """A few real clients, canaries, and as many who never answer as the plan's population lacks. A `Backend`.

    Real clients do not know of the numbers that the model is widened by: they are taken off what they get, and zero in what they send.
    """

    def __init__(
        self,
        study: Study,
        real: SequentialBackend,
        strategy: Strategy,
        clients: Sequence[str],
        evidence: Evidence,
        all_in: int,
    ) -> None:
        self._study, self._real, self._evidence, self._clients = study, real, evidence, frozenset(clients)
        self._names = tuple(evidence.canaries.sizes)
        self._releases = tuple(release.name for release in strategy.releases)
        self._numbers = {f"{WIDENED}/{n:07}": n for n in range(len(evidence.canaries))}
        silent = [f"audit/silent/{n:07}" for n in range(all_in - len(clients) - len(self._numbers))]
        self._everybody = in_order([*clients, *self._numbers, *silent])
        self._signs = evidence.canaries.signs(evidence.plan)
        self._within = evidence.canaries.within_clip(evidence.plan)
        self._clip_l2 = math.nan
        self._exact: dict[str, npt.NDArray[np.float64]] = {}
        self._real_part = np.zeros(0)
        self._asked: Coins | None = None

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:  # noqa: ARG002  # all are here
        return self._everybody

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        assert self._study.privacy is not None
        self._clip_l2 = clip_in(self._study.privacy, work.shared)
        self._exact = {name: np.zeros(work.model[name].shape) for name in self._names}
        mine = tuple(client for client in work.cohort if client in self._clients)
        narrow = {name: array for name, array in work.model.items() if name != WIDENED}
        for reply in self._real.fit(replace(work, cohort=mine, model=narrow)):
            yield reply if isinstance(reply, Failed) else self._sent(reply.client, reply.update, work.model)
        self._real_part = self._evidence.canaries.read(list(self._exact.values()))
        if self._evidence.plan.matrix is not None:
            self._asked = np.zeros(len(self._numbers), dtype=np.bool_)
            self._asked[[self._numbers[client] for client in work.cohort if client in self._numbers]] = True
        chain = chain_of(self._study, work.shared)
        for client in work.cohort:
            number = self._numbers.get(client)
            if number is not None and self._signs[number]:
                yield self._sent(client, apply_on_client(chain, self._canary(number, work.model)), work.model)
            elif client not in self._clients:
                yield Failed(client, "left out", virtual=True)

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:  # noqa: ARG002  # nobody is evaluated
        return iter(())

    def close(self) -> None:
        self._real.close()

    def hear(self, aggregate: Aggregate) -> None:
        """The release of the round whose updates came last."""
        released = [aggregate.means[DELTA][name] for name in self._names]
        self._evidence.hear(released, list(self._exact.values()), self._real_part, self._clip_l2, self._asked)

    def _sent(self, client: str, update: Update, model: Arrays) -> Fitted:
        """What arrives, counted in the exact sums."""
        private: dict[str, Arrays] = {}
        for release, arrays in update.private.items():
            wide = release == UNCLIPPED or WIDENED in arrays
            private[release] = arrays if wide else {**arrays, WIDENED: np.zeros_like(model[WIDENED])}
        for name, total in self._exact.items():
            np.add(total, private[DELTA][name], out=total)
        return Fitted(client, replace(update, private=private))

    def _canary(self, number: int, model: Arrays) -> Update:
        """A canary's update before it is clipped."""
        private = {release: {name: np.zeros_like(model[name]) for name in self._names} for release in self._releases}
        values = np.zeros(len(self._numbers))
        values[number] = self._signs[number] * self._clip_l2 * (_JUST_WITHIN if self._within[number] else _FAR)
        self._evidence.canaries.add(list(private[DELTA].values()), values)
        return Update(private, examples=1)


def audit_crowd(
    study: Study, population: Population, strategy: Strategy, plan: PrivacyPlan, count: int, emit: events.Emit
) -> Audited:
    """A run with canaries among the clients.

    Args:
        study: asks for privacy of clients.
        population: the real data.
        strategy: the study's.
        plan: the study's.
        count: of the canaries.
        emit: takes events.

    Raises:
        StudyError: there is no plan for so many clients.
        RunFailedError: a client could not train.
    """
    clients = company_of(population)
    study, plan, everybody = _with_room(study, plan, len(clients) + count)
    initial = initial_weights(population.task, study)
    evidence = Evidence(Canaries(count, sizes_of(initial), study.seed), plan)
    width = evidence.canaries.widened
    wide = {**initial, WIDENED: np.zeros(width, dtype=next(iter(initial.values())).dtype)}
    crowd = _Crowd(study, SequentialBackend(study, population, strategy), strategy, clients, evidence, everybody)
    federate(study, population, _tapped(strategy, crowd.hear), crowd, wide, nobody_dropped(emit))
    return Audited(evidence, clients)


def _with_room(study: Study, plan: PrivacyPlan, present: int) -> tuple[Study, PrivacyPlan, int]:
    """The study with a population that the canaries fit into, its plan, and how many clients there are.

    Coins and full participation say nothing of others, so canaries come on top. A fixed cohort is drawn out of a population: both grow by
    the same factor, which changes neither the probability to be drawn nor the noise in clips. Where nobody may be asked too often, rounds
    become so large that everybody is asked as often as may be: no guarantee rests on their size.
    """
    units, size = plan.units, study.cohort.size
    match plan.sampling:
        case FixedCohort(cohort, _):
            times = max(1, math.ceil(present / units))
            units, size = units * times, cohort * times
        case Spaced(_, separation, most):
            turns = max(min(separation, plan.rounds), 0 if most is None else math.ceil(plan.rounds / most))
            size = math.ceil(present / turns)
            units = size * turns
    study = bare(study, plan, study.cohort.model_copy(update={"size": size, "minimum": 1, "wait_for": None}))
    privacy = study.privacy.model_copy(update={"units": units}) if study.privacy else None
    study = study.model_copy(update={"privacy": privacy})
    try:
        grown = plan_of(study)
    except StudyError as error:
        raise StudyError(error.message, hint="fewer canaries, or a smaller privacy.delta") from None
    assert grown is not None
    return study, grown, max(present, grown.units)


def _tapped(strategy: Strategy, heard: Callable[[Aggregate], None]) -> Strategy:
    """A strategy that tells what the server rule is given."""

    def server_step(state: ServerState, aggregate: Aggregate) -> ServerState:
        heard(aggregate)
        return strategy.server_step(state, aggregate)

    other = copy.copy(strategy)
    object.__setattr__(other, "server_step", server_step)  # frozen, but for this
    return other
