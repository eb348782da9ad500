"""The Ray backend: the batched backend on long-lived actors, on this machine or on a cluster's.

A cohort is cut into spans of whole blocks, in its order. Partial sums come back, never updates, where the strategy is linear. Blocks are
those of the batched backend and integer sums do not depend on who took them, so the bytes of a round are the batched
backend's for any number of workers. A span whose actor is lost is run again elsewhere, and gives the same bytes there.

Ray moves objects between its own processes by pickling them, and trusts everybody who can reach its ports: run it on machines and in a
network of your own. It rehearses federations; real sites are reached over fedlearn's link.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from fedlearn.errors import FedlearnError, RunFailedError, UnsupportedError
from fedlearn.learning.backend import Failed
from fedlearn.learning.memory import Memories, MemoriesInRam
from fedlearn.learning.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Base, Fitted, Scored, Summed, Work
    from fedlearn.learning.population import Population
    from fedlearn.simulation.plan import TrainingPlan
    from fedlearn.study import Study

SPANS_PER_WORKER: Final = 4
"""Spans of a round for each worker: enough to even out their speeds, few enough that sums stay rare on the wire."""
MOST_CLIENTS: Final = 512
"""Of a span; what is lost with an actor."""
AHEAD: Final = 2
"""Spans that are begun for each worker before the first of them is handed on; it bounds what waits in memory."""
MOST_LOSSES: Final = 3
"""A span that was lost so often is what kills the actors."""
START_S: Final = 300.0
"""How long to wait for a worker when there is none."""


class RayBackend:
    """Trains spans of clients on Ray actors.

    Args:
        study: local hyper-parameters and seed.
        population: everybody's data; it travels once to each machine.
        strategy: the client rule.
        device: where an actor trains.
        workers: actors; the cluster's CPUs without it.
        memories: what clients keep between rounds; in this process without it. They travel with their span.
        address: of a running cluster, `HOST:PORT` of its head, `ray://HOST:10001` from outside, or `auto`. None starts Ray on this
            machine, and ends it with the backend.

    Raises:
        UnsupportedError: Ray is not installed.
        RunFailedError: there is no cluster at the address.
    """

    def __init__(
        self,
        study: Study,
        population: Population,
        strategy: Strategy,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        memories: Memories | None = None,
        address: str | None = None,
    ) -> None:
        from fedlearn.simulation.batched import BatchedBackend

        self._ray = import_ray()
        self._study, self._population, self._strategy = study, population, strategy
        self._memories: Memories = memories if memories is not None else MemoriesInRam()
        self._planner = BatchedBackend(study, population, strategy, device, 1)
        self._owned = _connect(self._ray, address, None if workers is None else workers * study.runtime.threads)
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        place = str(device).partition(":")[0]  # Ray shows an actor its own device, whose number is 0
        needs = {"num_cpus": study.runtime.threads, "num_gpus": 0 if place == "cpu" else 1}
        self._actors = Actors(self._ray, self._setup(place), workers or max(1, cpus // study.runtime.threads), needs)

    @property
    def lost(self) -> int:
        """Workers that were lost so far."""
        return self._actors.lost

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        return self._planner.clients(at_least, timeout_s)

    def plan(self, cohort: Sequence[str]) -> TrainingPlan:
        """How blocks are trained, and why: the batched backend's plan."""
        return self._planner.plan(cohort)

    def fit(self, work: Work) -> Iterator[Fitted | Summed | Failed]:
        plan = self.plan(work.cohort)
        shared = self._ray.put(_light(work))
        settled = self._ray.put(plan)

        read = self._memories.at if self._strategy.stateful else None
        without: dict[str, Failed] = {}

        def begin(worker: Any, clients: tuple[str, ...]) -> Any:
            states = _states(clients, work, read, without)
            return worker.fit.remote(settled, shared, [c for c in clients if c not in without], states)

        most = plan.block if self._strategy.stateful else MOST_CLIENTS
        for replies, kept in self._actors.run(begin, self._spans(work.cohort, plan.block, most)):
            for client, made, state in kept:
                self._memories.keep(client, made, state)
            yield from replies
        yield from without.values()

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        from fedlearn.simulation.batched import SCORED_TOGETHER

        shared = self._ray.put(_light(work))

        personal = type(self._strategy).client_model is not Strategy.client_model
        read = self._memories.peek if personal else None
        without: dict[str, Failed] = {}

        def begin(worker: Any, clients: tuple[str, ...]) -> Any:
            states = _states(clients, work, read, without)
            return worker.evaluate.remote(shared, [c for c in clients if c not in without], states)

        for replies in self._actors.run(begin, self._spans(work.cohort, SCORED_TOGETHER, MOST_CLIENTS)):
            yield from replies
        yield from without.values()

    def close(self) -> None:
        self._actors.close()
        self._planner.close()
        self._memories.close()
        if self._owned and self._ray.is_initialized():
            self._ray.shutdown()

    def _setup(self, device: str) -> Any:
        from fedlearn.simulation.ray_worker import Setup

        return self._ray.put(Setup.of(self._study, self._population, self._strategy, device))

    def _spans(self, cohort: Sequence[str], block: int, most: int) -> list[tuple[str, ...]]:
        """The cohort in whole blocks, a few spans for each worker."""
        wanted = -(-len(cohort) // (SPANS_PER_WORKER * self._actors.size))
        blocks = max(1, min(-(-wanted // block), most // block))
        return [tuple(cohort[i : i + blocks * block]) for i in range(0, len(cohort), blocks * block)]


@dataclass
class _Span:
    """A span under way."""

    number: int
    clients: tuple[str, ...]
    losses: int = 0


@dataclass
class Actors:
    """Those that take one span at a time. One that is lost is replaced, and its span goes to whoever is free.

    Args:
        ray: the module.
        setup: reference to the run's `Setup`.
        size: how many actors.
        needs: Ray's options for what one actor takes of a machine.
    """

    ray: Any
    setup: Any
    size: int
    needs: Mapping[str, Any]
    _starting: dict[Any, Any] = field(default_factory=dict)
    _idle: list[Any] = field(default_factory=list)
    lost: int = 0

    def __post_init__(self) -> None:
        for _ in range(self.size):
            self._hire()

    def run(self, begin: Callable[[Any, tuple[str, ...]], Any], spans: Sequence[tuple[str, ...]]) -> Iterator[Any]:
        """What becomes of each span, in their order.

        Args:
            begin: starts a span's work on an actor and gives the reference of its result.
            spans: of clients.

        Raises:
            RunFailedError: no actor comes up, or one span kills every actor that it is given to.
        """
        waiting = deque(_Span(number, clients) for number, clients in enumerate(spans))
        running: dict[Any, tuple[_Span, Any]] = {}
        done: dict[int, Any] = {}
        following = 0
        try:
            while following < len(spans):
                while self._idle and waiting and waiting[0].number < following + AHEAD * self.size:
                    span, worker = waiting.popleft(), self._idle.pop()
                    running[begin(worker, span.clients)] = span, worker
                for ref in self._ready([*running, *self._starting], patient=bool(running)):
                    if ref in self._starting:
                        self._welcome(ref)
                        continue
                    span, worker = running.pop(ref)
                    try:
                        done[span.number] = self.ray.get(ref)
                        self._idle.append(worker)
                    except self._losses():
                        self._replace(worker)
                        self._again(span, waiting)
                while following in done:
                    yield done.pop(following)
                    following += 1
        finally:  # where whoever listens has hung up, workers are free again after what they are at
            for _, worker in running.values():
                self._starting[worker.where.remote()] = worker

    def close(self) -> None:
        """End the actors."""
        for worker in (*self._idle, *self._starting.values()):
            self.ray.kill(worker)
        self._idle.clear()
        self._starting.clear()

    def _ready(self, refs: list[Any], *, patient: bool) -> list[Any]:
        ready, _ = self.ray.wait(refs, num_returns=1, timeout=None if patient else START_S) if refs else ([], [])
        if not ready:
            raise RunFailedError(
                f"ray: no worker came up within {START_S:g} s; the cluster has {self.ray.cluster_resources()}",
                hint="lower --workers or runtime.threads, or look at the cluster with `ray status`",
            )
        return list(ready)

    def _hire(self) -> None:
        from fedlearn.simulation.ray_worker import SpanRunner

        # Spans are run again by us and not by Ray: an actor that Ray restarts on a full machine would keep its span waiting.
        worker = self.ray.remote(SpanRunner).options(max_restarts=0, **self.needs).remote(self.setup)
        self._starting[worker.where.remote()] = worker

    def _welcome(self, ref: Any) -> None:
        worker = self._starting.pop(ref)
        try:
            self.ray.get(ref)
            self._idle.append(worker)
        except self._losses():
            self._replace(worker)

    def _replace(self, worker: Any) -> None:
        self.lost += 1
        if self.lost > MOST_LOSSES * self.size:
            raise RunFailedError(
                f"ray: {self.lost} workers were lost", hint="look into the cluster's logs; memory may be short"
            )
        self.ray.kill(worker)
        self._hire()

    def _again(self, span: _Span, waiting: deque[_Span]) -> None:
        span.losses += 1
        if span.losses >= MOST_LOSSES:
            raise RunFailedError(
                f"ray: {span.losses} workers were lost on clients {span.clients[0]} to {span.clients[-1]}",
                hint="their data or the model may need more memory than a worker has; try fewer --workers",
            )
        waiting.appendleft(span)

    def _losses(self) -> tuple[type[Exception], ...]:
        errors = self.ray.exceptions
        return (errors.RayActorError, errors.OutOfMemoryError, errors.ObjectLostError)


def import_ray() -> Any:
    """The module.

    Raises:
        UnsupportedError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a rehearsal tells nobody of itself
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour to come, without the warning
    try:
        import ray
    except ImportError:
        raise UnsupportedError(
            "backend 'ray': Ray is not installed", hint='pip install "fedlearn[ray]", here and on every machine'
        ) from None
    return ray


def _connect(ray: Any, address: str | None, cpus: int | None) -> bool:
    """Whether Ray was started here, and so has to be ended here."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            # Without "local" Ray would join whatever cluster was last started on this machine.
            ray.init("local", num_cpus=cpus or len(os.sched_getaffinity(0)), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunFailedError(
            f"ray: {'cannot start here' if address is None else f'no cluster at {address}'}: {error}",
            hint="start one with `ray start --head`, and give its HOST:PORT",
        ) from None
    return True


def _light(work: Work) -> Work:
    """What all spans of a round share."""
    return replace(work, cohort=(), base={})


def _states(
    clients: Sequence[str],
    work: Work,
    read: Callable[[str, Base | None], Arrays] | None,
    without: dict[str, Failed],
) -> dict[str, Arrays]:
    """The memories of those clients that have one; who should have one and has not goes into `without`."""
    states: dict[str, Arrays] = {}
    if read is None:
        return states
    for client in clients:
        try:
            states[client] = read(client, work.base.get(client))
        except FedlearnError as error:
            without[client] = Failed(client, error.message)
    return {client: state for client, state in states.items() if state}
