"""The round loop on its journal: what it does when clients fail, when rounds are void, and when it dies at any write."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fedlearn import events
from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.clock import MockClock
from fedlearn.data.population import build_population
from fedlearn.errors import RunFailedError, StateError, UnsupportedError
from fedlearn.learning.averages import mean_metrics
from fedlearn.learning.backend import Failed, Fitted, Scored, Work
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.combine import check_combination
from fedlearn.learning.federation import Federation, Outcome
from fedlearn.learning.local import initial_weights
from fedlearn.learning.update import DELTA
from fedlearn.release.journal import DictJournal
from fedlearn.simulation.run import simulate
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.study import Study
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study


class Crash(BaseException):
    """The process dies here."""


class CrashingJournal(DictJournal):
    """Dies at its k-th write, before or after the transaction is on the disk."""

    def __init__(self, at: int, *, applied: bool) -> None:
        super().__init__()
        self.left, self._applied = at, applied

    def write(self, changes):
        self.left -= 1
        if self.left == 0 and not self._applied:
            raise Crash
        super().write(changes)
        if self.left == 0:
            raise Crash


class Backend(SequentialBackend):
    """The sequential backend with clients that fail as told: (client, round, attempt) -> reply."""

    def __init__(self, study: Study, replies=None, here=CLIENTS) -> None:
        task = TinyTask()
        strategy = load_app().strategy(study.strategy.name, study.strategy.options)
        super().__init__(study, build_population(study, task), strategy)
        self.replies, self.here, self.works, self.asked = replies or {}, here, [], []

    def clients(self, at_least=0, timeout_s=0.0):
        self.asked.append((at_least, timeout_s))
        return sorted(self.here)

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        self.works.append(work)
        for reply in super().fit(work):
            change = self.replies.get((reply.client, work.round, work.attempt))
            yield reply if change is None else change(reply)


def fail(reply):
    return Failed(reply.client, "gone")


def federation(study: Study, backend, journal=None, seen=None, **more) -> Federation:
    return Federation(
        study,
        "run",
        load_app().strategy(study.strategy.name, study.strategy.options),
        initial_weights(TinyTask(), study),
        backend,
        journal if journal is not None else DictJournal(),
        metric="accuracy",
        emit=(seen if seen is not None else []).append,
        **more,
    )


def comparable(outcome: Outcome):
    """All that a run leaves but the time it took."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in outcome.history]
    return digest(outcome.state.model), digest(outcome.state.shared), digest(outcome.state.memory), rows


def writes_of(study: Study) -> int:
    journal = CrashingJournal(10**9, applied=False)
    federation(study, Backend(study), journal).run()
    return 10**9 - journal.left


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "fedadam", "ditto", "median"])
@pytest.mark.parametrize("applied", [False, True])
def test_a_crash_at_any_write_changes_nothing(strategy, applied):
    """The coordinator dies at its k-th write, for every k, is started again, and ends as if it had not died."""
    study = tiny_study(f"strategy.name={strategy}", "cohort.size=3", "evaluate.every=2")
    expected = comparable(federation(study, Backend(study)).run())
    total = writes_of(study)
    assert total >= 3 * 3, "a begin, a close and a commit a round at least"
    for k in range(1, total + 1):
        journal, backend = CrashingJournal(k, applied=applied), Backend(study)
        with pytest.raises(Crash):
            federation(study, backend, journal).run()
        outcome = federation(study, backend, journal).run()
        assert comparable(outcome) == expected, f"crash at write {k} of {total}"


def test_crashes_again_and_again_change_nothing():
    study = tiny_study("strategy.name=scaffold", "rounds=4")
    expected = comparable(federation(study, Backend(study)).run())
    journal, backend, crashes = CrashingJournal(1, applied=True), Backend(study), 0
    while True:
        try:
            outcome = federation(study, backend, journal).run()
            break
        except Crash:
            crashes += 1
            journal.left = 1 + crashes % 2
    assert crashes > 8
    assert comparable(outcome) == expected


def test_a_crash_while_updates_arrive_asks_the_same_cohort_again():
    study = tiny_study("cohort.size=2", "rounds=2")

    def die(reply):
        raise Crash

    second = federation(study, Backend(study)).run().history
    probe = Backend(study)
    federation(study, probe).run()
    cohort = probe.works[1].cohort
    journal, backend = DictJournal(), Backend(study, {(cohort[1], 2, 1): die})
    with pytest.raises(Crash):
        federation(study, backend, journal).run()
    backend.replies.clear()
    outcome = federation(study, backend, journal).run()
    assert [w.cohort for w in backend.works[1:]] == [cohort, cohort]
    assert outcome.history[-1]["train_loss"] == second[-1]["train_loss"]


def test_a_finished_run_gives_its_outcome_again_and_asks_nobody():
    study, journal = tiny_study(), DictJournal()
    first = federation(study, Backend(study), journal).run()
    nobody = Backend(study, here=())
    assert comparable(federation(study, nobody, journal).run()) == comparable(first)
    assert nobody.works == []


def test_a_resumed_run_waits_for_as_many_as_it_began_with():
    study = tiny_study("cohort.wait_for=3", "runtime.deadline_s=7", "runtime.wait_s=9")
    journal, backend = CrashingJournal(5, applied=True), Backend(study)
    with pytest.raises(Crash):
        federation(study, backend, journal).run()
    backend.asked.clear()
    federation(study, backend, journal).run()
    assert backend.asked[0] == (4, 7.0)


def test_a_failed_run_stays_failed():
    study = tiny_study("cohort.minimum=4", "runtime.max_attempts=2")
    journal = DictJournal()
    lost = {("bob", 2, a): fail for a in (1, 2)}
    seen: list = []
    for backend in (Backend(study, lost), Backend(study)):
        with pytest.raises(RunFailedError, match="round 2 was void 2 times, the limit; the last time: 3 of 4 clients"):
            federation(study, backend, journal, seen).run()
        assert isinstance(seen[-1], events.RunFailed)
    assert [type(e).__name__ for e in seen].count("RoundVoid") == 2


def test_a_void_round_is_tried_again_and_ends_the_same():
    study = tiny_study("cohort.minimum=4", "strategy.name=scaffold")
    seen: list = []
    backend = Backend(study, {("bob", 2, 1): fail, ("cyd", 3, 1): fail, ("cyd", 3, 2): fail})
    outcome = federation(study, backend, seen=seen).run()
    assert digest(outcome.state.model) == digest(simulate(study).weights)
    assert [(e.round, e.attempt) for e in seen if isinstance(e, events.RoundVoid)] == [(2, 1), (3, 1), (3, 2)]
    assert [row["attempt"] for row in outcome.history] == [1, 2, 3]
    assert {w.base["bob"] for w in backend.works if w.round == 3} == {(2, 2)}


def test_a_dropped_client_is_reported_and_the_round_goes_on():
    study = tiny_study("cohort.minimum=3")
    seen: list = []
    outcome = federation(study, Backend(study, {("bob", 2, 1): fail}), seen=seen).run()
    assert [e for e in seen if isinstance(e, events.ClientDropped)] == [events.ClientDropped("run", 2, "bob", "gone")]
    assert [(row["clients"], row["dropped"]) for row in outcome.history] == [(4, 0), (3, 1), (4, 0)]


def test_the_events_of_a_run_in_order():
    study, seen = tiny_study("rounds=1"), []
    clock = MockClock()
    outcome = federation(study, Backend(study), seen=seen, clock=clock).run()
    kinds = [type(e).__name__ for e in seen]
    assert kinds == ["RunStarted", "RoundStarted", *["ClientFinished"] * 4, "RoundFinished", "Evaluated", "RunFinished"]
    start, end = seen[0], seen[-1]
    assert (start.clients, start.parameters, start.rounds, start.rounds_done) == (CLIENTS, 8, 1, 0)
    assert end == events.RunFinished("run", 1, 0.0, digest(outcome.state.model))
    finished = seen[-3]
    losses = {e.client: e.facts["loss"] for e in seen if isinstance(e, events.ClientFinished)}
    assert min(losses.values()) < finished.train_loss < max(losses.values())


def test_stopped_between_rounds_and_resumed():
    study, journal, seen = tiny_study(), DictJournal(), []
    outcome = federation(
        study, Backend(study), journal, seen, should_stop=lambda: "RoundFinished" in {type(e).__name__ for e in seen}
    ).run()
    assert outcome.stopped
    assert len(outcome.history) == 1
    assert seen[-1] == events.RunStopped("run", 1)


@pytest.mark.parametrize(
    ("overrides", "here", "message"),
    [
        (("cohort.wait_for=4",), ("ada", "bob"), "2 clients connected within 2 s, needs 4"),
        (("cohort.wait_for=1", "cohort.minimum=3"), ("ada", "bob"), "2 clients connected within 2 s, needs 3"),
        (("strategy.name=krum",), CLIENTS, "4 clients connected within 2 s, needs 5"),
    ],
)
def test_too_few_clients(overrides, here, message):
    study = tiny_study(*overrides)
    with pytest.raises(RunFailedError, match=message):
        federation(study, Backend(study, here=here)).run()


def test_why_clients_would_not_take_part_is_said():
    study = tiny_study("cohort.wait_for=2")
    backend = Backend(study, here=("ada",))
    spent = [Failed(client, "budget: 3.1 of 3.0") for client in ("bob", "cyd")]
    backend.refusals = [*spent, Failed("dan", "another app")]
    with pytest.raises(
        RunFailedError, match=r"needs 2; refused: bob, cyd: budget: 3\.1 of 3\.0; refused: dan: another app"
    ):
        federation(study, backend).run()


class Refusing(Backend):
    """Clients that refuse for good are gone, as over a grid."""

    refusals: tuple[Failed, ...] = ()
    could_come: int | None = None

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        for reply in super().fit(work):
            if isinstance(reply, Failed) and reply.permanent:
                self.refusals = (*self.refusals, reply)
                self.here = tuple(c for c in self.here if c != reply.client)
                self.could_come = len(self.here)
            yield reply


def refuse(reply):
    return Failed(reply.client, "budget: spent", permanent=True)


def test_a_refusal_for_good_ends_a_run_that_needs_everybody_without_another_attempt():
    study, seen = tiny_study("cohort.minimum=4", "runtime.max_attempts=5"), []
    backend = Refusing(study, {("ada", 2, 1): refuse})
    run = federation(study, backend, seen=seen)
    with pytest.raises(RunFailedError, match="3 clients are left, needs 4; refused: ada: budget: spent") as caught:
        run.run()
    assert "what a site refuses is for its operator to change" in caught.value.hint
    assert [(w.round, w.attempt) for w in backend.works] == [(1, 1), (2, 1)]
    assert backend.asked[-1] == (4, 0.0), "nobody is waited for"
    second = [e for e in seen if getattr(e, "round", 0) == 2]
    assert second[1:] == [
        events.ClientDropped("run", 2, "ada", "budget: spent", refused=True),
        events.RoundVoid(
            "run", 2, 1, "3 of 4 clients are left, at least 4 needed; ada refuses the rest of the run: budget: spent"
        ),
    ], "the others are not waited for"
    assert run.kept is not None
    assert len(run.kept.history) == 1
    assert seen[-1] == events.RunFailed("run", caught.value.message, caught.value.hint)


def test_a_refusal_for_good_is_no_failure_where_enough_are_left():
    study, seen = tiny_study("cohort.minimum=3"), []
    backend = Refusing(study, {("ada", 2, 1): refuse})
    outcome = federation(study, backend, seen=seen).run()
    assert [(row["clients"], row["dropped"]) for row in outcome.history] == [(4, 0), (3, 1), (3, 0)]
    assert "ada" not in backend.works[2].cohort
    assert [e.client for e in seen if isinstance(e, events.ClientDropped)] == ["ada"], "named once"


def test_a_diverged_rule_ends_the_run_without_a_model():
    study = tiny_study("strategy.name=fedadam", "strategy.options={server_lr=1e300}")
    seen: list = []
    with pytest.raises(RunFailedError, match=r"round 1: the server's model: array '(weight|bias)' holds"):
        federation(study, Backend(study), seen=seen).run()
    assert isinstance(seen[-1], events.RunFailed)


def test_an_update_that_is_too_large_is_dropped():
    study = tiny_study("cohort.minimum=3")

    def huge(reply):
        delta = {n: np.full_like(a, 1e20) for n, a in reply.update.private[DELTA].items()}
        return replace(reply, update=replace(reply.update, private={DELTA: delta}))

    outcome = federation(study, Backend(study, {("bob", 1, 1): huge})).run()
    assert outcome.history[0]["dropped"] == 1


def test_a_reply_of_somebody_who_was_not_asked_is_dropped():
    study = tiny_study()

    def another(reply):
        return replace(reply, client="eve")

    seen: list = []
    federation(study, Backend(study, {("bob", 1, 1): another}), seen=seen).run()
    (dropped,) = [e for e in seen if isinstance(e, events.ClientDropped)]
    assert (dropped.client, dropped.reason) == ("eve", "client 'eve' is not on the roster of run run")


def test_a_journal_of_another_model_is_refused():
    study, journal = tiny_study(), DictJournal()
    federation(study, Backend(study), journal).run()
    wider = tiny_study("task.options.hidden=3")
    with pytest.raises(StateError, match="checkpoint: missing arrays"):
        Federation(
            wider,
            "run",
            load_app().strategy("fedavg", {}),
            initial_weights(TinyTask(hidden=3), wider),
            Backend(study),
            journal,
            metric="accuracy",
            emit=lambda event: None,
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy.name=scaffold", "train.precision=bfloat16"), "with train.precision = 'bfloat16'"),
        (("strategy.name=scaffold", "train.optimizer=adam"), "holds for plain SGD only"),
        (("strategy.name=scaffold", "train.momentum=0.9"), "momentum = 0.9"),
        (("strategy.name=krum", "cohort.size=4"), "needs at least 5 clients a round, cohort.size is 4"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_anything_runs(overrides, message):
    study = tiny_study(*overrides)
    with pytest.raises(UnsupportedError, match=message):
        check_combination(study, load_app().strategy(study.strategy.name, study.strategy.options))


def test_broadcasts_that_differ_have_other_digests():
    study = tiny_study("strategy.name=scaffold", "rounds=1")
    state = federation(study, Backend(study)).run().state
    assert broadcast_digest(state) == broadcast_digest(replace(state, round=9, memory={"x": np.ones(1)}))
    assert broadcast_digest(state) != broadcast_digest(replace(state, shared={}))
    assert broadcast_digest(state) != broadcast_digest(replace(state, model=state.shared, shared=state.model))


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([(0.5, 10), (1.0, 30)], 0.875),
        ([(0.5, 10), (math.nan, 30)], 0.5),
        ([(math.inf, 10), (-math.inf, 30)], math.nan),
        ([(1.7e308, 10), (1.7e308, 30)], math.nan),
        ([(0.5, 0), (1.0, 0)], math.nan),
        ([], math.nan),
    ],
)
def test_means_over_clients_are_weighted_and_never_raise(claims, expected):
    scored = [Scored(f"c{i}", {"m": value}, n) for i, (value, n) in enumerate(claims)]
    assert mean_metrics(scored).get("m", math.nan) == pytest.approx(expected, nan_ok=True)
