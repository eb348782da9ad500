"""An epsilon is never shown without what it means, and a rehearsal's is never a number that could be taken for a promise."""

from __future__ import annotations

import json
import math

import pytest

from fedlearn import events
from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Failed
from fedlearn.learning.strategy import ServerState
from fedlearn.privacy.accounting import account
from fedlearn.privacy.claims import shown
from fedlearn.privacy.events import Cost, Gaussian, Repeated
from fedlearn.privacy.plan import Everyone, FixedClip, FixedCohort, PoissonSampling, PrivacyPlan, Unit
from fedlearn.privacy.statement import PLANNED, RELEASED, headline, lines, planned, statement
from fedlearn.privacy.study import plan_of
from tests.support.tiny_task import CLIENTS, tiny_study
from tests.unit.learning.test_federation import Backend, federation

RECORD = ("privacy.unit=record", "privacy.noise_multiplier=1.5", "privacy.delta=1e-3", "rounds=3")
CLIENT = (
    "privacy.unit=client",
    "privacy.noise_multiplier=0.5",
    "privacy.delta=1e-3",
    f"privacy.units={len(CLIENTS)}",
    "rounds=3",
)
POISSON = PrivacyPlan(Unit.RECORD, PoissonSampling(0.1), FixedClip(1.0), 2.0, 1e-5, 100, 4, 2)
PLANS = {
    "record": POISSON,
    "group": PrivacyPlan(Unit.GROUP, PoissonSampling(0.1), FixedClip(1.0), 2.0, 1e-5, 100, 4, 2),
    "client, coins": PrivacyPlan(Unit.CLIENT, PoissonSampling(0.1), FixedClip(1.0), 2.0, 1e-3, 100, 4),
    "client, fixed cohort": PrivacyPlan(Unit.CLIENT, FixedCohort(10, 100), FixedClip(1.0), 4.0, 1e-3, 100, 4),
    "client, everybody": PrivacyPlan(Unit.CLIENT, Everyone(), FixedClip(1.0), 8.0, 1e-3, 100, 4),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_private_statement_is_the_accountants_number_with_all_that_it_means(plan):
    found = statement(plan, seeded=False)
    accounted = account(plan.cost(), plan.delta, prv=True)
    assert found["epsilon"] == accounted.reported.epsilon
    assert found["private"] is True
    assert (found["unit"], found["neighbours"], found["delta"]) == (plan.unit.value, plan.relation.value, plan.delta)
    assert found["noise_multiplier"] == plan.noise_multiplier
    assert found["releases"] == plan.releases
    assert [o["epsilon"] for o in found["other_accountants"]] == [b.epsilon for b in accounted.shown]
    assert found["other_accountants"], "two accountants, always"
    against = {one["adversary"]: one for one in found["against"]}
    assert set(against) == {"server", "other sites", "reader of the model"}
    assert all(one["caveat"] for one in found["against"])
    assert against["reader of the model"]["epsilon"] == found["epsilon"]
    assert against["server"]["epsilon"] == ("infinite" if plan.unit is Unit.CLIENT else found["epsilon"])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_seeded_statement_promises_no_number_anywhere(plan):
    found = statement(plan, seeded=True)
    assert found["private"] is False
    assert found["epsilon"] == "not private"
    assert "seeded" in found["mark"]
    assert {one["epsilon"] for one in found["against"]} == {"not private"}
    assert found["rehearsed_epsilon"] == statement(plan, seeded=False)["epsilon"]
    assert headline(found).startswith("NOT PRIVATE")
    assert found["mark"] in "\n".join(lines(found))


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_words_name_unit_delta_and_neighbours_beside_the_number(plan, seeded):
    found = statement(plan, seeded=seeded)
    words = headline(found)
    for part in (f"delta {plan.delta:g}", f"unit {plan.unit.value}", plan.relation.value, f"{plan.rounds} rounds"):
        assert part in words
    whole = "\n".join(lines(found))
    for one in found["against"]:
        assert one["adversary"] in whole
        assert one["caveat"] in whole
    assert found["accountant"] in whole
    assert all(o["accountant"] in whole for o in found["other_accountants"])


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_statement_goes_through_json_and_through_an_event_unchanged(plan, seeded):
    found = statement(plan, seeded=seeded, rounds=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    event, _ = events.from_json(events.to_json(events.PrivacyStated("run-1", found), 0.0))
    assert isinstance(event, events.PrivacyStated)
    assert list(lines(event.statement)) == list(lines(found))


def test_sites_that_mask_together_know_who_takes_part_so_sampling_gains_nothing_against_them():
    """Mistake 8 of a kind: an amplification against somebody to whom the draw is no secret."""
    plan = PLANS["client, fixed cohort"]
    plain, masked = (statement(plan, seeded=False, masked=masks) for masks in (False, True))
    sites, server, reader = (
        {one["adversary"]: one for one in masked["against"]}[who]
        for who in ("other sites", "server", "reader of the model")
    )
    each = Cost(Repeated(Gaussian(plan.noise_multiplier / 2), plan.rounds), plan.relation)
    assert sites["epsilon"] == account(each, plan.delta).reported.epsilon > 2 * plain["epsilon"]
    assert "nothing is gained by sampling" in sites["caveat"]
    assert reader["epsilon"] == plain["epsilon"] == masked["epsilon"]
    apart = {one["adversary"]: one for one in plain["against"]}["other sites"]
    assert apart["epsilon"] == sites["epsilon"], "nine of ten that were not drawn know that the tenth was"
    assert "was drawn itself" in apart["caveat"]
    assert server["epsilon"] == "infinite"
    assert "exact sum" in server["caveat"]
    for name in ("record", "client, everybody"):
        found = statement(PLANS[name], seeded=False, masked=True)
        assert {o["epsilon"] for o in found["against"]} - {"infinite"} == {found["epsilon"]}, "no draw was counted on"


def test_no_privacy_no_statement():
    study = tiny_study()
    seen: list[events.Event] = []
    outcome = federation(study, Backend(study), seen=seen).run()
    assert planned(study, rehearsal=False) is None
    assert outcome.privacy is None
    assert not any(isinstance(one, events.PrivacyStated) for one in seen)


@pytest.mark.parametrize("over", [RECORD, CLIENT], ids=["record", "client"])
@pytest.mark.parametrize("rehearsal", [False, True])
def test_a_run_says_its_promise_before_it_begins_and_its_cost_before_it_ends(over, rehearsal):
    study = tiny_study(*over)
    seen: list[events.Event] = []
    outcome = federation(study, Backend(study), seen=seen, rehearsal=rehearsal).run()
    kinds = [type(one) for one in seen]
    assert kinds[:2] == [events.PrivacyStated, events.RunStarted]
    assert kinds[-2:] == [events.PrivacyStated, events.RunFinished]
    promise, cost = (one.statement for one in seen if isinstance(one, events.PrivacyStated))
    assert (promise["state"], cost["state"]) == (PLANNED, RELEASED)
    assert promise["private"] is cost["private"] is not rehearsal
    assert promise["epsilon"] == cost["epsilon"], "all went as planned"
    assert outcome.privacy == cost


@pytest.mark.parametrize(("over", "counted"), [(RECORD, 4), (CLIENT, 3)], ids=["record", "client"])
def test_a_void_attempt_costs_a_round_where_updates_left_with_it(over, counted):
    """Of three rounds the second is tried twice: sites have sent two noisy updates, the coordinator has released one noisy sum."""
    study = tiny_study(*over)
    outcome = federation(study, VoidOnce(study), may_join=False).run()
    plan = plan_of(study)
    assert plan is not None
    assert [row["attempt"] for row in outcome.history] == ([1, 2, 1] if counted == 4 else [1, 1, 1])
    assert outcome.privacy is not None
    assert outcome.privacy["rounds"] == counted
    words = "4 attempts at rounds released, 3 of them committed" if counted == 4 else "3 rounds released"
    assert headline(outcome.privacy).endswith(words)
    assert outcome.privacy["epsilon"] == account(plan.cost(counted), plan.delta).reported.epsilon


def test_a_run_that_fails_says_what_it_has_cost():
    study = tiny_study(*RECORD, "runtime.max_attempts=2")
    seen: list[events.Event] = []
    with pytest.raises(RunFailedError):
        federation(study, VoidFrom(study, 2), seen=seen).run()
    assert isinstance(seen[-1], events.RunFailed)
    assert isinstance(seen[-2], events.PrivacyStated)
    assert seen[-2].statement["rounds"] == 3, "a round, and two attempts at the next"


def test_a_run_that_is_stopped_has_cost_its_rounds_only():
    study = tiny_study(*RECORD)
    seen: list[events.Event] = []
    done = lambda: sum(isinstance(one, events.RoundFinished) for one in seen) == 2  # noqa: E731
    outcome = federation(study, Backend(study), seen=seen, should_stop=done).run()
    assert isinstance(outcome.state, ServerState)
    assert outcome.privacy is not None
    assert outcome.privacy["rounds"] == 2
    assert outcome.privacy["epsilon"] < planned(study, rehearsal=False)["epsilon"]  # type: ignore[index]


class VoidFrom(Backend):
    """Nobody answers from a round on."""

    def __init__(self, study, first):
        super().__init__(study)
        self.first = first

    def fit(self, work):
        if work.round >= self.first:
            return (Failed(client, "gone") for client in work.cohort)
        return super().fit(work)


class VoidOnce(Backend):
    """Nobody answers the first attempt at round 2."""

    def fit(self, work):
        if (work.round, work.attempt) == (2, 1):
            return (Failed(client, "gone") for client in work.cohort)
        return super().fit(work)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (2.99990001, "3.0000"),
        (2.9999, "2.9999"),
        (3.0, "3.0000"),
        (1e-9, "0.0001"),
        (0.0, "0.0000"),
        (math.inf, "infinite"),
    ],
)
def test_an_epsilon_is_rounded_up_wherever_people_see_it(epsilon, text):
    assert shown(epsilon) == text
    value = {**statement(PLANS["record"], seeded=False), "epsilon": 2.00001}
    assert "epsilon 2.0001 at" in headline(value)
