"""The round loop under a privacy plan: what is drawn, divided by and released, and that a crash changes none of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import events
from fedlearn.errors import RunFailedError, UnsupportedError
from fedlearn.learning.backend import Failed, Fitted
from fedlearn.learning.update import DELTA, UNCLIPPED, Update
from fedlearn.privacy.clipping import COUNT
from fedlearn.privacy.study import CLIP
from fedlearn.release.journal import DictJournal
from tests.support.tiny_task import CLIENTS, tiny_study
from tests.unit.learning.test_federation import (
    Backend,
    Crash,
    CrashingJournal,
    Refusing,
    comparable,
    federation,
    refuse,
)

CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=0.5", "privacy.delta=1e-3", f"privacy.units={len(CLIENTS)}")
RECORD = ("privacy.unit=record", "privacy.noise_multiplier=1.5", "privacy.delta=1e-3")
PLANS = {
    "client": CLIENT,
    "client-fixed-cohort": (*CLIENT, "cohort.size=2"),
    "client-poisson-adaptive": (*CLIENT, "cohort.rate=0.3", "privacy.clipping=adaptive"),
    "record": RECORD,
    "record-adaptive": (*RECORD, "privacy.clipping=adaptive"),
}


def outcome_of(study, **more):
    return federation(study, Backend(study), rehearsal=True, **more).run()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
@pytest.mark.parametrize("applied", [False, True])
def test_a_crash_at_any_write_changes_nothing(plan, strategy, applied):
    study = tiny_study(f"strategy.name={strategy}", "rounds=3", "evaluate.every=2", *PLANS[plan])
    journal = CrashingJournal(10**9, applied=False)
    expected = comparable(outcome_of(study, journal=journal))
    for k in range(1, 10**9 - journal.left + 1):
        dying = CrashingJournal(k, applied=applied)
        backend = Backend(study)
        with pytest.raises(Crash):
            federation(study, backend, dying, rehearsal=True).run()
        assert comparable(federation(study, backend, dying, rehearsal=True).run()) == expected, f"write {k}"


def test_whoever_refuses_is_drawn_all_the_same_where_the_draw_was_accounted():
    """Nobody takes its place: the cohorts are those of a run in which it answers."""
    study = tiny_study(*PLANS["client-fixed-cohort"], "rounds=8")
    calm, torn = Backend(study), Refusing(study)
    federation(study, calm, rehearsal=True).run()  # seeded, so that the draws are the same
    drawn = [work.cohort for work in calm.works]
    first = next(number for number, cohort in enumerate(drawn, start=1) if "ada" in cohort)
    torn.replies = {("ada", number, 1): refuse for number in range(first, 9)}
    seen: list[events.Event] = []
    outcome = federation(study, torn, seen=seen, rehearsal=True).run()
    assert [work.cohort for work in torn.works] == drawn
    assert [row["dropped"] for row in outcome.history] == [int("ada" in cohort) for cohort in drawn]
    assert sum(isinstance(e, events.RoundVoid) for e in seen) == 0


@pytest.mark.parametrize("plan", PLANS)
def test_updates_say_nothing_beside_themselves(plan):
    study = tiny_study(*PLANS[plan])
    seen: list[Update] = []

    class Watched(Backend):
        def fit(self, work):
            for reply in super().fit(work):
                assert isinstance(reply, Fitted)
                seen.append(reply.update)
                yield reply

    rows = federation(study, Watched(study), rehearsal=True).run().history
    assert seen
    for update in seen:
        assert (update.examples, dict(update.facts)) == (1, {})
        assert set(update.private) == ({DELTA, UNCLIPPED} if plan == "client-poisson-adaptive" else {DELTA})
    assert all(row["train_loss"] is None or np.isnan(row["train_loss"]) for row in rows)


def test_a_client_level_update_is_no_longer_than_the_clip_of_its_round():
    study = tiny_study(*CLIENT, "privacy.clipping=adaptive", "privacy.clip_l2=0.01", "rounds=4")
    clips = []

    class Watched(Backend):
        def fit(self, work):
            clips.append(float(work.shared[CLIP]))
            for reply in super().fit(work):
                assert isinstance(reply, Fitted)
                norm = np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in reply.update.private[DELTA].values()))
                assert norm <= clips[-1]
                assert reply.update.private[UNCLIPPED][COUNT] in (0.0, 1.0)
                yield reply

    outcome = federation(study, Watched(study), rehearsal=True).run()
    assert clips[0] == 0.01
    assert len(set(clips)) == 4, "the clip moves"
    assert float(outcome.state.shared[CLIP]) not in clips, "the next round's clip is kept"


def test_the_denominator_is_the_plans_whoever_vanishes():
    """Half of the clients vanish: the sum is halved, not the divisor; the noise stays what it was."""
    study = tiny_study(*CLIENT, "rounds=1")

    def gone(reply):
        return Failed(reply.client, "gone")

    def model_without(clients):
        backend = Backend(study, {(client, 1, 1): gone for client in clients})
        return federation(study, backend, rehearsal=True).run().state.model

    everybody = model_without(())
    without = {client: model_without((client,)) for client in CLIENTS}
    nobody = model_without(CLIENTS)
    for name, whole in everybody.items():
        # each client's part is what is missing without it; the parts and the noise alone make the whole
        parts = sum((whole - without[client][name] for client in CLIENTS), np.zeros_like(whole))
        np.testing.assert_allclose(nobody[name] + parts, whole, atol=1e-5)


def test_nobody_at_all_is_a_round_like_any_other():
    study = tiny_study(*CLIENT, "cohort.rate=1e-9", "rounds=3")
    outcome = outcome_of(study)
    assert [row["clients"] for row in outcome.history] == [0, 0, 0]
    assert all(row["attempt"] == 1 for row in outcome.history if "attempt" in row)


def test_too_few_clients_for_the_plan_end_the_run_before_it_begins():
    study = tiny_study(*CLIENT[:3], "privacy.units=50", "privacy.delta=1e-3")
    with pytest.raises(RunFailedError, match="plan is for 50"):
        outcome_of(study, may_join=False)


def test_the_server_rule_is_told_the_plans_numbers_not_the_real_ones():
    """A control variate moves by clients / population: the real cohort of a round would show in the model."""
    study = tiny_study("strategy.name=scaffold", *CLIENT, "cohort.rate=0.5", "rounds=1")
    strategies = []
    one = federation(study, Backend(study), rehearsal=True)
    rule = one._strategy

    class Spy(type(rule)):
        def server_step(self, state, aggregate):
            strategies.append((aggregate.clients, aggregate.population, aggregate.examples))
            assert CLIP not in state.shared
            return super().server_step(state, aggregate)

    one._strategy = Spy(**dict(rule.options))
    one.run()
    half = round(0.5 * len(CLIENTS))
    assert strategies == [(half, len(CLIENTS), half)]


def test_robust_strategies_make_no_sum_that_noise_could_cover():
    study = tiny_study("strategy.name=median", *CLIENT)
    with pytest.raises(UnsupportedError, match="not linear"):
        federation(study, Backend(study))
    assert federation(tiny_study("strategy.name=median", *RECORD), Backend(study)), "records are covered at their site"


def test_over_a_link_no_client_is_asked_to_score():
    study = tiny_study(*RECORD)
    outcome = federation(study, Backend(study)).run()
    assert all("metrics" not in row for row in outcome.history)
    assert all("metrics" in row for row in outcome_of(study).history[-1:])


def test_the_secret_mode_never_repeats():
    study = tiny_study(*CLIENT, "rounds=1")
    first, second = (federation(study, Backend(study)).run().state.model for _ in range(2))
    assert any(not np.array_equal(first[name], second[name]) for name in first)
    seeded = study.model_copy(update={"privacy": study.privacy.model_copy(update={"seeded": True})})
    first, second = (federation(seeded, Backend(seeded)).run().state.model for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_drawn_client_that_is_away_is_not_replaced():
    """Over a link everybody of the beginning is drawn from, here or not."""
    study = tiny_study(*CLIENT, "cohort.size=2", "privacy.seeded=true", "rounds=6")
    journal = DictJournal()
    backend = Backend(study)
    federation(replace_rounds(study, 1), backend, journal).run()
    backend.here = list(CLIENTS)[:-1]
    backend.replies = {(CLIENTS[-1], number, 1): lambda reply: Failed(reply.client, "away") for number in range(2, 7)}
    federation(study, backend, journal).run()
    assert any(CLIENTS[-1] in work.cohort for work in backend.works[1:])
    assert all(len(work.cohort) == 2 for work in backend.works)


def replace_rounds(study, rounds):
    return study.model_copy(update={"rounds": rounds})


def test_a_state_keeps_its_clip_through_a_checkpoint():
    study = tiny_study(*CLIENT, "privacy.clipping=adaptive", "rounds=2")
    journal = DictJournal()
    federation(replace_rounds(study, 1), Backend(study), journal, rehearsal=True).run()
    resumed = comparable(federation(study, Backend(study), journal, rehearsal=True).run())
    assert resumed[:3] == comparable(outcome_of(study))[:3]
    assert replace(outcome_of(study).state, round=2).shared.keys() == {CLIP}
