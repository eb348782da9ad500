"""Ours on the private workloads, W3 and W3b: the mechanisms of `fedlearn.privacy` in whole simulated rounds.

Seeded like every simulation, so nothing here is private; what is measured is what the noise costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from fedlearn.learning.federation import Federation
from fedlearn.learning.local import initial_weights
from fedlearn.learning.strategy import ServerState, Strategy, apply_step
from fedlearn.learning.update import DELTA, Aggregate, Release, Weighting
from fedlearn.privacy.clipping import central_release
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import FixedClip, FixedCohort, PoissonSampling, PrivacyPlan, Unit
from fedlearn.privacy.steps import NoisySteps
from fedlearn.release.journal import DictJournal
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.dense import DenseTrainer
from fedlearn.simulation.plan import TrainingPlan
from fedlearn.simulation.prepare import Ready, Request
from fedlearn.simulation.run import Manner, run_ready

if TYPE_CHECKING:
    import torch

    from benchmarks.workloads import Workload
    from fedlearn import events
    from fedlearn.arrays import Arrays
    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.learning.task import Task
    from fedlearn.simulation.blocks import Block, Stacked, StepPlan
    from fedlearn.study import Study

DELTA_SHARE = 0.1
"""The delta of a plan times its units; without meaning here, but a plan names one."""


@dataclass(frozen=True)
class NoisyMean(Strategy):
    """FedAvg with uniform weights, and noise on the sum at the server.

    Args:
        plan: its noise, and the denominator.
        clip_l2: what updates were clipped to.
        seed: the study's.
    """

    plan: PrivacyPlan
    clip_l2: float
    seed: int

    name: ClassVar[str] = "noisy_mean"
    paper: ClassVar[str] = "McMahan et al. 2018, algorithm 1"
    releases: ClassVar[tuple[Release, ...]] = (Release(DELTA, Weighting.UNIFORM),)

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        sums = {DELTA: {name: mean * aggregate.clients for name, mean in aggregate.means[DELTA].items()}}
        chance = seeded_chance(self.seed, "noise", state.round)
        released = central_release(self.plan, self.clip_l2, sums, 0, aggregate.clients, chance)
        return replace(state, model=apply_step(state.model, released.means[DELTA]), round=state.round + 1)


def client_level(workload: Workload, rounds: int, emit: events.Emit) -> Arrays:
    """W3: the study clips each update, the server adds the noise. Returns the final weights."""
    assert workload.clip_l2 is not None
    ready = Request(workload.study(rounds)).ready()
    plan = PrivacyPlan(
        Unit.CLIENT,
        FixedCohort(workload.cohort, workload.population),
        FixedClip(workload.clip_l2),
        workload.noise_multiplier,
        DELTA_SHARE / workload.population,
        units=workload.population,
        rounds=rounds,
    )
    strategy = NoisyMean(plan, workload.clip_l2, ready.study.seed)
    return run_ready(replace(ready, strategy=strategy), Manner(emit=emit)).weights


class PrivateTrainer:
    """DP-SGD where the batched backend asks for local training.

    Args:
        trainer: of the model.
        plan: every client's.
    """

    def __init__(self, trainer: DenseTrainer, plan: PrivacyPlan) -> None:
        self.layout = trainer.layout
        self._trainer, self._plan = trainer, plan

    def run(self, initial: Tensors, direction: Direction | None, block: Block, plan: StepPlan) -> Stacked:
        assert direction is None
        assert set(plan.steps) == {self._plan.steps}, "as many steps as without privacy"
        sites = [
            NoisySteps(len(batch), self._plan, seeded_chance(block.seed, "dp-sgd", block.round, client))
            for client, batch in zip(block.clients, block.data, strict=True)
        ]
        return self._trainer.run_private(initial, block, sites)


@dataclass(frozen=True)
class PrivateTraining(TrainingPlan):
    """A training plan whose trainer does DP-SGD."""

    privacy: PrivacyPlan = field(kw_only=True)

    def trainer(self, task: Task, model: torch.nn.Module, study: Study) -> PrivateTrainer:
        dense = super().trainer(task, model, study)
        assert isinstance(dense, DenseTrainer)
        return PrivateTrainer(dense, self.privacy)


class PrivateBackend(BatchedBackend):
    """The batched backend with DP-SGD in each client."""

    def __init__(self, ready: Ready, privacy: PrivacyPlan) -> None:
        super().__init__(ready.study, ready.population, ready.strategy)
        self._privacy = privacy

    def plan(self, cohort: Sequence[str]) -> PrivateTraining:
        found = super().plan(cohort)
        return PrivateTraining(found.way, found.block, found.reason, found.chain, privacy=self._privacy)


def record_level(workload: Workload, rounds: int, emit: events.Emit) -> Arrays:
    """W3b: as many steps as without privacy, batches of that size on average. Returns the final weights."""
    assert workload.record_clip_l2 is not None
    ready = Request(workload.study(rounds)).ready()
    study, task = ready.study, ready.population.task
    plan = PrivacyPlan(
        Unit.RECORD,
        PoissonSampling(workload.batch / workload.examples),
        FixedClip(workload.record_clip_l2),
        workload.noise_multiplier,
        DELTA_SHARE / workload.examples,
        units=workload.examples,
        rounds=rounds,
        steps=workload.examples // workload.batch,
    )
    with closing(PrivateBackend(ready, plan)) as backend:
        run = Federation(
            study,
            study.name,
            ready.strategy,
            initial_weights(task, study),
            backend,
            DictJournal(),
            metric=task.card.metric,
            emit=emit,
        )
        return run.run().state.model
