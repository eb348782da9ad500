"""The batched backend: a cohort in blocks of clients that train together, on all cores, summed block by block."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
import torch

from fedlearn.errors import FedlearnError
from fedlearn.learning.memory import Memories, MemoriesInRam
from fedlearn.learning.strategy import Strategy
from fedlearn.learning.task import Batch, build_model
from fedlearn.simulation.plan import TrainingPlan, Way, plan_training
from fedlearn.simulation.runner import BlockRunner, asks_for_sums_only
from fedlearn.simulation.sequential import SequentialBackend

if TYPE_CHECKING:
    from fedlearn.learning.backend import Failed, Fitted, Scored, Summed, Work
    from fedlearn.learning.population import Population
    from fedlearn.study import Study

R = TypeVar("R")
log = logging.getLogger("fedlearn.simulation")

SCORED_TOGETHER: Final = 64
"""Clients whose test rows are scored in the same batches."""
TRIED_ROWS: Final = 3
"""Rows that the planner tries a model on."""


class BatchedBackend:
    """Trains blocks of clients; equal to `SequentialBackend` up to the rounding of floats.

    Blocks are cut from the cohort in its order and each is summed by itself, so the bytes of a round do not depend on the number of
    workers. What cannot train in blocks exactly goes to the sequential backend: see `plan`.

    Args:
        study: local hyper-parameters and seed.
        population: everybody's data.
        strategy: the client rule.
        device: where to train.
        workers: threads that each train a block at a time; every core without it, and one where the device is no CPU.
        memories: what clients keep between rounds; in this process without it.
    """

    def __init__(
        self,
        study: Study,
        population: Population,
        strategy: Strategy,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        memories: Memories | None = None,
    ) -> None:
        self._study, self._population, self._strategy = study, population, strategy
        self._memories: Memories = memories if memories is not None else MemoriesInRam()
        self._sequential = SequentialBackend(study, population, strategy, device, self._memories)
        self._one_at_a_time = threading.Lock()
        model = build_model(population.task, study.seed).to(device)
        self._model = model.double() if study.train.precision == "float64" else model
        self._plan: TrainingPlan | None = None
        self._workers = workers if workers is not None else default_workers(torch.device(device))
        self._threads = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        return self._sequential.clients(at_least, timeout_s)

    def plan(self, cohort: Sequence[str]) -> TrainingPlan:
        """How blocks are trained, and why; decided once, with the first rows of the cohort that can be had."""
        if self._plan is None:
            example = _some_rows(self._population, cohort)
            if example is None:
                return TrainingPlan(Way.SEQUENTIAL, 1, "no client of this cohort has training rows")
            task, sums_only = self._population.task, asks_for_sums_only(self._strategy, self._study)
            self._plan = plan_training(task, self._model, self._study, example, sums_only=sums_only)
            if self._plan.way in {Way.SINGLE, Way.SEQUENTIAL}:
                log.warning("clients train one by one: %s", self._plan.reason)
        return self._plan

    def fit(self, work: Work) -> Iterator[Fitted | Summed | Failed]:
        plan = self.plan(work.cohort)
        if plan.way is Way.SEQUENTIAL:
            yield from self._sequential.fit(work)
            return
        for replies in self._in_order(lambda block: self._fit_block(plan, work, block), work.cohort, plan.block):
            yield from replies

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        if type(self._strategy).client_model is not Strategy.client_model:
            yield from self._sequential.evaluate(work)
            return
        for replies in self._in_order(lambda block: self._score_block(work, block), work.cohort, SCORED_TOGETHER):
            yield from replies

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._sequential.close()

    def _here(self) -> BlockRunner:
        """This thread's own runner, with a model of its own."""
        runner: BlockRunner | None = getattr(self._threads, "runner", None)
        if runner is None:
            model = copy.deepcopy(self._model)
            runner = BlockRunner(self._study, self._population, self._strategy, model, self._memories)
            self._threads.runner = runner
        return runner

    def _fit_block(
        self, plan: TrainingPlan, work: Work, clients: tuple[str, ...]
    ) -> Sequence[Fitted | Summed | Failed]:
        try:
            return self._here().run(plan, work, clients)
        except Exception:  # the task's own code, on somebody's rows: alone, each is trained or reported by name
            with self._one_at_a_time:
                return list(self._sequential.fit(replace(work, cohort=clients)))

    def _score_block(self, work: Work, clients: tuple[str, ...]) -> Sequence[Scored | Failed]:
        try:
            return self._here().score(work, clients)
        except Exception:  # as above
            with self._one_at_a_time:
                return list(self._sequential.evaluate(replace(work, cohort=clients)))

    def _in_order(self, job: Callable[[tuple[str, ...]], R], clients: Sequence[str], size: int) -> Iterator[R]:
        """What `job` makes of each block, in the blocks' order, a few blocks ahead."""
        blocks = [tuple(clients[i : i + size]) for i in range(0, len(clients), size)]
        if self._workers == 1 or len(blocks) < 2:
            yield from map(job, blocks)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self._workers, "block", torch.set_num_threads, (self._study.runtime.threads,)
            )
        ahead: deque[Future[R]] = deque()
        try:
            for block in blocks:
                ahead.append(self._pool.submit(job, block))
                if len(ahead) > self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def default_workers(device: torch.device) -> int:
    """As many as there are cores for this process; one for another device, which runs one thing at a time."""
    return len(os.sched_getaffinity(0)) if device.type == "cpu" else 1


def _some_rows(population: Population, clients: Sequence[str]) -> Batch | None:
    """The first few training rows of these clients; None where they have none."""
    found: list[Batch] = []
    for client in clients:
        try:
            found.append(population.client(client).train)
        except FedlearnError:
            continue
        if sum(map(len, found)) >= TRIED_ROWS:
            break
    if not sum(map(len, found)):
        return None
    x, y = (np.concatenate([getattr(batch, part) for batch in found])[:TRIED_ROWS] for part in ("x", "y"))
    return Batch(x, y)
