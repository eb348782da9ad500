"""What runs inside a Ray actor: spans of a cohort, trained by the batched backend and handed back as one sum.

The actor holds everybody's data for as long as it lives (read-only, shared by the actors of a machine) and a model of its own. What
changes between two calls comes with the call: the global model by reference, the clients' memories with their span. So
any actor gives the same bytes for a span, and a span that was lost with its actor is run again by another one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedlearn.errors import UpdateError
from fedlearn.learning.backend import Failed, Fitted, Scored, Summed
from fedlearn.learning.collect import PartialSum, SumCollector
from fedlearn.learning.postprocess import chain_of
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.runner import sums_blocks
from fedlearn.simulation.sums import is_counted

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Base, Work
    from fedlearn.learning.population import Population
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Examples, Task
    from fedlearn.simulation.plan import TrainingPlan
    from fedlearn.study import Study

Kept = tuple[str, tuple[int, int], "Arrays"]
"""A client, the (round, attempt) that made its new memory, and the memory."""


@dataclass(frozen=True)
class Setup:
    """All that an actor needs for a run. It travels once to each machine.

    Args:
        study: local hyper-parameters and seed.
        strategy: the client rule.
        device: where to train.
        kind: the population's class; it is built anew there, without its cache.
        task: reads and prepares.
        examples: everybody's.
        rows: client to its row numbers.
        split: the population's seed, folds and fold, and whether units are split.
    """

    study: Study
    strategy: Strategy
    device: str
    kind: type[Population]
    task: Task
    examples: Examples = field(repr=False)
    rows: Mapping[str, Any] = field(repr=False)
    split: tuple[int, int, int, bool]

    @classmethod
    def of(cls, study: Study, population: Population, strategy: Strategy, device: str) -> Setup:
        """From the driver's own objects."""
        return cls(
            study,
            strategy,
            device,
            type(population),
            population.task,
            population.examples,
            population.rows,
            (population.seed, population.folds, population.fold, population.by_unit),
        )

    def population(self) -> Population:
        """The population, on the actor's machine."""
        return self.kind(self.task, self.examples, self.rows, *self.split)


class TravellingMemories:
    """Memories that came with a span and go back with its result."""

    def __init__(self) -> None:
        self._states: Mapping[str, Arrays] = {}
        self.kept: list[Kept] = []

    def load(self, states: Mapping[str, Arrays]) -> None:
        """The memories of the next span's clients, each at the base that the driver's record names."""
        self._states, self.kept = states, []

    def at(self, client: str, base: Base | None) -> Arrays:
        return self.peek(client, base)

    def peek(self, client: str, base: Base | None) -> Arrays:  # noqa: ARG002  # the driver has looked it up
        return self._states.get(client, {})

    def keep(self, client: str, made: Base, state: Arrays) -> None:
        self.kept.append((client, made, state))

    def close(self) -> None:
        self.load({})


class SpanRunner:
    """Trains and scores spans of a cohort in one process."""

    def __init__(self, setup: Setup) -> None:
        import torch

        torch.set_num_threads(setup.study.runtime.threads)
        self._strategy, self._sums = setup.strategy, sums_blocks(setup.strategy, setup.study)
        self._memories = TravellingMemories()
        self._study, self._backend = setup.study, _Planned(setup, self._memories)

    def where(self) -> tuple[str, int]:
        """Host and process; the first answer says that the actor is up."""
        return socket.gethostname(), os.getpid()

    def fit(
        self, plan: TrainingPlan, work: Work, clients: Sequence[str], states: Mapping[str, Arrays]
    ) -> tuple[list[Fitted | Summed | Failed], list[Kept]]:
        """Train a span: its first client is the first of a block.

        Args:
            plan: the driver's, so that every actor trains in the same way.
            work: the round's, without cohort and bases.
            clients: the span.
            states: the memories of those that have one.

        Returns:
            Replies, with everything that can be summed in one sum; and the memories to keep.
        """
        self._memories.load(states)
        self._backend.given = plan
        replies = list(self._backend.fit(replace(work, cohort=tuple(clients))))
        if self._sums:
            replies = summed(self._strategy, work, replies, counted=is_counted(chain_of(self._study)))
        return replies, self._memories.kept

    def evaluate(self, work: Work, clients: Sequence[str], states: Mapping[str, Arrays]) -> list[Scored | Failed]:
        """Score a span's clients."""
        self._memories.load(states)
        return list(self._backend.evaluate(replace(work, cohort=tuple(clients))))


class _Planned(BatchedBackend):
    """The batched backend on one thread, with the driver's plan."""

    given: TrainingPlan

    def __init__(self, setup: Setup, memories: TravellingMemories) -> None:
        super().__init__(setup.study, setup.population(), setup.strategy, setup.device, 1, memories)

    def plan(self, cohort: Sequence[str]) -> TrainingPlan:  # noqa: ARG002  # settled
        return self.given


def summed(
    strategy: Strategy, work: Work, replies: Sequence[Fitted | Summed | Failed], *, counted: bool = False
) -> list[Fitted | Summed | Failed]:
    """The same replies with every update in one integer sum: exact, so it changes no bit of the round's.

    An update that the sum refuses stays by itself, for the round loop to refuse by name.

    Args:
        strategy: linear.
        work: the round's, for the model's shapes.
        replies: of a span.
        counted: a bit goes with each update, see `learning.collect.release_specs`.
    """
    from fedlearn.arrays import specs_of

    collector = SumCollector(strategy, specs_of(work.model), counted=counted)
    examples: dict[str, int] = {}
    facts: dict[str, Mapping[str, float]] = {}
    rest: list[Fitted | Summed | Failed] = []
    for reply in replies:
        try:
            if isinstance(reply, Summed):
                collector.merge(reply.partial)
                examples |= reply.partial.examples
                facts |= reply.facts
            elif isinstance(reply, Fitted):
                collector.add(reply.client, reply.update)
                examples[reply.client] = reply.update.examples
                facts[reply.client] = reply.update.facts
            else:
                rest.append(reply)
        except UpdateError:
            rest.append(reply)
    return [Summed(PartialSum(collector.sums, examples), facts), *rest] if facts else rest
