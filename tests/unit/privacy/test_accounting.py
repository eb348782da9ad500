"""Epsilons: reference values, two accountants on everything, and calibration that inverts them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import rdp as google
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from fedlearn.errors import AccountingError, StudyError, UnsupportedError
from fedlearn.privacy import rdp
from fedlearn.privacy.accounting import (
    CALIBRATION_TOLERANCE,
    Accounted,
    Bound,
    Method,
    account,
    calibrate,
    calibrated,
    check_agreement,
    google_rdp_epsilon,
    pld_epsilon,
    rdp_epsilon,
)
from fedlearn.privacy.events import (
    Composed,
    Cost,
    Gaussian,
    PoissonSampled,
    Relation,
    Repeated,
    SampledWithoutReplacement,
    ZeroConcentrated,
)
from fedlearn.privacy.plan import FixedClip, FixedCohort, PoissonSampling, PrivacyPlan, Unit


def sampled(sigma: float, q: float, count: int) -> Cost:
    return Cost(Repeated(PoissonSampled(q, Gaussian(sigma)), count))


# (sigma, q, T, delta): epsilon by PLD, PRV's upper bound, RDP with the improved conversion. dp-accounting 0.6.0 and Opacus 1.6.0.
REFERENCE = {
    (1, 1, 1, 1e-5): (4.3772, 4.3874, 4.7285),
    (5, 1, 30, 1e-5): (4.8661, 4.8763, 5.2524),
    (4, 0.01, 10_000, 1e-5): (0.9470, 0.9569, 1.0355),
    (1.12, 256 / 60_000, 14_040, 1e-5): (2.3082, 2.3183, 2.5165),
    (1.3, 256 / 60_000, 3_510, 1e-5): (0.8638, 0.8738, 0.9538),
    (0.8, 1e-3, 2_000, 1e-6): (0.5600, 0.5701, 1.5047),
}


@pytest.mark.parametrize("setting", REFERENCE)
def test_reference_epsilons(setting):
    sigma, q, count, delta = setting
    pld, prv, own = REFERENCE[setting]
    cost = sampled(sigma, q, count)
    assert pld_epsilon(cost, delta) == pytest.approx(pld, abs=1e-3)
    assert rdp_epsilon(cost, delta) == pytest.approx(own, abs=1e-3)
    answer = account(cost, delta, prv=True)
    found = next(bound for bound in answer.shown if bound.method is Method.PRV)
    assert found.upper == pytest.approx(prv, abs=1e-3)
    assert found.lower <= answer.reported.epsilon <= found.upper


# With the conversion that papers used before 2020, epsilon = rdp + log(1/delta) / (alpha - 1): their published figures.
@pytest.mark.parametrize(
    ("sigma", "q", "count", "published"),
    [
        (4, 0.01, 10_000, 1.2586),  # Abadi et al. 2016, section 3
        (1.3, 256 / 60_000, 15 * 60_000 // 256, 1.192),  # TF-privacy's MNIST tutorial
        (1.1, 256 / 60_000, 60 * 60_000 // 256, 3.008),
        (0.7, 256 / 60_000, 45 * 60_000 // 256, 7.101),
    ],
)
def test_published_figures(sigma, q, count, published):
    orders = np.array(rdp.ORDERS)
    divergence = count * rdp.rdp_of(PoissonSampled(q, Gaussian(sigma)), Relation.ADD_OR_REMOVE_ONE)
    assert float(np.min(divergence + math.log(1e5) / (orders - 1))) == pytest.approx(published, rel=2e-3)


def test_zero_concentrated_reference():
    # The Gboard model in OpenDP's registry of deployments: rho = 0.81 is epsilon 8.92 at 1e-10.
    assert rdp_epsilon(Cost(ZeroConcentrated(0.81)), 1e-10) == pytest.approx(8.92, abs=5e-3)


def test_replace_one_halves_the_multiplier():
    plan = PrivacyPlan(Unit.CLIENT, FixedCohort(5, 5), FixedClip(1.0), 5.0, 1e-5, units=5, rounds=30)
    # All five of five: no sampling, but the claim is for a replaced unit.
    assert rdp_epsilon(plan.cost(), 1e-5) == pytest.approx(rdp_epsilon(sampled(2.5, 1, 30), 1e-5))
    assert pld_epsilon(sampled(2.5, 1, 30), 1e-5) == pytest.approx(11.1917, abs=1e-3)


def test_the_analytic_gaussian_is_what_calibration_finds():
    # Balle and Wang 2018: sigma(epsilon = 1, delta = 1e-5) = 3.730632, where the classic formula asks for 4.844805.
    noise = calibrate(lambda z: Cost(Gaussian(z)), 1.0, 1e-5)
    assert noise == pytest.approx(3.730632, rel=2e-4)
    assert noise >= 3.730632 - 1e-6


QUICK = (Phase.explicit, Phase.generate)  # a distribution takes too long to shrink a failure
PLANS = st.tuples(st.floats(0.7, 20.0), st.floats(1e-4, 1.0), st.integers(1, 500), st.sampled_from([1e-5, 1e-6, 1e-8]))


@settings(max_examples=15, deadline=None, phases=QUICK)
@given(PLANS)
@example((2.0, 1.0, 3, 1e-5))
@example((20.0, 1e-4, 1, 1e-5))
def test_pld_is_never_above_rdp(plan):
    sigma, q, count, delta = plan
    cost = sampled(sigma, q, count)
    own = rdp_epsilon(cost, delta)
    assume(own < 4)  # the distribution's size, hence its time, grows with epsilon
    assert pld_epsilon(cost, delta) <= own + 1e-3 * (1 + own)


@settings(max_examples=3, deadline=None, phases=QUICK)
@given(st.floats(0.1, 2.0), st.floats(1e-3, 0.1), st.integers(1, 200))
def test_calibration_inverts_accounting_and_never_undershoots(epsilon, q, count):
    plan = PrivacyPlan(Unit.RECORD, PoissonSampling(q), FixedClip(1.0), 1.0, 1e-6, units=1_000, rounds=count)
    found = calibrated(plan, epsilon)
    spent = account(found.cost(), 1e-6).reported.epsilon
    assert epsilon - CALIBRATION_TOLERANCE <= spent <= epsilon


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.01), (0.6, 0.3), (5.0, 1e-4), (1.0, 1.0)])
def test_the_sampled_gaussian_equals_the_other_implementation(sigma, q):
    integers = tuple(float(x) for x in (2, 3, 8, 31, 63, 256))  # theirs fails to converge at some others
    theirs = google.rdp_privacy_accountant._compute_rdp_poisson_subsampled_gaussian(q, sigma, integers)
    ours = rdp.rdp_of(PoissonSampled(q, Gaussian(sigma)), Relation.ADD_OR_REMOVE_ONE, integers)
    np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-14)


def test_without_replacement_equals_the_other_implementation():
    for sigma, m, n, count in ((1.0, 50, 1000, 200), (4.0, 99, 100, 5)):
        cost = Cost(Repeated(SampledWithoutReplacement(m, n, Gaussian(sigma)), count), Relation.REPLACE_ONE)
        assert rdp_epsilon(cost, 1e-5) == pytest.approx(google_rdp_epsilon(cost, 1e-5), rel=1e-4)
        assert account(cost, 1e-5).reported.accountant.startswith("fedlearn RDP")


@given(
    population=st.integers(2, 400),
    share=st.floats(0.01, 1.0),
    sigma=st.floats(0.6, 30.0),
    count=st.integers(1, 300),
)
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_a_fixed_cohort_costs_no_more_than_everybody_and_both_accountants_say_so(population, share, sigma, count):
    size = max(1, math.floor(share * population))
    sampled = Repeated(SampledWithoutReplacement(size, population, Gaussian(sigma)), count)
    answer = account(Cost(sampled, Relation.REPLACE_ONE), 1e-5)
    assert answer.reported.epsilon <= rdp_epsilon(Cost(Repeated(Gaussian(sigma), count), Relation.REPLACE_ONE), 1e-5)


def test_small_noise_costs_a_lot_and_is_not_nan():
    cost = sampled(0.05, 1.0, 10)
    assert rdp_epsilon(cost, 1e-5) > 100
    assert account(cost, 1e-5).reported.method is Method.RDP


def test_everything_done_on_the_data_is_charged():
    # Ten hyper-parameter trials and the run itself: eleven plans, not one.
    run = sampled(2.0, 0.05, 100)
    eleven = Cost(Composed((Repeated(run.event, 10), run.event)))
    assert account(eleven, 1e-5).reported.epsilon == pytest.approx(
        pld_epsilon(sampled(2.0, 0.05, 1_100), 1e-5), rel=1e-6
    )
    assert pld_epsilon(eleven, 1e-5) > 3 * pld_epsilon(run, 1e-5)


def test_nothing_costs_nothing():
    for cost in (Cost(Composed()), Cost(Repeated(Gaussian(1.0), 0))):
        answer = account(cost, 1e-5, prv=True)
        assert [b.epsilon for b in (answer.reported, *answer.shown)] == [0.0, 0.0]


def test_events_of_another_relation_are_refused():
    for leaf, relation in (
        (PoissonSampled(0.1, Gaussian(1.0)), Relation.REPLACE_ONE),
        (SampledWithoutReplacement(5, 10, Gaussian(1.0)), Relation.ADD_OR_REMOVE_ONE),
    ):
        with pytest.raises(UnsupportedError, match="no bound is known"):
            account(Cost(leaf, relation), 1e-5)


@pytest.mark.parametrize(
    ("reported", "shown"),
    [
        (Bound(Method.PLD, "a", 3.1), Bound(Method.RDP, "b", 3.0)),
        (Bound(Method.PLD, "a", 3.1), Bound(Method.PRV, "c", 3.0, 2.99, 3.01)),
        (Bound(Method.PLD, "a", 2.9), Bound(Method.PRV, "c", 3.0, 2.99, 3.01)),
        (Bound(Method.RDP, "b", 3.1), Bound(Method.RDP, "d", 3.0)),
        (Bound(Method.RDP, "b", 3.0), Bound(Method.RDP, "d", 3.1)),
        (Bound(Method.RDP, "b", 3.1), Bound(Method.MOST, "d", 3.0)),
        (Bound(Method.PLD, "a", math.nan), Bound(Method.RDP, "b", 3.0)),
        (Bound(Method.PLD, "a", math.inf), Bound(Method.RDP, "b", 3.0)),
    ],
)
def test_accountants_that_contradict_each_other_stop_the_run(reported, shown):
    with pytest.raises(AccountingError, match="one of them is wrong"):
        check_agreement(Accounted(reported, (shown,)))


@pytest.mark.parametrize(
    ("reported", "shown"),
    [
        (Bound(Method.PLD, "a", 3.0), Bound(Method.RDP, "b", 9.0)),
        (Bound(Method.PLD, "a", 3.0), Bound(Method.PRV, "c", 3.001, 2.99, 3.02)),
        (Bound(Method.RDP, "b", 3.0), Bound(Method.RDP, "d", 3.0005)),
        (Bound(Method.PLD, "a", math.inf), Bound(Method.RDP, "b", math.inf)),
    ],
)
def test_a_looser_bound_stops_nothing(reported, shown):
    check_agreement(Accounted(reported, (shown,)))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_no_budget_is_refused(epsilon):
    with pytest.raises(StudyError, match="epsilon"):
        calibrate(lambda z: Cost(Gaussian(z)), epsilon, 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_a_delta_that_is_no_delta_is_refused(delta):
    with pytest.raises(StudyError, match="delta"):
        account(Cost(Gaussian(1.0)), delta)


def test_a_budget_that_any_noise_meets_promises_nothing():
    with pytest.raises(StudyError, match="next to no noise"):
        calibrate(lambda _: Cost(Composed()), 1.0, 1e-5)
