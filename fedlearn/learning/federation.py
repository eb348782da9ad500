"""The one round loop: a simulation, a federation over our link and a rehearsal on Flower are this, with another backend.

Each round goes through the release path's `RoundMachine` on a journal, so a crash anywhere is resumed where it happened: the
machine says what to do next, and the checkpoint is written in the same transaction as the round's record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedlearn import arrays as named
from fedlearn import events
from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import LocalProtocolError, RunFailedError, StateError, UpdateError
from fedlearn.learning.attendance import FIRST, MOST_REASONS, Attendance
from fedlearn.learning.averages import l2_norm, mean_metrics, weighted_mean
from fedlearn.learning.backend import Backend, Failed, Fitted, Said, Scored, Summed, Work
from fedlearn.learning.checkpoint import PARTS, broadcast_digest, checkpoint_key, state_from_bytes, state_to_bytes
from fedlearn.learning.cohort import pick_cohort
from fedlearn.learning.collect import Collector, collector_for, update_checksum, update_size
from fedlearn.learning.combine import check_combination
from fedlearn.learning.conditions import Conditions
from fedlearn.learning.postprocess import apply_on_server, chain_of
from fedlearn.learning.recorded import claims_of, row_of
from fedlearn.learning.strategy import ServerState, Strategy
from fedlearn.learning.update import DELTA, Aggregate
from fedlearn.privacy.evaluation import Reader
from fedlearn.privacy.statement import Statements, attempts_at
from fedlearn.privacy.study import with_clip, without_clip
from fedlearn.release.checksum import checksum_of
from fedlearn.release.coordinator import RoundMachine
from fedlearn.release.keys import AttemptId, record_key
from fedlearn.release.round import Begin, NoMasking, Resume, RoundPolicy, RoundState
from fedlearn.release.round import Failed as RunOver

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.secure_sum import SecureRounds, SecureSum
    from fedlearn.privacy.central import CentralPlan
    from fedlearn.release.journal import Journal
    from fedlearn.study import Study


EVALUATED_AT_MOST: Final = 1_000
"""Clients of one evaluation where the study names no number."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        state: the server's state after the last committed round.
        history: one row a round, with its evaluation where there was one.
        stopped: True when somebody stopped the run before its last round.
        privacy: what was released, as `fedlearn.privacy.statement.statement` says it; None where the study asks for no privacy.
    """

    state: ServerState
    history: tuple[Mapping[str, Any], ...] = field(repr=False)
    stopped: bool = False
    privacy: Mapping[str, Any] | None = None


class Federation:
    """One run of one study.

    Args:
        study: what to run.
        run: the run's name.
        strategy: both rules.
        initial: the model before the first round.
        backend: does the clients' work.
        journal: durable, of this run; a second `Federation` on it goes on where the first one stopped.
        metric: the task's primary metric.
        emit: takes events.
        clock: durations come from it.
        should_stop: asked between rounds.
        conditions: of a simulated world; None in the real one.
        secure: the rounds' masks; given exactly where the study asks for secure aggregation.
        may_join: False where nobody else can come, as in a simulation: `cohort.wait_for` is then of no use.
        rehearsal: all chance follows from the study's seed, whatever it asks for: a simulation.
    """

    def __init__(
        self,
        study: Study,
        run: str,
        strategy: Strategy,
        initial: Arrays,
        backend: Backend,
        journal: Journal,
        *,
        metric: str,
        emit: events.Emit,
        clock: Clock | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        may_join: bool = True,
        rehearsal: bool = False,
        conditions: Conditions | None = None,
        secure: SecureRounds | None = None,
    ) -> None:
        check_combination(study, strategy)
        if (secure is None) == study.secure_aggregation.enabled:
            raise LocalProtocolError("federation: its rounds are not masked as the study asks")
        self._secure = secure
        self._central = _central_plan(study, journal, run, rehearsal=rehearsal)
        # Under a plan a metric of a site leaves it through a charged mechanism or not at all; a rehearsal has no site.
        self._may_score = study.privacy is None or rehearsal or study.privacy.evaluation_noise is not None
        self._reader = Reader.of(study)
        self._study, self._run, self._strategy, self._backend = study, run, strategy, backend
        self._journal, self._metric, self._emit, self._should_stop = journal, metric, emit, should_stop
        self._clock = clock if clock is not None else SystemClock()
        self._conditions = conditions
        least = strategy.min_clients if secure is None else max(strategy.min_clients, secure.least)
        self._attendance = Attendance(study, run, backend, journal, least, self._central, conditions, may_join)
        self._least = 0 if self._central else max(study.cohort.minimum, strategy.min_clients)
        self._fewest = self._least if secure is None else max(self._least, secure.least)
        self._statements = Statements(study, run, emit, rehearsal=rehearsal)
        self._chain = chain_of(study)
        self._initial = initial
        self._state = self._load_state()
        self._collector: Collector | None = None
        self._machine: RoundMachine[Any, Any] = RoundMachine(
            journal,
            run,
            self._new_sum,
            checksum=update_checksum if secure is None else checksum_of,
            size=update_size if secure is None else len,
            masking=NoMasking if secure is None else lambda: self._secure_sum,
            policy=RoundPolicy(
                min_survivors=self._least,
                max_attempts=study.runtime.max_attempts,
            ),
        )
        self._population = 0
        self.kept: Outcome | None = None
        """What a run that failed had committed."""

    def run(self) -> Outcome:
        """Run to the last round, or until stopped.

        Raises:
            RunFailedError: too few clients came, or a round was void too often; what was committed is in the journal.
        """
        started_s = self._clock.monotonic()
        if self._conditions is not None:
            self._conditions.resume(self.history())
        try:
            clients = self._gather()
            self._population = self._attendance.population(len(clients))
            self._statements.begin()
            self._emit(
                events.RunStarted(
                    self._run,
                    self._study.name,
                    self._study.rounds,
                    self._state.round,
                    tuple(clients[: events.MOST_NAMED]),
                    sum(int(a.size) for a in self._state.model.values()),
                    self._metric,
                    len(clients),
                )
            )
            self._evaluate_if_due()
            while (step := self._machine.next_step) != _past_the_last(self._study.rounds):
                if self._should_stop():
                    privacy = self._statements.end(self.history(), self._machine)
                    self._emit(events.RunStopped(self._run, self._state.round))
                    return Outcome(self._state, self.history(), stopped=True, privacy=privacy)
                self._round(step)
        except RunFailedError as error:
            privacy = self._statements.end(self.history(), self._machine)
            self.kept = Outcome(self._state, self.history(), stopped=True, privacy=privacy)
            self._emit(events.RunFailed(self._run, error.message, error.hint))
            raise
        finally:
            if self._collector is not None:
                self._collector.close()
        digest = named.digest(self._state.model)
        privacy = self._statements.end(self.history(), self._machine)
        self._emit(events.RunFinished(self._run, self._state.round, self._clock.monotonic() - started_s, digest))
        return Outcome(self._state, self.history(), privacy=privacy)

    def history(self) -> tuple[Mapping[str, Any], ...]:
        """One row for each committed round, as recorded."""
        rows = []
        for number in range(1, self._state.round + 1):
            record = self._machine.record(number)
            row = {} if record is None else json.loads(record)
            evaluated = self._journal.get(self._place("evaluated", number))
            rows.append({"round": number, **row, **({} if evaluated is None else json.loads(evaluated))})
        return tuple(rows)

    @property
    def attempts(self) -> int:
        """Attempts at rounds so far: committed, void, or under way."""
        return attempts_at(self.history(), self._machine)

    def _round(self, step: Begin | Resume | RunOver) -> None:
        if isinstance(step, RunOver):
            raise RunFailedError(step.reason, hint="see the run's events for what each client reported")
        started_s = self._clock.monotonic()
        digest = broadcast_digest(self._state)
        if isinstance(step, Resume):
            roster, cohort = step.roster, step.roster if step.survivors is None else step.survivors
            if step.key.model_digest != digest:
                raise StateError(
                    f"run {self._run}: the journal's open attempt is for another model than its checkpoint"
                )
            at = step.key.at
        else:
            at = step.at
            roster = cohort = self._attendance.cohort(at)
            self._machine.begin(at, cohort, digest)
        self._emit(events.RoundStarted(self._run, at.round, at.attempt, len(cohort)))
        work = self._work(at, cohort, digest, roster)
        losses = self._hear(at, work)
        if self._machine.state is RoundState.OPEN:
            self._machine.close()
        elif self._machine.state is RoundState.REFILL:
            self._machine.void("the sum could not be made again after the coordinator's restart")
        if self._secure is not None:
            self._secure.open(self._machine, work)
        if self._machine.state is not RoundState.SUMMED:
            self._give_up(at)
            return
        released = self._release(at)
        if released is None:
            self._give_up(at)
            return
        aggregate, clip_l2 = released
        clients = len(self._machine.survivors)
        seen = None if self._secure is None else self._secure.event(self._run, at.round, aggregate.means[DELTA])
        self._state = self._next_state(at, aggregate, clip_l2)
        finished = events.RoundFinished(
            self._run,
            at.round,
            at.attempt,
            clients=clients,
            dropped=len(roster) - clients,
            seconds=self._clock.monotonic() - started_s,
            train_loss=weighted_mean(losses),
            update_norm=l2_norm(aggregate.means[DELTA]),
            environment={} if self._conditions is None else self._conditions.facts(at),
        )
        kept = {} if self._central is None else self._central.closing(at, roster)
        self._machine.commit(row_of(finished), {**kept, checkpoint_key(self._run): state_to_bytes(self._state)})
        if seen is not None:
            self._emit(seen)
        self._emit(finished)
        self._evaluate_if_due()

    def _hear(self, at: AttemptId, work: Work) -> dict[str, tuple[float, int]]:
        """Take every reply to the machine, or as many as are needed to see that it is in vain; the loss and the examples of each client in the sum."""
        losses: dict[str, tuple[float, int]] = {}
        refused: list[str] = []
        with closing(self._replies(work)) as replies:
            for reply in replies:
                reason = self._take(reply)
                for client, facts, examples in claims_of(reply):
                    if reason is None:
                        losses[client] = (facts.get("loss", math.nan), examples)
                        self._emit(events.ClientFinished(self._run, at.round, client, facts))
                    else:
                        self._emit(self._dropped(at.round, client, reason, reply))
                if isinstance(reply, Failed):
                    if reply.permanent:
                        why, _, _ = reply.reason.partition("\n")
                        refused.append(f"{reply.client} refuses the rest of the run: {why}")
                    if few := self._too_few(work, refused):
                        self._machine.void(few)
                        break
        return losses

    def _too_few(self, work: Work, refused: list[str]) -> str:
        """Why an attempt is given up before all have answered, so that whoever was not charged for it is not; empty where nobody refused the run."""
        machine = self._machine
        if not refused or machine.state is not RoundState.OPEN:
            return ""
        left = len(machine.received) + len(machine.waiting)
        if left >= self._fewest:
            return ""
        few = f"{left} of {len(work.cohort)} clients are left, at least {self._fewest} needed"
        return "; ".join([few, *refused[:MOST_REASONS]])

    def _replies(self, work: Work) -> Generator[Fitted | Summed | Said | Failed, None, None]:
        if work.cohort:
            yield from (self._backend.fit(work) if self._secure is None else self._secure.train(self._machine, work))

    def _dropped(self, round_: int, client: str, reason: str, reply: object) -> events.ClientDropped:
        virtual, permanent = (reply.virtual, reply.permanent) if isinstance(reply, Failed) else (False, False)
        return events.ClientDropped(self._run, round_, client, reason, virtual, permanent)

    def _take(self, reply: Fitted | Summed | Said | Failed) -> str | None:
        """Hand a reply to the machine; None when it entered the sum, else the reason why not."""
        if isinstance(reply, Failed):
            self._machine.gone(reply.client)
            return reply.reason
        if isinstance(reply, Summed):
            partial = reply.partial
            answer = self._machine.receive_sum(
                partial.examples, self._machine.key, partial.checksum(), lambda total: total.merge(partial)
            )
        else:
            if self._central is not None and isinstance(reply, Fitted):
                reason = self._central.refusal(reply.update, self._state.shared)
                if reason is not None:
                    self._machine.gone(reply.client)
                    return reason
            payload = reply.body if isinstance(reply, Said) else reply.update
            answer = self._machine.receive(reply.client, self._machine.key, payload)
        return getattr(answer, "message", None)

    def _release(self, at: AttemptId) -> tuple[Aggregate, float | None] | None:
        """What the server rule may see of the sum, and the next clip of an adaptive one; None when the attempt is void."""
        total = self._machine.total
        if self._secure is not None:
            total = self._secure.opened(total, at.round, self._state.shared)
        try:
            if self._central is not None:
                return self._central.release(at, total, self._state.shared)
            return apply_on_server(self._chain, total.aggregate(self._population)), None
        except UpdateError as error:
            self._machine.void(error.message)
            return None

    def _new_sum(self) -> Collector | SecureSum:
        """An empty one for the machine, which forgets the one before: a sum, or files on disk."""
        if self._secure is not None:
            self._secure_sum = self._secure.new_sum()
            return self._secure_sum
        if self._collector is not None:
            self._collector.close()
        counted = self._central is not None and self._central.counted
        self._collector = collector_for(self._strategy, self._initial, counted=counted)
        return self._collector

    def _next_state(self, at: AttemptId, aggregate: Aggregate, clip_l2: float | None) -> ServerState:
        """What the server rule makes of the aggregate. A rule that overflows would do so again, so the run ends."""
        before = replace(self._state, shared=without_clip(self._state.shared))
        with np.errstate(over="ignore", invalid="ignore"):  # looked for in the result
            state = self._strategy.server_step(before, aggregate)
        state = replace(state, round=at.round, shared=with_clip(state.shared, clip_l2))
        try:
            for part in PARTS:
                named.check_finite(getattr(state, part), what=f"round {at.round}: the server's {part}")
        except UpdateError as error:
            self._machine.fail(error.message)
            raise RunFailedError(
                error.message, hint="training diverged; lower train.lr or strategy's server_lr"
            ) from None
        return state

    def _give_up(self, at: AttemptId) -> None:
        self._emit(events.RoundVoid(self._run, at.round, at.attempt, self._machine.reason))

    def _evaluate_if_due(self) -> None:
        if not self._evaluation_due():
            return
        number = self._state.round
        clients = pick_cohort(
            self._backend.clients(),
            self._study.evaluate.clients or EVALUATED_AT_MOST,
            self._study.seed,
            "evaluate",
            number,
        )
        # Under the name of the attempt that made this model: a site refuses an attempt earlier than one it has seen.
        at = self._machine.committed or AttemptId(number, 1)
        work = self._work(at, clients, broadcast_digest(self._state))
        scored = []
        for reply in self._backend.evaluate(work):
            if isinstance(reply, Scored):
                scored.append(reply)
            elif reply.permanent:
                self._emit(self._dropped(number, reply.client, reply.reason, reply))
        scored.sort(key=lambda s: s.client)
        scored, means = self._reader.read(scored) if self._reader is not None else (scored, mean_metrics(scored))
        event = events.Evaluated(
            self._run,
            number,
            means,
            {s.client: dict(s.metrics) | {"examples": s.examples} for s in scored},
        )
        self._journal.write({self._place("evaluated", number): row_of(event)})
        self._emit(event)

    def _evaluation_due(self) -> bool:
        number, every = self._state.round, self._study.evaluate.every
        due = self._may_score and number > 0 and every > 0 and (number % every == 0 or number == self._study.rounds)
        return due and self._journal.get(self._place("evaluated", number)) is None

    def _work(self, at: AttemptId, cohort: tuple[str, ...], digest: str, roster: tuple[str, ...] = ()) -> Work:
        bases = {client: base for client in roster or cohort if (base := self._machine.base_of(client)) is not None}
        return Work(
            at.round,
            at.attempt,
            cohort,
            self._state.model,
            self._state.shared,
            digest,
            bases,
            self._study.runtime.deadline_s,
        )

    def _gather(self) -> Sequence[str]:
        """The clients to start with. A resumed run gives those of its first start time to come back, so that it ends as it would have."""
        step = self._machine.next_step
        past = step == _past_the_last(self._study.rounds)
        if isinstance(step, RunOver) or (past and not self._evaluation_due()):
            return self._backend.clients()
        here = self._attendance.returned()
        return here if past else self._attendance.wait(first=step == Begin(FIRST))

    def _load_state(self) -> ServerState:
        data = self._journal.get(checkpoint_key(self._run))
        if data is not None:
            return state_from_bytes(data, self._initial)
        state = self._strategy.server_init(self._initial)
        return replace(state, shared=with_clip(state.shared, self._central.first_clip if self._central else None))

    def _place(self, *parts: str | int) -> str:
        return record_key(parts[0], self._run, *parts[1:])


def _central_plan(study: Study, journal: Journal, run: str, *, rehearsal: bool) -> CentralPlan | None:
    if study.privacy is None:
        return None  # so that a run without privacy loads nothing of it
    from fedlearn.privacy.central import CentralPlan

    return CentralPlan.of(study, journal, run, rehearsal=rehearsal)


def _past_the_last(rounds: int) -> Begin:
    return Begin(AttemptId(rounds + 1, 1))
