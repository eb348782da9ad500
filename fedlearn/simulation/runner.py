"""One block of a cohort: data in, one sum out. What a thread does here, and an actor elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from fedlearn.errors import FedlearnError, UpdateError
from fedlearn.learning import local
from fedlearn.learning.backend import Failed, Fitted, Scored, Summed
from fedlearn.learning.postprocess import apply_on_client, chain_of
from fedlearn.learning.strategy import MAIN, ClientStart, Pull, Strategy, Trained
from fedlearn.learning.task import Batch
from fedlearn.learning.update import DELTA, Update, Weighting
from fedlearn.privacy.evaluation import is_charged, noisy_sums
from fedlearn.privacy.site import site_plan
from fedlearn.privacy.study import without_clip
from fedlearn.simulation.blocks import Block, PrivateTrainer, StepPlan, SummingTrainer, by_steps, is_common
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.simulation.sums import BlockSums

if TYPE_CHECKING:
    from fedlearn.arrays import Array, Arrays
    from fedlearn.learning.backend import Work
    from fedlearn.learning.memory import Memories
    from fedlearn.learning.population import Population
    from fedlearn.learning.postprocess import Postprocessor
    from fedlearn.learning.strategy import Pass, Tensors
    from fedlearn.privacy.site import SitePlan
    from fedlearn.simulation.blocks import BlockTrainer, IntArray, Layout, Stacked, SummedPass
    from fedlearn.simulation.plan import TrainingPlan, Way
    from fedlearn.study import Study


class BlockRunner:
    """Trains and scores blocks, one after another, with a model of its own.

    Args:
        study: local hyper-parameters and seed.
        population: everybody's data.
        strategy: the client rule.
        model: of the task's architecture, on the device to train on, in the study's precision.
        memories: the clients' memories between rounds.
    """

    def __init__(
        self,
        study: Study,
        population: Population,
        strategy: Strategy,
        model: torch.nn.Module,
        memories: Memories,
    ) -> None:
        self._study, self._population, self._strategy = study, population, strategy
        self._model, self._memories = model, memories
        self._device = next(model.parameters()).device
        self._trainers: dict[Way, BlockTrainer] = {}
        self._stacks: dict[str, torch.Tensor] = {}
        self._oracle: SequentialBackend | None = None
        self._unit = None if study.privacy is None else study.privacy.unit
        self._summed, self._sums_only = sums_blocks(strategy, study), asks_for_sums_only(strategy, study)

    def run(self, plan: TrainingPlan, work: Work, clients: Sequence[str]) -> list[Fitted | Summed | Failed]:
        """Train these clients of a cohort as planned; each is in exactly one reply.

        Raises:
            Exception: whatever the task's or the model's code raises; nothing has changed.
        """
        if plan.way not in self._trainers:
            self._trainers[plan.way] = plan.trainer(self._population.task, self._model, self._study)
        trainer = self._trainers[plan.way]
        if self._unit in {"record", "group"} and not isinstance(trainer, PrivateTrainer):
            return self._alone(work, clients)
        members, idle, failed = self._gather(work, clients)
        out = BlockSums(self._strategy, chain_of(self._study, work.shared), self._study.train.precision)
        # A first state is made by the client rule from no state at all, so the two kinds do not mix in a stack.
        for group in ([m for m in members if not m.state], [m for m in members if m.state]):
            if group:
                failed += self._train(trainer, work, group, out)
        return failed + (self._alone(work, idle) if idle else [])

    def score(self, work: Work, clients: Sequence[str]) -> list[Scored | Failed]:
        """Metrics of the global model on each client's test rows, with everybody's rows in the same batches."""
        task, study = self._population.task, self._study
        replies: list[Scored | Failed] = []
        tests: dict[str, Batch] = {}
        for client in clients:
            try:
                tests[client] = self._population.client(client).test
            except FedlearnError as error:
                replies.append(Failed(client, error.message))
        replies += [self._scored(work, client, test) for client, test in tests.items() if not len(test)]
        tests = {client: test for client, test in tests.items() if len(test)}
        if not tests:
            return replies
        x, y = (np.concatenate([getattr(test, part) for test in tests.values()]) for part in ("x", "y"))
        size = study.evaluate.batch_size
        outputs, losses = local.predict(task, self._model, study.train, Batch(x, y), work.model, size)
        first = 0
        for client, test in tests.items():
            mine = slice(first, first + len(test))
            first = mine.stop
            replies.append(self._scored(work, client, test, outputs[mine], losses[mine]))
        return replies

    def _scored(
        self, work: Work, client: str, test: Batch, outputs: Array | None = None, losses: Array | None = None
    ) -> Scored:
        """One client's reply; outputs and losses of its test rows, if it has any."""
        task, study = self._population.task, self._study
        if is_charged(study):
            at = (work.round, client)
            known = np.empty(0) if outputs is None else outputs
            cells = noisy_sums(study, task.scoring(), lambda rows: known[rows], test, at, rehearsal=True)
            return Scored(client, {}, 0, cells)
        if outputs is None or losses is None:
            return Scored(client, {}, 0)
        return Scored(client, {**task.metrics(outputs, test.y), "loss": float(losses.mean())}, len(test))

    def _gather(
        self, work: Work, clients: Sequence[str]
    ) -> tuple[list[_Member], list[str], list[Fitted | Summed | Failed]]:
        """Everybody's rows and state; who takes part without rows; and who cannot take part."""
        members: list[_Member] = []
        idle: list[str] = []
        failed: list[Fitted | Summed | Failed] = []
        try:
            found: Sequence[Batch | None] = self._population.block(clients)
        except FedlearnError:  # somebody's rows cannot be had: asked one by one, it is known whose
            found = [None] * len(clients)
        for client, batch in zip(clients, found, strict=True):
            try:
                data = batch if batch is not None else self._population.client(client).train
                if not len(data):
                    if self._unit != "client":
                        raise UpdateError(f"client {client!r}: no training rows, so it has nothing to add to the mean")
                    idle.append(client)  # under a client-level plan it counts like any other, with an update of zero
                    continue
                state = self._memories.at(client, work.base.get(client)) if self._strategy.stateful else {}
                site = site_plan(self._study, work.round, client, data, rehearsal=True)
                members.append(_Member(client, data, state, site))
            except FedlearnError as error:
                failed.append(Failed(client, error.message))
        return members, idle, failed

    def _train(
        self, trainer: BlockTrainer, work: Work, members: list[_Member], out: BlockSums
    ) -> list[Fitted | Summed | Failed]:
        order = by_steps(self._study.train, [m.client for m in members], [len(m.data) for m in members])
        members = [members[i] for i in order]
        block = Block(self._study.seed, work.round, tuple(m.client for m in members), tuple(m.data for m in members))
        model, shared = self._tensors(work.model, without_clip(work.shared))
        start = ClientStart(model, shared, self._stacked(members))
        passes = self._strategy.client_passes(start)
        if self._sums_only and isinstance(trainer, SummingTrainer) and _are_alike(passes, start):
            try:
                return [self._train_sum(trainer, block, members, passes[0], out)]
            except UpdateError:  # somebody's update is not finite or too large: taken apart, it is refused by name
                pass
        trained: dict[str, Trained] = {}
        facts: list[dict[str, float]] = [{} for _ in members]
        main: Stacked | None = None
        sites = [m.site for m in members if m.site is not None]
        for one in passes:
            if sites and one.name == MAIN:
                assert isinstance(trainer, PrivateTrainer)
                done: Stacked = trainer.run_private(one.initial, one.direction, block, sites)
                steps = np.array([site.plan.steps for site in sites])
            else:
                plan = StepPlan.of(self._study.train, block, one.name)
                done, steps = trainer.run(one.initial, one.direction, block, plan), plan.steps
            weights = trainer.layout.views(done.weights)
            trained[one.name] = Trained(weights, torch.from_numpy(steps).to(self._device), self._study.train.lr)
            if one.name == MAIN:
                facts = facts if sites else _facts(done, steps)
                main = done
        assert main is not None, "a strategy has a main pass"
        if type(self._strategy).client_finish is Strategy.client_finish:
            flat = torch.empty(trainer.layout.size, dtype=main.weights.dtype, device=self._device)
            trainer.layout.fill(flat, start.model)
            return self._release(trainer.layout, members, {DELTA: main.weights.sub_(flat)}, facts, out)
        finish = self._strategy.client_finish(start, trained)
        for i, member in enumerate(members if self._strategy.stateful else ()):
            state = {name: tensor[i].cpu().numpy().copy() for name, tensor in finish.state.items()}
            self._memories.keep(member.client, (work.round, work.attempt), state)
        releases = {
            release: self._flat(trainer.layout, release, tensors, main.weights)
            for release, tensors in finish.releases.items()
        }
        return self._release(trainer.layout, members, releases, facts, out)

    def _flat(self, layout: Layout, release: str, tensors: Tensors, like: torch.Tensor) -> torch.Tensor:
        """A release's tensors as a stack like the weights', in memory that the next block uses again."""
        stack = self._stacks.get(release)
        if stack is None or len(stack) < len(like):  # new memory costs more than what is written there
            stack = self._stacks[release] = torch.empty_like(like)
        layout.fill(stack[: len(like)], tensors)
        return stack[: len(like)]

    def _train_sum(
        self, trainer: SummingTrainer, block: Block, members: list[_Member], one: Pass, out: BlockSums
    ) -> Summed:
        """FedAvg's client rule, or FedProx's: nobody needs any client's own update."""
        assert one.direction is None or isinstance(one.direction, Pull)
        plan = StepPlan.of(self._study.train, block, one.name)
        (release,) = self._strategy.releases
        weights = block.counts if release.weighting is Weighting.EXAMPLES else np.ones(len(members))
        done = trainer.run_sum(one.initial, one.direction, block, plan, weights.astype(np.float64))
        return out.reply(
            trainer.layout, {release.name: done.total.double()}, _examples(members), _facts(done, plan.steps)
        )

    def _tensors(self, *parts: Arrays) -> Iterator[Tensors]:
        for arrays in parts:  # copies: torch wants them writable
            yield {name: torch.from_numpy(np.array(array)).to(self._device) for name, array in arrays.items()}

    def _stacked(self, members: list[_Member]) -> Tensors:
        stacks = {name: np.stack([member.state[name] for member in members]) for name in members[0].state}
        return next(self._tensors(stacks))

    def _alone(self, work: Work, clients: Sequence[str]) -> list[Fitted | Summed | Failed]:
        """These clients one after another on this thread, to the oracle's bytes."""
        if self._oracle is None:
            self._oracle = SequentialBackend(
                self._study, self._population, self._strategy, self._device, self._memories
            )
        return list(self._oracle.fit(replace(work, cohort=tuple(clients))))

    def _release(
        self,
        layout: Layout,
        members: list[_Member],
        releases: Mapping[str, torch.Tensor],
        facts: list[dict[str, float]],
        out: BlockSums,
    ) -> list[Fitted | Summed | Failed]:
        """Postprocess and sum the updates: raw ones stay here."""
        # One client's own update is added as the sequential backend's is, bit for bit.
        if self._summed and out.known and len(members) > 1:
            try:
                return [out.of(layout, releases, _examples(members), facts)]
            except UpdateError:  # somebody's is not finite or too large: by itself it is refused by name
                pass
        return [_single(layout, member, releases, facts[i], i, out.chain) for i, member in enumerate(members)]


def _single(
    layout: Layout,
    member: _Member,
    releases: Mapping[str, torch.Tensor],
    facts: dict[str, float],
    row: int,
    chain: Sequence[Postprocessor],
) -> Fitted | Failed:
    private = {
        release: {name: view.cpu().numpy().copy() for name, view in layout.views(stack[row]).items()}
        for release, stack in releases.items()
    }
    try:
        return Fitted(member.client, apply_on_client(chain, Update(private, len(member.data), facts)))
    except FedlearnError as error:
        return Failed(member.client, error.message)


def _examples(members: Sequence[_Member]) -> dict[str, int]:
    """Training rows by client."""
    return {member.client: len(member.data) for member in members}


def _are_alike(passes: Sequence[Pass], start: ClientStart) -> bool:
    """Whether there is one pass, from the global weights and by the same rule for all clients."""
    return len(passes) == 1 and passes[0].initial is start.model and is_common(passes[0])


def sums_blocks(strategy: Strategy, study: Study) -> bool:
    """True when the updates of several clients may leave as one sum; what secure aggregation rounds is each client's own."""
    return strategy.linear and not study.secure_aggregation.enabled


def asks_for_sums_only(strategy: Strategy, study: Study) -> bool:
    """True when nobody needs any client's own update: plain local training, nothing done to an update, a linear aggregate."""
    if (
        type(strategy).client_finish is not Strategy.client_finish
        or not sums_blocks(strategy, study)
        or chain_of(study)
    ):
        return False
    nothing = ClientStart({})
    try:
        return _are_alike(strategy.client_passes(nothing), nothing)
    except Exception:  # a rule that cannot do without weights is not one that all clients share
        return False


@dataclass(frozen=True)
class _Member:
    """A client of a block: its training rows, its memory, empty the first time, and what DP-SGD has to keep to, if it does it."""

    client: str
    data: Batch = field(repr=False)
    state: Arrays = field(repr=False)
    site: SitePlan | None = None


def _facts(done: Stacked | SummedPass, steps: IntArray) -> list[dict[str, float]]:
    sums: npt.NDArray[np.float64] = done.loss_sums
    return [
        {"loss": float(total / count), "steps": float(taken)}
        for total, count, taken in zip(sums, done.loss_counts, steps, strict=True)
    ]
