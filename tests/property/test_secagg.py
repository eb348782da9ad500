"""Secure aggregation gives the exact sum whoever drops out when, down to the threshold, and opens nothing beyond it."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import StudyError
from fedlearn.secagg import graph
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import ClientState
from fedlearn.secagg.plan import Plan, Profile
from fedlearn.secagg.primitives import Suite
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.server import Stage
from tests.support.secagg_world import World

STAGES = [Stage.SHARE, Stage.MASK, Stage.OPEN, None]


def check(world, last):
    """Run with each client vanishing at its stage in `last` (None: never); the outcome must be what counting says."""
    order = list(Stage)
    names = list(world.clients)

    def arrives(stage, client):
        gone = last[names.index(client)]
        return gone is None or order.index(stage) < order.index(gone)

    present = {stage: [n for n in names if arrives(stage, n)] for stage in Stage}
    checked_in, sharers, masked, openers = (present[s] for s in (Stage.CHECK_IN, Stage.SHARE, Stage.MASK, Stage.OPEN))
    minimum = world.plan.minimum
    possible = len(checked_in) >= minimum
    if possible:
        needed = world.plan.parameters(len(checked_in)).threshold
        quorum = world.plan.quorum(len(checked_in)) if world.plan.agrees(len(checked_in)) else 0
        agreed = len(present[Stage.AGREE])
        possible = (
            min(len(sharers), len(masked), len(openers)) >= needed and len(masked) >= minimum and agreed >= quorum
        )
    if not possible:
        with pytest.raises(SecureAggregationError) as caught:
            world.run(arrives)
        assert caught.value.breach is Breach.BELOW_THRESHOLD
        assert world.server.stage is Stage.VOID
        return
    total = world.run(arrives)
    assert [*total.integers.tolist(), total.weight] == world.expected(masked)
    assert world.server.survivors == tuple(sorted(masked))
    assert all(world.clients[name].state is ClientState.OPENED for name in openers)


def test_every_pattern_of_dropouts_of_three():
    for last in itertools.product([Stage.CHECK_IN, *STAGES], repeat=3):
        check(World(3), last)


@pytest.mark.parametrize("n", [4, 5, 6])
def test_every_number_of_dropouts_at_every_stage(n):
    for last in itertools.combinations_with_replacement(STAGES, n):
        check(World(n), random.Random(str(last)).sample(last, n))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n", [4, 5, 6])
def test_every_pattern_of_dropouts(n):
    # Who does not even check in is not on the roster: that is a pattern of a smaller one.
    for last in itertools.product(STAGES, repeat=n):
        check(World(n), last)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(3, 16),
    st.sampled_from(list(Suite)),
    st.sampled_from(list(Profile)),
    st.sampled_from([16, 24, 32]),
    st.sampled_from([0.0, 0.1, 0.25]),
    st.data(),
)
def test_random_rosters_suites_profiles_and_dropouts(n, suite, profile, bits, adversarial, data):
    stages = [Stage.CHECK_IN, *STAGES] if profile is Profile.SEMI_MALICIOUS else [Stage.CHECK_IN, *STAGES, Stage.AGREE]
    last = data.draw(st.lists(st.sampled_from(stages), min_size=n, max_size=n))
    plan = {"suite": suite, "profile": profile, "adversarial": adversarial, "dropout": 0.0}
    check(World(n, plan=plan, ring_bits=bits, weight_cap=5), last)


@pytest.mark.parametrize("n", [17, 40])
def test_up_to_the_limit_and_not_beyond(n):
    threshold = World(n).plan.parameters(n).threshold
    for survivors in (threshold, threshold - 1):
        check(World(n), [None] * survivors + [Stage.MASK] * (n - survivors))


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 200])
def test_large_complete_graphs(n):
    spread = [STAGES[i % 3] if i % 11 == 0 else None for i in range(n)]
    check(World(n), spread)


@pytest.fixture
def sparse(monkeypatch):
    """Sparse graphs from 11 clients on: the code above 200 clients, at a size that a test can afford."""
    monkeypatch.setattr(graph, "COMPLETE_LIMIT", 10)
    graph.parameters.cache_clear()
    yield
    graph.parameters.cache_clear()


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize("gone", [None, Stage.REVEAL, Stage.SHARE, Stage.MASK, Stage.OPEN])
@pytest.mark.usefixtures("sparse")
def test_sparse_graphs(profile, gone):
    world = World(40, plan={"adversarial": 0.05, "dropout": 0.05, "profile": profile})
    order = list(Stage)
    leaving = {"site-007", "site-031"} if gone else set()

    def arrives(stage, client):
        return client not in leaving or order.index(stage) < order.index(gone)

    total = world.run(arrives)
    assert world.plan.parameters(40).degree < 30
    present = [name for name in world.clients if arrives(Stage.MASK, name)]
    assert [*total.integers.tolist(), total.weight] == world.expected(present)


@pytest.mark.slow
def test_a_roster_above_the_limit_of_complete_graphs():
    world = World(210, plan={"adversarial": 0.05, "dropout": 0.05})
    total = world.run(lambda stage, client: not (stage is Stage.MASK and client in {"site-003", "site-200"}))
    assert not world.plan.parameters(210).complete
    assert [*total.integers.tolist(), total.weight] == world.expected(world.server.survivors)
    assert len(world.server.survivors) == 208


@pytest.mark.parametrize("n", [1, 2])
def test_two_clients_are_refused_when_the_plan_is_read(n):
    with pytest.raises(StudyError, match="nothing to protect"):
        Plan(Encoding(5, n, 1.0), minimum=n)
