"""Final models trained with and without each record, group or client: what the membership test of privacy/membership.py needs.

Every run goes through the round loop, local training and releases of any simulation; only its data are thinned by coins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn import events, seeds
from fedlearn.learning import local
from fedlearn.learning.backend import Failed, Fitted
from fedlearn.learning.local import initial_weights
from fedlearn.learning.population import Population
from fedlearn.learning.task import Batch, ClientData, build_model
from fedlearn.privacy.membership import confidence_scores
from fedlearn.privacy.plan import Unit
from fedlearn.simulation.audited import bare, company_of, federate
from fedlearn.simulation.sequential import SequentialBackend

if TYPE_CHECKING:
    from fedlearn.learning.backend import Work
    from fedlearn.learning.rows import IntArray
    from fedlearn.learning.strategy import Strategy
    from fedlearn.privacy.audit import Coins, Scores
    from fedlearn.privacy.plan import PrivacyPlan
    from fedlearn.study import Study

MOST_SCORED: Final = 2_000
"""Rows of a client that models are compared on."""


@dataclass(frozen=True)
class Shadows:
    """What the models said.

    Args:
        scores: of each unit under each model, shape (runs, units).
        inside: whether it was in that model's data, shape (runs, units).
        clients: whose units they are.
    """

    scores: Scores = field(repr=False)
    inside: Coins = field(repr=False)
    clients: tuple[str, ...]


def train_shadows(
    study: Study,
    population: Population,
    strategy: Strategy,
    plan: PrivacyPlan,
    runs: int,
    emit: Callable[[events.Event], None],
) -> Shadows:
    """Train models, each on the units that its coins let in, and score every unit with each of them.

    Args:
        study: asks for privacy.
        population: the real data.
        strategy: the study's.
        plan: the study's; says what a unit is.
        runs: how many models.
        emit: takes events.
    """
    by_client = plan.unit is Unit.CLIENT
    clients = tuple(population.client_ids) if by_client else company_of(population)
    study = bare(study, plan, study.cohort if by_client else None)
    initial = initial_weights(population.task, study)
    owners = [_Owners.of(client, population.client(client).train, plan.unit) for client in clients]
    scores, inside = [], []
    for run in range(runs):
        coins = [_coins(study.seed, run, owner) for owner in owners]
        thinned = _Thinned(
            **{f.name: getattr(population, f.name) for f in fields(Population) if f.init},
            kept={} if by_client else {o.client: mine[o.unit] for o, mine in zip(owners, coins, strict=True)},
        )
        other = study.model_copy(update={"seed": seeds.derive(study.seed, "audit", "shadow", run)})
        out = frozenset(o.client for o, mine in zip(owners, coins, strict=True) if by_client and not mine[0])
        backend = _Few(other, thinned, strategy, clients, out)
        weights = federate(other, thinned, strategy, backend, initial, emit)
        model = build_model(population.task, study.seed)
        found = []
        for owner in owners:
            rows = owner.scored
            batch = population.client(owner.client).train
            _, losses = local.predict(population.task, model, study.train, Batch(batch.x[rows], batch.y[rows]), weights)
            found.append(owner.means(confidence_scores(losses)))
        scores.append(np.concatenate(found))
        inside.append(np.concatenate([mine[o.compared] for o, mine in zip(owners, coins, strict=True)]))
    return Shadows(np.stack(scores), np.stack(inside), clients)


@dataclass(frozen=True)
class _Owners:
    """The units of one client's training rows.

    Args:
        client: whose rows.
        unit: of each row, from 0, shape (rows,).
        scored: rows that models are compared on.
        compared: their units, ascending.
    """

    client: str
    unit: IntArray
    scored: IntArray
    compared: IntArray

    @classmethod
    def of(cls, client: str, train: Batch, unit: Unit) -> _Owners:
        if unit is Unit.RECORD:
            owner = np.arange(len(train), dtype=np.int64)
        elif unit is Unit.GROUP and train.groups is not None:
            owner = np.unique(train.groups, return_inverse=True)[1].astype(np.int64)
        else:
            owner = np.zeros(len(train), dtype=np.int64)
        scored = np.arange(min(len(train), MOST_SCORED), dtype=np.int64)
        return cls(client, owner, scored, np.unique(owner[scored]))

    def means(self, scores: Scores) -> Scores:
        """The mean score of each compared unit's rows."""
        at = np.searchsorted(self.compared, self.unit[self.scored])
        means: Scores = np.bincount(at, scores, len(self.compared)) / np.bincount(at, minlength=len(self.compared))
        return means


def _coins(seed: int, run: int, owner: _Owners) -> Coins:
    units = int(owner.unit.max()) + 1 if len(owner.unit) else 1
    coins: Coins = seeds.numpy_generator(seed, "audit", "member", run, owner.client).random(units) < 0.5
    return coins


@dataclass(frozen=True)
class _Thinned(Population):
    """A population whose clients train on some of their rows.

    Args:
        kept: client id to which of its training rows stay, shape (rows,); of others all do.
    """

    kept: Mapping[str, Coins] = field(default_factory=dict)

    def client(self, client_id: str) -> ClientData:
        whole = super().client(client_id)
        keep = self.kept.get(client_id)
        if keep is None:
            return whole
        train = whole.train
        groups = None if train.groups is None else train.groups[keep]
        return replace(whole, train=Batch(train.x[keep], train.y[keep], groups))


class _Few(SequentialBackend):
    """Some clients of a population; some of those answer nothing, because they are not in."""

    def __init__(
        self, study: Study, population: Population, strategy: Strategy, clients: tuple[str, ...], out: frozenset[str]
    ) -> None:
        super().__init__(study, population, strategy)
        self._clients, self._out = clients, out

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:  # noqa: ARG002  # all are here
        return self._clients

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        there = tuple(client for client in work.cohort if client not in self._out)
        yield from super().fit(replace(work, cohort=there))
        yield from (Failed(client, "left out", virtual=True) for client in work.cohort if client in self._out)
