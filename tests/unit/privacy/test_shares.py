"""Noise that clients add themselves, in a study: what is refused, what it costs whatever the model's size, and what is said of it."""

from __future__ import annotations

import math

import pytest

import fedlearn
from fedlearn.errors import FedlearnError
from fedlearn.learning.vectors import masking_plan
from fedlearn.privacy import rdp
from fedlearn.privacy.events import Relation, leaves
from fedlearn.privacy.plan import Everyone, Unit
from fedlearn.privacy.shares import LEAST_SENSITIVITY, NoiseShares
from fedlearn.privacy.statement import lines, planned, released
from fedlearn.privacy.study import noise_plan, plan_of
from fedlearn.secagg.plan import Profile
from tests.support.shared_noise import noisy_study

LENGTHS = (1, 2, 5, 100, 401, 3_000, 40_000, 1_700_000, 10**8)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("secure_aggregation.enabled=false",), r"needs \[secure_aggregation\]"),
        (("privacy.clipping=adaptive",), "adaptive does not go with distributed"),
        (("privacy.unit=record",), 'distributed is for unit = "client"'),
        (("privacy.mechanism=gaussian", "privacy.survivors=3"), "survivors: only for"),
        (("privacy.mechanism=gaussian", "privacy.surplus=true"), "surplus: only for"),
        (("privacy.min_separation=2",), 'only for mechanism = "ftrl"'),
        (("cohort.rate=0.5", "cohort.wait_for=none"), "cohort.rate"),
        (("privacy.evaluation_noise=5.0",), "records and groups"),
        (("secure_aggregation.max_clients=none",), "max_clients: missing"),
        (("privacy.survivors=5",), "got 5, expected 3 to 4"),
        (("cohort.minimum=4", "privacy.survivors=3"), "got 3, expected 4 to 4"),
        (("secure_aggregation.max_clients=20",), "rounds of 4 clients, and sums of fewer than 18"),
        (("secure_aggregation.ring_bits=16", "privacy.noise_multiplier=30.0"), "could wrap"),
        (("secure_aggregation.clip_l2=1.0",), "clips already"),
        (("strategy.name=krum",), "not linear"),
        (("privacy.delta=0.3",), "less than 1/4"),
        (("privacy.delta=0.3", "privacy.units=2"), "less than 1/4"),  # so many may be in one sum
        (("privacy.delta=0.01", "privacy.units=1000"), "less than 1/1000"),
    ],
)
def test_what_cannot_be_claimed_is_refused_before_anything_is_trained(overrides, says):
    with pytest.raises(FedlearnError, match=says):
        fedlearn.simulate(noisy_study(*overrides))


def test_a_study_is_calibrated_without_its_model():
    budget = noisy_study("privacy.noise_multiplier=none", "privacy.epsilon=6.0", "rounds=30")
    plan = plan_of(budget)
    assert plan.unit is Unit.CLIENT
    assert plan.sampling == Everyone()
    assert not plan.central
    for length in LENGTHS:
        found = noise_plan(budget, length).epsilon(30, plan.delta).reported.epsilon
        assert 6.0 * (1 - 1e-3) <= found <= 6.0


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0, 6.0, 60.0])
def test_what_is_charged_is_at_least_what_a_model_of_any_size_costs(noise):
    charged = NoiseShares(20, 18, 0.1, 0.1).event(noise)
    study = noisy_study(f"privacy.noise_multiplier={noise}", "secure_aggregation.max_clients=20")
    for length in LENGTHS:
        plan = noise_plan(study, length)
        assert plan.encoding.norm_bound >= LEAST_SENSITIVITY
        orders = tuple(float(order) for order in rdp.ORDERS)
        real = rdp.total_rdp(leaves(plan.cost().event), Relation.ADD_OR_REMOVE_ONE, orders)
        most = rdp.total_rdp({charged: 1}, Relation.ADD_OR_REMOVE_ONE, orders)
        assert (real <= most * (1 + 1e-12)).all()


def test_nothing_but_delta_rests_on_the_number_of_clients():
    # Sums are divided by the clients in them, and nothing is amplified: more or fewer of them change no number.
    plans = [plan_of(noisy_study(f"privacy.units={units}", "privacy.delta=1e-3")) for units in (4, 900)]
    assert plans[0].cost() == plans[1].cost()
    assert noise_plan(noisy_study("privacy.units=4"), 401) == noise_plan(noisy_study("privacy.units=90"), 401)


def test_units_may_be_left_out_where_the_clients_of_a_round_are_known():
    assert plan_of(noisy_study("privacy.units=none", "data.clients=none")).units == 4


def test_every_attempt_is_a_charge_and_none_is_for_the_whole_run():
    plan = plan_of(noisy_study())
    assert plan.cost(1).to_text() != plan.cost().to_text()
    assert leaves(plan.cost().event) == {plan.one_release(): 3}


def test_fewer_survivors_make_every_share_larger():
    def added(survivors):
        study = noisy_study("secure_aggregation.max_clients=20", f"privacy.survivors={survivors}")
        return noise_plan(study, 100).surplus.added

    assert added(20) < added(18) < added(16)
    assert plan_of(noisy_study("secure_aggregation.max_clients=20")).shares.survivors == 18
    assert plan_of(noisy_study("secure_aggregation.max_clients=20", "cohort.minimum=19")).shares.survivors == 19


@pytest.mark.parametrize(("clients", "levels"), [(4, (4,)), (20, (19, 20)), (100, (93, 96, 100)), (3, ())])
def test_where_noise_is_taken_off_again(clients, levels):
    many = ("privacy.delta=1e-3", f"secure_aggregation.max_clients={clients}")
    study = noisy_study("privacy.surplus=true", *many)
    shares = plan_of(study).shares
    assert shares.levels == levels
    assert noise_plan(study, 100).aggregation.surplus == levels
    plain = plan_of(noisy_study(*many))
    assert plan_of(study).cost() == plain.cost()
    assert (shares.excess < plain.shares.excess) == bool(levels)


@pytest.mark.parametrize("clients", [4, 20, 100, 200])
def test_three_bytes_a_number_suffice(clients):
    study = noisy_study(
        *("privacy.noise_multiplier=none", "privacy.epsilon=8.0", "privacy.delta=1e-5", "rounds=100"),
        f"secure_aggregation.max_clients={clients}",
    )
    assert masking_plan(study, 1_700_000).encoding.upload_bytes <= 3 * 1_700_001


def test_a_statement_promises_the_same_against_the_server():
    said = planned(noisy_study("privacy.seeded=false", "rounds=10"), rehearsal=False)
    assert said["private"]
    assert {one["adversary"]: one["epsilon"] for one in said["against"]} == dict.fromkeys(
        ("reader of the model", "other sites", "server"), said["epsilon"]
    )
    assert math.isfinite(said["epsilon"])
    text = "\n".join(lines(said))
    assert "at least 2 honest clients add their noise, in integers" in text
    assert "whatever 1 other and the server do together" in text
    assert "nothing is gained by sampling" in text
    assert "sums of fewer than 3 clients are not opened" in text
    assert "floating point" not in text


def test_void_attempts_are_counted():
    study = noisy_study("privacy.seeded=false")
    few, many = (released(study, committed=2, attempts=n, rehearsal=False)["epsilon"] for n in (2, 5))
    assert few < many


def test_survivors_that_are_agreed_upon_need_less_noise_of_each():
    """Nobody can be told of others than are in the sum, so more honest clients are sure to be in it."""
    told = noisy_study("secure_aggregation.max_clients=20")
    agreed = told.with_overrides(["secure_aggregation.profile=malicious"])
    assert [plan_of(study).shares.honest for study in (told, agreed)] == [15, 16]
    assert masking_plan(agreed, 100).profile is Profile.MALICIOUS
    assert masking_plan(told, 100).profile is Profile.SEMI_MALICIOUS
