"""Plans: what cannot be planned is refused when the plan is made, with the reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedlearn.errors import StudyError, UnsupportedError
from fedlearn.learning.update import Weighting
from fedlearn.privacy.claims import Adversary, claims
from fedlearn.privacy.events import Gaussian, PoissonSampled, Relation, Repeated, SampledWithoutReplacement
from fedlearn.privacy.plan import (
    AdaptiveClip,
    Everyone,
    FixedClip,
    FixedCohort,
    PoissonSampling,
    PrivacyPlan,
    Unit,
)
from strategies.fedavg import FedAvg
from strategies.krum import Krum
from strategies.scaffold import Scaffold

RECORDS = PrivacyPlan(Unit.RECORD, PoissonSampling(0.1), FixedClip(1.0), 1.5, 1e-5, units=1_000, rounds=10, steps=5)
CLIENTS = PrivacyPlan(Unit.CLIENT, FixedCohort(50, 1_000), FixedClip(1.0), 2.0, 1e-5, units=1_000, rounds=200)


class KeepsGradients(FedAvg):
    raw_gradient_state = True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": 1e-3}, "less than 1/1000"),
        ({"units": 0}, "empty data set"),
        ({"rounds": 0}, "rounds"),
        ({"steps": 0}, "at least 1"),
        ({"unit": "record"}, "unit"),
        ({"sampling": "shuffle"}, "sampler"),
        ({"clipping": 1.0}, "clip"),
        ({"sampling": FixedCohort(50, 1_000)}, "fixed cohort"),
        ({"unit": Unit.CLIENT}, "steps"),
        ({"weighting": Weighting.EXAMPLES}, "weights"),
    ],
)
def test_a_plan_that_does_not_hold_together_is_refused(change, says):
    with pytest.raises(StudyError, match=says):
        replace(RECORDS, **change)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PoissonSampling(0.0),
        lambda: PoissonSampling(1.5),
        lambda: PoissonSampling(math.nan),
        lambda: FixedCohort(0, 10),
        lambda: FixedCohort(11, 10),
        lambda: FixedClip(0.0),
        lambda: FixedClip(math.inf),
        lambda: AdaptiveClip(0.0),
        lambda: AdaptiveClip(1.0, quantile=1.0),
        lambda: AdaptiveClip(1.0, rate=0.0),
        lambda: AdaptiveClip(1.0, count_share=0.0),
        lambda: AdaptiveClip(1.0, count_share=1.0),
    ],
)
def test_a_part_out_of_range_is_refused(make):
    with pytest.raises(StudyError, match="privacy"):
        make()


def test_a_cohort_from_fewer_clients_than_there_are_is_refused():
    with pytest.raises(StudyError, match="drawn out of 500"):
        replace(CLIENTS, sampling=FixedCohort(50, 500))


def test_the_event_follows_from_the_plan():
    assert RECORDS.cost().event == Repeated(PoissonSampled(0.1, Gaussian(1.5)), 50)
    assert RECORDS.cost(3).event == Repeated(PoissonSampled(0.1, Gaussian(1.5)), 15)
    assert RECORDS.relation is Relation.ADD_OR_REMOVE_ONE
    # A replaced client moves the sum by twice the clip.
    assert CLIENTS.cost().event == Repeated(SampledWithoutReplacement(50, 1_000, Gaussian(1.0)), 200)
    assert CLIENTS.relation is Relation.REPLACE_ONE
    assert replace(CLIENTS, sampling=Everyone()).one_release() == Gaussian(2.0)


def test_an_adaptive_clip_pays_for_its_count():
    # Andrew et al. 2021, theorem 1: z = 1 and sigma_b = 5 give z_delta = 1.005038.
    share = (2 * 5.0) ** -2
    plan = replace(CLIENTS, noise_multiplier=1.0, clipping=AdaptiveClip(0.1, count_share=share))
    assert plan.count_noise == pytest.approx(5.0)
    assert plan.sum_noise_multiplier == pytest.approx(1.005038, abs=1e-6)
    joint = plan.sum_noise_multiplier**-2 + (2 * plan.count_noise) ** -2
    assert joint**-0.5 == pytest.approx(plan.noise_multiplier)
    assert CLIENTS.count_noise == 0.0
    assert CLIENTS.sum_noise_multiplier == CLIENTS.noise_multiplier


def test_strategies_that_cannot_carry_a_plan_are_refused():
    CLIENTS.check_strategy(FedAvg)
    RECORDS.check_strategy(FedAvg)
    RECORDS.check_strategy(Krum)  # what leaves is private already
    with pytest.raises(UnsupportedError, match="not linear"):
        CLIENTS.check_strategy(Krum)
    RECORDS.check_strategy(Scaffold)  # its memory is made of noised steps
    with pytest.raises(UnsupportedError, match="raw gradients"):
        RECORDS.check_strategy(KeepsGradients)


def test_central_noise_promises_nothing_against_the_server():
    by = {claim.adversary: claim for claim in claims(CLIENTS, 3.0, "a 1.0", seeded=False, unsampled=9.0)}
    assert by[Adversary.SERVER].epsilon == math.inf
    assert "the server adds the noise" in by[Adversary.SERVER].caveat
    assert by[Adversary.MODEL_READER].epsilon == 3.0
    assert by[Adversary.OTHER_SITES].epsilon == 9.0, (
        "each knows whether it was drawn, and together how many of the rest were"
    )
    assert "hidden" in by[Adversary.MODEL_READER].caveat


def test_a_site_that_adds_its_own_noise_is_safe_from_the_server_too():
    found = claims(RECORDS, 3.0, "a 1.0", seeded=False, unsampled=3.0)
    assert {claim.adversary for claim in found} == set(Adversary)
    assert all(claim.epsilon == 3.0 and claim.unit is Unit.RECORD and claim.accountant == "a 1.0" for claim in found)
    assert all("floating point" in claim.caveat for claim in found)


def test_a_seeded_run_promises_nothing_to_anybody():
    for plan in (RECORDS, CLIENTS):
        assert all(
            c.epsilon is None and "not private" in c.caveat for c in claims(plan, 3.0, "a", seeded=True, unsampled=3.0)
        )
