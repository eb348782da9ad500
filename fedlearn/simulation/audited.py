"""Federations with canaries in them: the round loop, local training and releases are those of any simulation.

Whom a guarantee protects does not depend on who else takes part, so a few real clients are company enough. Nobody is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedlearn import events
from fedlearn.errors import RunFailedError
from fedlearn.learning.federation import Federation
from fedlearn.learning.local import initial_weights
from fedlearn.learning.rows import in_order
from fedlearn.privacy.canaries import Canaries, CanarySitePlan, Evidence
from fedlearn.release.journal import DictJournal
from fedlearn.secure_aggregation import SecureAggregationTable
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.study import CohortTable, EvaluateTable, Study

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Backend, Work
    from fedlearn.learning.population import Population
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Batch
    from fedlearn.privacy.plan import PrivacyPlan
    from fedlearn.privacy.site import SitePlan

COMPANY: Final = 8
"""Real clients of an audit, at the most."""


@dataclass(frozen=True)
class Audited:
    """A run with canaries that is over.

    Args:
        evidence: what was heard.
        clients: the real ones that took part.
        among: the client whose records the canaries were among; empty where they were clients.
    """

    evidence: Evidence = field(repr=False)
    clients: tuple[str, ...]
    among: str = ""


def federate(
    study: Study, population: Population, strategy: Strategy, backend: Backend, initial: Arrays, emit: events.Emit
) -> Arrays:
    """One run in this process, in memory, seeded; the final global weights."""
    metric = population.task.card.metric
    with closing(backend):
        outcome = Federation(
            study,
            study.name,
            strategy,
            initial,
            backend,
            DictJournal(),
            metric=metric,
            emit=emit,
            may_join=False,
            rehearsal=True,
        ).run()
    return outcome.state.model


def nobody_dropped(emit: events.Emit) -> events.Emit:
    """Events on their way to `emit`; a client whose update did not enter the sum ends the run, for what it gave is not in the evidence."""

    def heard(event: events.Event) -> None:
        if isinstance(event, events.ClientDropped) and not event.virtual:
            raise RunFailedError(f"audit: client {event.client!r} dropped out: {event.reason}")
        emit(event)

    return heard


def bare(study: Study, plan: PrivacyPlan, cohort: CohortTable | None = None) -> Study:
    """A study with the noise of its plan and nothing that only costs time: no evaluations, no dropouts; no masks, under which the sum is the same.

    Args:
        study: asks for privacy.
        plan: the study's.
        cohort: in place of its own. For records and groups everybody trains: their guarantee does not rest on who is asked.
    """
    assert study.privacy is not None
    fixed = {"epsilon": None, "noise_multiplier": plan.noise_multiplier, "evaluation_noise": None, "units": plan.units}
    return study.model_copy(
        update={
            "privacy": study.privacy.model_copy(update=fixed),
            "cohort": CohortTable() if cohort is None else cohort,
            "evaluate": EvaluateTable(every=0),
            "secure_aggregation": SecureAggregationTable(),
            "environment": None,
        }
    )


def company_of(population: Population, client: str | None = None) -> tuple[str, ...]:
    """A few real clients, the named one among them."""
    ids = population.client_ids
    if client is not None:
        population.client(client)  # refuses one that is not there
    few = min(COMPANY, len(ids))
    spread = [ids[i * len(ids) // few] for i in range(few)]
    if client is not None and client not in spread:
        spread[0] = client
    return tuple(in_order(spread))


class _Site(SequentialBackend):
    """Trains a few clients; one of them has canaries."""

    def __init__(
        self,
        study: Study,
        population: Population,
        strategy: Strategy,
        clients: tuple[str, ...],
        client: str,
        evidence: Evidence,
    ) -> None:
        super().__init__(study, population, strategy)
        self._clients, self._client, self._evidence = clients, client, evidence

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:  # noqa: ARG002  # all are here
        return self._clients

    def private(self, work: Work, client: str, train: Batch) -> SitePlan | None:
        plan = super().private(work, client, train)
        if plan is None or client != self._client:
            return plan
        return CanarySitePlan(plan.plan, plan.chance, plan.groups, self._evidence)


def audit_site(
    study: Study,
    population: Population,
    strategy: Strategy,
    plan: PrivacyPlan,
    count: int,
    client: str | None,
    emit: events.Emit,
) -> Audited:
    """A run with canaries among the records or groups of one client.

    Args:
        study: asks for privacy of records or groups.
        population: the real data.
        strategy: the study's.
        plan: the study's.
        count: of the canaries.
        client: whose records; the first client's if not told.
        emit: takes events.

    Raises:
        DataError: there is no such client.
        RunFailedError: a client could not train.
    """
    clients = company_of(population, client)
    among = client or clients[0]
    study = bare(study, plan)
    initial = initial_weights(population.task, study)
    evidence = Evidence(Canaries(count, sizes_of(initial), study.seed), plan)
    site = _Site(study, population, strategy, clients, among, evidence)
    federate(study, population, strategy, site, initial, nobody_dropped(emit))
    return Audited(evidence, clients, among)


def sizes_of(model: Arrays) -> dict[str, int]:
    """Numbers of each array, by name."""
    return {name: int(array.size) for name, array in model.items()}
