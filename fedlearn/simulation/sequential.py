"""The sequential backend: one client after another, in this process. The oracle that every other backend must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedlearn.learning import local
from fedlearn.learning.backend import Failed, Fitted, Scored, Work, raised
from fedlearn.learning.memory import Memories, MemoriesInRam
from fedlearn.learning.postprocess import apply_on_client, chain_of
from fedlearn.learning.rows import in_order
from fedlearn.learning.task import build_model
from fedlearn.privacy.evaluation import is_charged
from fedlearn.privacy.site import site_plan

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Arrays
    from fedlearn.learning.population import Population
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Batch
    from fedlearn.privacy.dpsgd import GradientEngine
    from fedlearn.privacy.site import SitePlan
    from fedlearn.study import Study


class SequentialBackend:
    """Runs `local.fit` for each client of a cohort in turn.

    Args:
        study: local hyper-parameters and seed.
        population: everybody's data.
        strategy: the client rule.
        device: where to train.
        memories: the clients', if they are to outlive this backend.
    """

    def __init__(
        self,
        study: Study,
        population: Population,
        strategy: Strategy,
        device: torch.device | str = "cpu",
        memories: Memories | None = None,
    ) -> None:
        self._study, self._population, self._strategy = study, population, strategy
        self._model = build_model(population.task, study.seed).to(device)
        self._memories = memories if memories is not None else MemoriesInRam()
        self._engine: GradientEngine | None = None

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:  # noqa: ARG002  # all are here
        return in_order(self._population.client_ids)

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        chain = chain_of(self._study, work.shared)
        for client in work.cohort:
            try:
                state = self._memories.at(client, work.base.get(client)) if self._strategy.stateful else {}
                result = self.fit_one(work, client, state)
                reply = Fitted(client, apply_on_client(chain, result.update))
            except Exception as error:  # a user's task may raise anything; the others' work goes on
                yield raised(client, error)
                continue
            if self._strategy.stateful:
                self._memories.keep(client, (work.round, work.attempt), result.state)
            yield reply

    def fit_one(self, work: Work, client: str, state: Arrays) -> local.FitResult:
        """One client's local training; raises whatever it raises."""
        data = self._population.client(client)
        private = self.private(work, client, data.train)
        if private is not None and self._engine is None:
            self._engine = local.gradient_engine(self._population.task, self._model, self._study.train, data.train)
        return local.fit(
            self._population.task,
            self._model,
            self._strategy,
            self._study.train,
            data,
            place=local.Place(self._study.seed, work.round, client),
            global_model=work.model,
            shared=work.shared,
            state=state,
            private=private,
            engine=self._engine,
        )

    def private(self, work: Work, client: str, train: Batch) -> SitePlan | None:
        """The plan that a client's training keeps to, if the study has one for records or groups."""
        return site_plan(self._study, work.round, client, train, rehearsal=True)

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        for client in work.cohort:
            try:
                state = self._memories.peek(client, work.base.get(client)) if self._strategy.stateful else {}
                yield self.score_one(work, client, state)
            except Exception as error:  # as in `fit`
                yield raised(client, error)

    def score_one(self, work: Work, client: str, state: Arrays) -> Scored:
        """One client's scores; raises whatever its code raises."""
        data = self._population.client(client).test
        if is_charged(self._study):
            at = (work.round, client)
            cells = local.evaluate_noisily(
                self._population.task, self._model, self._study, data, work.model, at, rehearsal=True
            )
            return Scored(client, {}, 0, cells)
        metrics = local.evaluate(
            self._population.task,
            self._model,
            self._study.train,
            data,
            local.client_weights(self._strategy, work.model, work.shared, state),
            self._study.evaluate.batch_size,
        )
        return Scored(client, metrics, len(data))

    def close(self) -> None:
        self._memories.close()
