"""What a plan promises is what a run does."""

from __future__ import annotations

import pytest

from fedlearn.secagg.estimate import estimate
from fedlearn.secagg.messages import to_bytes
from fedlearn.secagg.plan import Profile
from fedlearn.secagg.primitives import Suite
from tests.support.secagg_world import World


@pytest.mark.parametrize("suite", Suite)
@pytest.mark.parametrize("profile", Profile)
def test_the_bytes_are_those_of_a_run(suite, profile):
    world = World(9, length=500, plan={"suite": suite, "profile": profile})
    name = "site-004"
    world.rostered()
    up, down, exchanges = len(to_bytes(world.clients[name]._own)), 0, 0
    while world.out:
        exchanges += 1
        down += len(to_bytes(world.out[name]))
        replies = {one: world.answer(one, message) for one, message in world.out.items()}
        up += len(to_bytes(replies[name]))
        for one, reply in replies.items():
            world.server.receive(one, reply)
        world.out = world.server.close()
    found = estimate(world.plan)
    # Names and ECDSA signatures are of changing length; the estimate takes 16 bytes and the longest.
    assert found.sizes.up == pytest.approx(up, abs=60)
    assert down <= found.sizes.down <= down + 9 * 30
    assert found.exchanges == exchanges - 1, (
        "the roster's answer is an exchange, the masked vector's is the update's own"
    )


def test_the_dropouts_of_a_plan():
    assert [estimate(World(n).plan).dropouts for n in (3, 4, 5, 10)] == [0, 1, 1, 4]
    assert estimate(World(10, plan={"minimum": 8}).plan).dropouts == 2


def test_the_coalitions_of_a_plan():
    found = estimate(World(10).plan).coalitions
    assert (found.allowed, found.lying, found.looking) == (1, 2, 6)
