"""The sequential backend: one client after another, in this process. The oracle that every other backend must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedlearn.errors import FedlearnError
from fedlearn.learning import local
from fedlearn.learning.backend import Failed, Fitted, Scored, Work
from fedlearn.learning.memory import ClientMemory
from fedlearn.learning.postprocess import apply_on_client, chain_of
from fedlearn.learning.task import build_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fedlearn.arrays import Array
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Population
    from fedlearn.study import Study


class SequentialBackend:
    """Runs `local.fit` for each client of a cohort in turn.

    Args:
        study: local hyper-parameters and seed.
        population: everybody's data.
        strategy: the client rule.
        device: where to train.
    """

    def __init__(
        self, study: Study, population: Population, strategy: Strategy, device: torch.device | str = "cpu"
    ) -> None:
        self._study, self._population, self._strategy = study, population, strategy
        self._chain = chain_of(study)
        self._model = build_model(population.task, study.seed).to(device)
        self._memories: dict[str, ClientMemory] = {}

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:  # noqa: ARG002  # all are here
        return sorted(self._population.client_ids)

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        for client in work.cohort:
            try:
                yield self._fit_one(work, client)
            except FedlearnError as error:
                yield Failed(client, error.message)

    def _fit_one(self, work: Work, client: str) -> Fitted:
        memory = self._memories.get(client, ClientMemory())
        result = local.fit(
            self._population.task,
            self._model,
            self._strategy,
            self._study.train,
            self._population.client(client),
            place=local.Place(self._study.seed, work.round, client),
            global_model=work.model,
            shared=work.shared,
            state=memory.at(work.base.get(client)) if self._strategy.stateful else {},
        )
        if self._strategy.stateful:
            memory.candidates[work.round, work.attempt] = result.state
            self._memories[client] = memory
        return Fitted(client, apply_on_client(self._chain, result.update))

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        for client in work.cohort:
            try:
                data = self._population.client(client).test
                memory = self._memories.get(client, ClientMemory())
                state = memory.peek(work.base.get(client)) if self._strategy.stateful else {}
                weights = local.client_weights(self._strategy, work.model, work.shared, state)
                metrics = local.evaluate(
                    self._population.task,
                    self._model,
                    self._study.train,
                    data,
                    weights,
                    self._study.evaluate.batch_size,
                )
                yield Scored(client, metrics, len(data))
            except FedlearnError as error:
                yield Failed(client, error.message)

    def states(self) -> Mapping[str, Mapping[str, Array]]:
        """Each stateful client's base memory, for a checkpoint."""
        return {client: dict(memory.state) for client, memory in self._memories.items()}

    def close(self) -> None:
        self._memories.clear()
