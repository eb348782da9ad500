"""One block of a cohort: data in, one sum out. What a thread does here, and an actor elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from fedlearn.aggregation.linear import IntegerSum, quantum_bits_for
from fedlearn.arrays import Spec
from fedlearn.errors import FedlearnError, UpdateError
from fedlearn.learning import local
from fedlearn.learning.backend import Failed, Fitted, Scored, Summed
from fedlearn.learning.collect import PartialSum
from fedlearn.learning.postprocess import ClipL2, apply_on_client, chain_of
from fedlearn.learning.strategy import MAIN, ClientStart, Pull, Strategy, Trained
from fedlearn.learning.task import Batch
from fedlearn.learning.update import DELTA, Update, Weighting
from fedlearn.simulation.blocks import Block, StepPlan, SummingTrainer, by_steps, is_common

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Work
    from fedlearn.learning.memory import Memories
    from fedlearn.learning.strategy import Pass, Tensors
    from fedlearn.learning.task import Population
    from fedlearn.simulation.blocks import BlockTrainer, Layout, Stacked, SummedPass
    from fedlearn.simulation.plan import TrainingPlan, Way
    from fedlearn.study import Study

COLUMNS: Final = 1 << 16
"""Parameters that are summed at a time in float64, so that a sum needs no second copy of the stack."""


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
        self._chain = chain_of(study)
        self._sums_only = asks_for_sums_only(strategy, study)
        self._precision = np.dtype(study.train.precision)

    def run(self, plan: TrainingPlan, work: Work, clients: Sequence[str]) -> list[Fitted | Summed | Failed]:
        """Train these clients of a cohort as planned; each is in exactly one reply.

        Raises:
            Exception: whatever the task's or the model's code raises; nothing has changed.
        """
        if plan.way not in self._trainers:
            self._trainers[plan.way] = plan.trainer(self._population.task, self._model, self._study)
        trainer = self._trainers[plan.way]
        members, failed = self._gather(work, clients)
        # A first state is made by the client rule from no state at all, so the two kinds do not mix in a stack.
        for group in ([m for m in members if not m.state], [m for m in members if m.state]):
            if group:
                failed += self._train(trainer, work, group)
        return failed

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
        replies += [Scored(client, {}, 0) for client, test in tests.items() if not len(test)]
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
            metrics = {**task.metrics(outputs[mine], test.y), "loss": float(losses[mine].mean())}
            replies.append(Scored(client, metrics, len(test)))
        return replies

    def _gather(self, work: Work, clients: Sequence[str]) -> tuple[list[_Member], list[Fitted | Summed | Failed]]:
        """Everybody's rows and state, and who cannot take part."""
        members: list[_Member] = []
        failed: list[Fitted | Summed | Failed] = []
        try:
            found: Sequence[Batch | None] = self._population.block(clients)
        except FedlearnError:  # somebody's rows cannot be had: asked one by one, it is known whose
            found = [None] * len(clients)
        for client, batch in zip(clients, found, strict=True):
            try:
                data = batch if batch is not None else self._population.client(client).train
                if not len(data):
                    raise UpdateError(f"client {client!r}: no training rows, so it has nothing to add to the mean")
                state = self._memories.at(client, work.base.get(client)) if self._strategy.stateful else {}
                members.append(_Member(client, data, state))
            except FedlearnError as error:
                failed.append(Failed(client, error.message))
        return members, failed

    def _train(self, trainer: BlockTrainer, work: Work, members: list[_Member]) -> list[Fitted | Summed | Failed]:
        order = by_steps(self._study.train, [m.client for m in members], [len(m.data) for m in members])
        members = [members[i] for i in order]
        block = Block(self._study.seed, work.round, tuple(m.client for m in members), tuple(m.data for m in members))
        model, shared = self._tensors(work.model, work.shared)
        start = ClientStart(model, shared, self._stacked(members))
        passes = self._strategy.client_passes(start)
        if self._sums_only and isinstance(trainer, SummingTrainer) and _are_alike(passes, start):
            try:
                return [self._train_sum(trainer, block, members, passes[0])]
            except UpdateError:  # somebody's update is not finite or too large: taken apart, it is refused by name
                pass
        trained: dict[str, Trained] = {}
        facts: list[dict[str, float]] = []
        main: Stacked | None = None
        for one in passes:
            plan = StepPlan.of(self._study.train, block, one.name)
            done = trainer.run(one.initial, one.direction, block, plan)
            weights = trainer.layout.views(done.weights)
            trained[one.name] = Trained(weights, torch.from_numpy(plan.steps).to(self._device), self._study.train.lr)
            if one.name == MAIN:
                facts = _facts(done, plan)
                main = done
        assert main is not None, "a strategy has a main pass"
        if type(self._strategy).client_finish is Strategy.client_finish:
            flat = torch.empty(trainer.layout.size, dtype=main.weights.dtype, device=self._device)
            trainer.layout.fill(flat, start.model)
            return self._release(trainer.layout, members, {DELTA: main.weights.sub_(flat)}, facts)
        finish = self._strategy.client_finish(start, trained)
        for i, member in enumerate(members if self._strategy.stateful else ()):
            state = {name: tensor[i].cpu().numpy().copy() for name, tensor in finish.state.items()}
            self._memories.keep(member.client, (work.round, work.attempt), state)
        releases = {
            release: self._flat(trainer.layout, release, tensors, main.weights)
            for release, tensors in finish.releases.items()
        }
        return self._release(trainer.layout, members, releases, facts)

    def _flat(self, layout: Layout, release: str, tensors: Tensors, like: torch.Tensor) -> torch.Tensor:
        """A release's tensors as a stack like the weights', in memory that the next block uses again."""
        stack = self._stacks.get(release)
        if stack is None or len(stack) < len(like):  # new memory costs more than what is written there
            stack = self._stacks[release] = torch.empty_like(like)
        layout.fill(stack[: len(like)], tensors)
        return stack[: len(like)]

    def _train_sum(self, trainer: SummingTrainer, block: Block, members: list[_Member], one: Pass) -> Summed:
        """FedAvg's client rule, or FedProx's: nobody needs any client's own update."""
        assert one.direction is None or isinstance(one.direction, Pull)
        plan = StepPlan.of(self._study.train, block, one.name)
        (release,) = self._strategy.releases
        weights = block.counts if release.weighting is Weighting.EXAMPLES else np.ones(len(members))
        done = trainer.run_sum(one.initial, one.direction, block, plan, weights.astype(np.float64))
        return self._as_reply(trainer.layout, members, {release.name: done.total.double()}, _facts(done, plan))

    def _tensors(self, *parts: Arrays) -> Iterator[Tensors]:
        for arrays in parts:  # copies: torch wants them writable
            yield {name: torch.from_numpy(np.array(array)).to(self._device) for name, array in arrays.items()}

    def _stacked(self, members: list[_Member]) -> Tensors:
        stacks = {name: np.stack([member.state[name] for member in members]) for name in members[0].state}
        return next(self._tensors(stacks))

    def _release(
        self,
        layout: Layout,
        members: list[_Member],
        releases: Mapping[str, torch.Tensor],
        facts: list[dict[str, float]],
    ) -> list[Fitted | Summed | Failed]:
        """Postprocess and sum the updates: raw ones stay here."""
        summable = self._strategy.linear and all(isinstance(step, ClipL2) for step in self._chain)
        # One client's own update is added as the sequential backend's is, bit for bit.
        if summable and len(members) > 1:
            try:
                return [self._sum(layout, members, releases, facts)]
            except UpdateError:  # somebody's is not finite or too large: by itself it is refused by name
                pass
        return [self._single(layout, member, releases, facts[i], i) for i, member in enumerate(members)]

    def _sum(
        self,
        layout: Layout,
        members: list[_Member],
        releases: Mapping[str, torch.Tensor],
        facts: list[dict[str, float]],
    ) -> Summed:
        """The weighted sum of everybody's update.

        Raises:
            UpdateError: it is not finite, or too large to be held in integers.
        """
        examples = torch.tensor([float(len(m.data)) for m in members], dtype=torch.float64, device=self._device)
        scale = self._clip_scales(releases)
        totals = {}
        for release in self._strategy.releases:
            weights = scale * examples if release.weighting is Weighting.EXAMPLES else scale
            stack = releases[release.name]
            parts = [weights @ stack[:, i : i + COLUMNS].double() for i in range(0, stack.shape[1], COLUMNS)]
            totals[release.name] = torch.cat(parts)
        return self._as_reply(layout, members, totals, facts)

    def _as_reply(
        self, layout: Layout, members: list[_Member], totals: Mapping[str, torch.Tensor], facts: list[dict[str, float]]
    ) -> Summed:
        """The block's weighted sums, flat and in float64, in integers."""
        examples = {member.client: len(member.data) for member in members}
        sums = {}
        for release in self._strategy.releases:
            named = {name: t.numpy() for name, t in layout.views(totals[release.name].cpu()).items()}
            specs = {name: Spec(a.shape, self._precision.name) for name, a in named.items()}
            weight = sum(examples.values()) if release.weighting is Weighting.EXAMPLES else len(members)
            sums[release.name] = IntegerSum(specs, quantum_bits_for(specs))
            sums[release.name].add_sum(named, weight, len(members))
        return Summed(PartialSum(sums, examples), {member.client: facts[i] for i, member in enumerate(members)})

    def _clip_scales(self, releases: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What each client's update is multiplied with, shape (clients,), float64: the clipping steps of the chain, one after another."""
        first = next(iter(releases.values()))
        scales = torch.ones(len(first), dtype=torch.float64, device=self._device)
        bounds = [step.clip_l2 for step in self._chain if isinstance(step, ClipL2)]
        if not bounds:
            return scales
        each = [torch.linalg.vector_norm(stack, dim=1, dtype=torch.float64) for stack in releases.values()]
        norms = torch.stack(each).square().sum(0).sqrt()
        if not norms.isfinite().all():
            raise UpdateError("update: its L2 norm is not finite")
        return torch.clamp(min(bounds) / norms, max=1.0)

    def _single(
        self, layout: Layout, member: _Member, releases: Mapping[str, torch.Tensor], facts: dict[str, float], row: int
    ) -> Fitted | Failed:
        private = {
            release: {name: view.cpu().numpy().copy() for name, view in layout.views(stack[row]).items()}
            for release, stack in releases.items()
        }
        try:
            return Fitted(member.client, apply_on_client(self._chain, Update(private, len(member.data), facts)))
        except FedlearnError as error:
            return Failed(member.client, error.message)


def _are_alike(passes: Sequence[Pass], start: ClientStart) -> bool:
    """Whether there is one pass, from the global weights and by the same rule for all clients."""
    return len(passes) == 1 and passes[0].initial is start.model and is_common(passes[0])


def asks_for_sums_only(strategy: Strategy, study: Study) -> bool:
    """True when nobody needs any client's own update: plain local training, nothing done to an update, a linear aggregate."""
    if type(strategy).client_finish is not Strategy.client_finish or not strategy.linear or chain_of(study):
        return False
    nothing = ClientStart({})
    try:
        return _are_alike(strategy.client_passes(nothing), nothing)
    except Exception:  # a rule that cannot do without weights is not one that all clients share
        return False


@dataclass(frozen=True)
class _Member:
    """A client of a block: its training rows, and its memory, empty the first time."""

    client: str
    data: Batch = field(repr=False)
    state: Arrays = field(repr=False)


def _facts(done: Stacked | SummedPass, plan: StepPlan) -> list[dict[str, float]]:
    sums: npt.NDArray[np.float64] = done.loss_sums
    return [
        {"loss": float(total / count), "steps": float(steps)}
        for total, count, steps in zip(sums, done.loss_counts, plan.steps, strict=True)
    ]
