"""The stop rule: what an account may still spend, whatever is charged on it and by whom."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import StateError, StudyError
from fedlearn.privacy.accounting import pld_epsilon, rdp_epsilon
from fedlearn.privacy.budget import Budget, EpsilonCharger, StopRule, spent_epsilon
from fedlearn.privacy.events import Cost, Gaussian, PoissonSampled, Relation, Repeated
from fedlearn.release.charge import Charge

ADAPTIVE, FIXED = Budget(3.0, 1e-5), Budget(3.0, 1e-5, StopRule.FIXED)
ROUND = Cost(Repeated(PoissonSampled(0.05, Gaussian(1.5)), 40))
OTHER = Cost(Repeated(PoissonSampled(0.05, Gaussian(2.0)), 10))


def charge(cost: Cost, account: str = "heart/record") -> Charge:
    return Charge(account, cost.to_text())


def rounds_allowed(budget: Budget, cost: Cost) -> int:
    charger, spent = EpsilonCharger({"heart/record": budget}), []
    while charger.weigh(spent, charge(cost)).allowed:
        spent.append(charge(cost))
    return len(spent)


def test_a_run_is_stopped_before_its_budget_is_exceeded():
    for budget in (ADAPTIVE, FIXED):
        allowed = rounds_allowed(budget, ROUND)
        assert allowed > 4
        assert spent_epsilon([ROUND] * allowed, budget) <= 3.0 < spent_epsilon([ROUND] * (allowed + 1), budget)
    # The exact accountant is a valid stop rule for one kind of release, and lets more rounds run.
    assert rounds_allowed(FIXED, ROUND) > rounds_allowed(ADAPTIVE, ROUND)


def test_the_adaptive_rule_is_never_below_the_best_order():
    for count in (1, 5, 50):
        total = Cost(Repeated(ROUND.event, count))
        assert spent_epsilon([ROUND] * count, ADAPTIVE) >= rdp_epsilon(total, 1e-5)


def test_at_the_budget_the_fixed_order_loses_next_to_nothing():
    # The order is chosen for plain Gaussian noise; there it is the best one when the budget is used up.
    for epsilon in (0.5, 1.0, 3.0, 8.0):
        budget, noise = Budget(epsilon, 1e-5), 20.0
        costs, count = Cost(Gaussian(noise)), 1
        while spent_epsilon([costs] * (count + 1), budget) <= epsilon:
            count += 1
        best = rdp_epsilon(Cost(Repeated(Gaussian(noise), count)), 1e-5)
        assert best <= spent_epsilon([costs] * count, budget) <= best * 1.02


def test_an_order_of_ones_own_fits_little_noise_on_rare_batches():
    little = Cost(Repeated(PoissonSampled(0.01, Gaussian(0.81)), 10))
    assert rounds_allowed(ADAPTIVE, little) == 0
    assert rounds_allowed(Budget(3.0, 1e-5, order=5.2), little) == 58


def test_different_events_add_up_under_the_adaptive_rule_only():
    both = spent_epsilon([ROUND, OTHER], ADAPTIVE)
    assert spent_epsilon([ROUND], ADAPTIVE) < both < float("inf")
    assert spent_epsilon([ROUND, OTHER], FIXED) == float("inf")
    assert not EpsilonCharger({"heart/record": FIXED}).weigh([charge(ROUND)], charge(OTHER)).allowed


def test_plain_gaussians_of_any_size_are_one_family():
    costs = [Cost(Gaussian(5.0)), Cost(Gaussian(12.0))]
    joint = (5.0**-2 + 12.0**-2) ** -0.5
    assert spent_epsilon(costs, FIXED) == pytest.approx(pld_epsilon(Cost(Gaussian(joint)), 1e-5), rel=1e-3)


def test_two_relations_do_not_add_up():
    other = Cost(Gaussian(5.0), Relation.REPLACE_ONE)
    for budget in (ADAPTIVE, FIXED):
        assert spent_epsilon([Cost(Gaussian(5.0)), other], budget) == float("inf")


def test_an_account_without_a_budget_has_none():
    weighing = EpsilonCharger({}).weigh([], charge(ROUND))
    assert weighing.budget == 0
    assert not weighing.allowed


def test_numbers_are_shown_rounded_up():
    weighing = EpsilonCharger({"heart/record": ADAPTIVE}).weigh([charge(ROUND)], charge(ROUND))
    assert weighing.unit == "epsilon"
    assert weighing.spent >= Decimal(spent_epsilon([ROUND], ADAPTIVE))
    assert weighing.after >= Decimal(spent_epsilon([ROUND] * 2, ADAPTIVE))
    assert EpsilonCharger({}).weigh([], charge(ROUND)).spent == 0


def test_a_charge_that_cannot_be_read_is_refused():
    with pytest.raises(StateError):
        EpsilonCharger({"heart/record": ADAPTIVE}).weigh([], Charge("heart/record", "2.0"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(0.0, 1e-5),
        lambda: Budget(-1.0, 1e-5),
        lambda: Budget(float("inf"), 1e-5),
        lambda: Budget(1.0, 0.0),
        lambda: Budget(1.0, 1.0),
        lambda: Budget(1e-6, 1e-12),
        lambda: Budget(3.0, 1e-5, order=1.0),
        lambda: Budget(3.0, 1e-5, order=1.5),
    ],
)
def test_a_budget_out_of_range_is_refused(make):
    with pytest.raises(StudyError, match="budget"):
        make()


@given(st.lists(st.floats(0.5, 50.0), min_size=1, max_size=20), st.randoms())
def test_more_is_never_less_and_order_does_not_matter(noises, chance):
    costs = [Cost(Gaussian(noise)) for noise in noises]
    whole = spent_epsilon(costs, ADAPTIVE)
    assert spent_epsilon(costs[:-1], ADAPTIVE) <= whole
    chance.shuffle(costs)
    assert spent_epsilon(costs, ADAPTIVE) == pytest.approx(whole)
