from __future__ import annotations

from decimal import Decimal

import pytest

from fedlearn.errors import StateError
from fedlearn.release import Charge, CostCharger, Weighing

CHARGER = CostCharger({"heart/record": Decimal(3)}, unit="epsilon")


def charge(cost: str, account: str = "heart/record") -> Charge:
    return Charge(account, cost)


def test_costs_add_up_exactly() -> None:
    weighing = CHARGER.weigh([charge("0.1")] * 29, charge("0.1"))
    assert weighing == Weighing(Decimal("2.9"), Decimal("3.0"), Decimal(3), "epsilon")
    assert weighing.allowed
    assert not CHARGER.weigh([charge("0.1")] * 30, charge("0.1")).allowed


def test_a_sum_too_long_for_the_context_overstates() -> None:
    weighing = CostCharger({"heart/record": Decimal(10**30)}).weigh([charge("1" + "0" * 30)], charge("1e-9"))
    assert weighing.after > 10**30
    assert not weighing.allowed


def test_an_account_that_is_not_named_has_no_budget() -> None:
    assert not CHARGER.weigh([], charge("0.001", "other/record")).allowed
    assert CHARGER.weigh([], charge("0", "other/record")).allowed


@pytest.mark.parametrize("after", ["Infinity", "NaN", "sNaN"])
def test_a_number_that_is_not_finite_never_fits(after: str) -> None:
    assert not Weighing(Decimal(0), Decimal(after), Decimal("Infinity"), "epsilon").allowed


def test_a_budget_that_is_not_a_number_allows_nothing() -> None:
    assert not Weighing(Decimal(0), Decimal(0), Decimal("NaN"), "epsilon").allowed


@pytest.mark.parametrize("cost", ["", "one", "-1", "Infinity", "NaN"])
def test_a_cost_that_cannot_be_read_is_refused(cost: str) -> None:
    with pytest.raises(StateError, match="heart/record"):
        CHARGER.weigh([], charge(cost))
