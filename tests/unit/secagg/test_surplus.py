"""Surplus noise: parts that add up, keys that open downwards only, and what the protocol opens of them to whom."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn.errors import StudyError
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.noise import Noise, add_noise
from fedlearn.secagg.plan import LEVELS_LIMIT, Plan, Profile
from fedlearn.secagg.primitives import KEY_BYTES, derive
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.server import Stage
from fedlearn.secagg.surplus import Surplus, anchor_of, level_keys
from tests.support.secagg_world import World, name_of

SURPLUS = Surplus.over(1000.0, 5, {8: 6, 10: 8})
BASE, TOP = b"b" * 32, b"t" * 32


def test_whatever_survives_leaves_the_variance_that_is_needed():
    assert SURPLUS.added == pytest.approx(1000 / 5)
    for survivors, honest in ((7, 5), (8, 6), (9, 6), (10, 8)):
        assert SURPLUS.left(survivors) * honest == pytest.approx(1000.0)


def test_without_levels_nothing_goes():
    plain = Surplus.over(1000.0, 5, {})
    vector = np.zeros(100, dtype="<u4")
    plain.remove(vector, 10, [])
    assert plain.added == plain.left(10) == 200
    assert not vector.any()


@pytest.mark.parametrize(("survivors", "level"), [(7, 0), (8, 1), (9, 1), (10, 2)])
def test_the_server_takes_off_exactly_the_parts_of_the_levels_reached(survivors, level):
    vector = np.zeros(5000, dtype="<u4")
    SURPLUS.add(vector, BASE, TOP)
    assert SURPLUS.reached(survivors) == level
    SURPLUS.remove(vector, survivors, [level_keys(TOP, 2)[level - 1]] if level else [])
    keys = [BASE, *level_keys(TOP, 2)]
    for part in [0, *range(level + 1, 3)]:
        add_noise(vector, Noise.SKELLAM, SURPLUS.variances[part], derive(keys[part], b"surplus part"), sign=-1)
    assert not vector.any()


def test_a_level_opens_those_below_it_and_not_those_above():
    low, high = level_keys(TOP, 2)
    assert high == TOP
    assert level_keys(low, 1) == [low]
    assert anchor_of(low, 1) == anchor_of(high, 2)
    assert high not in level_keys(low, 1)


@pytest.mark.parametrize("levels", [{8: 5}, {8: 4}, {8: 6, 10: 6}])
def test_a_level_that_removes_nothing_is_refused(levels):
    with pytest.raises(StudyError, match="rising levels"):
        Surplus.over(1000.0, 5, levels)


# In the protocol: six clients, levels at five and six survivors.


def world_of(profile=Profile.MALICIOUS, **plan):
    return World(6, plan={"profile": profile, "minimum": 4, "surplus": (5, 6)} | plan)


def surplus_keys(world: World) -> dict[str, bytes]:
    return {name: client.__dict__["_surplus"] for name, client in world.clients.items()}


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize(("gone", "level"), [((), 2), ((2,), 1), ((2, 3), 0)])
def test_survivors_open_the_keys_of_the_level_that_they_reach(profile, gone, level):
    world = world_of(profile).delivered()
    tops = surplus_keys(world)
    assert all(client.state.value == "shared" for client in world.clients.values())
    kept = [name for i, name in enumerate(world.clients) if i not in gone]
    while world.out:
        for name in [name for name in world.out if name in kept]:
            world.server.receive(name, world.answer(name, world.out[name]))
        world.out = world.server.close()
    assert world.server.stage is Stage.OPENED
    assert world.server.surplus_keys == tuple(level_keys(tops[name], 2)[level - 1] for name in kept if level)
    assert not world.server.culprits
    assert [*world.server.total.integers.tolist(), world.server.total.weight] == world.expected(kept)


def test_who_vanishes_before_it_opens_has_its_surplus_opened_by_the_others():
    world = world_of().agreed()
    promised = promised_in(world)
    for name, message in list(world.out.items())[:-1]:
        world.server.receive(name, world.clients[name].receive(message))
    world.server.close()
    assert len(world.server.surplus_keys) == 6
    assert {anchor_of(key, 2) for key in world.server.surplus_keys} == promised


def promised_in(world: World) -> set[bytes]:
    """What the clients promised; their keys are gone."""
    return {message.surplus_anchor for message in world.server._came[Stage.SHARE].values()}


def test_a_client_holds_its_key_until_its_update_is_masked():
    world = world_of().delivered()
    client = world.clients[name_of(0)]
    client.receive(world.out[name_of(0)])
    key = client.surplus_key
    assert len(key) == 32
    assert key == surplus_keys(world)[name_of(0)]
    client.mask(world.vectors[name_of(0)])
    assert "_surplus" not in client.__dict__
    assert repr(key) not in repr(client.__dict__)


def test_a_false_share_is_passed_over_and_named():
    world = world_of().agreed()
    liar = name_of(0)
    for name, message in world.out.items():
        opening = world.clients[name].receive(message)
        if name == liar:
            false = (opening.surplus[0], opening.surplus[2], *opening.surplus[2:])
            signed = world.server._transcript.opening(0, world.server._survivors, 6, (*opening.shares, *false))
            opening = replace(opening, surplus=false, signature=world.clients[name]._sign(signed))
        world.server.receive(name, opening)
    world.server.close()
    assert {anchor_of(key, 2) for key in world.server.surplus_keys} == promised_in(world)
    assert world.server.culprits == (liar,)


def test_a_false_promise_leaves_that_clients_noise_in_the_sum():
    world = world_of().rostered()
    for name, message in world.out.items():
        shares = world.clients[name].receive(message)
        world.server.receive(name, replace(shares, surplus_anchor=bytes(32)) if name == name_of(1) else shares)
    world.out = world.server.close()
    tops = surplus_keys(world)
    while world.out:
        world.step()
    assert world.server.surplus_keys == tuple(top for name, top in tops.items() if name != name_of(1))
    assert world.server.culprits == (name_of(1),)
    assert world.server.total.weight == 6


def refused(world, name, message, breach):
    with pytest.raises(SecureAggregationError) as caught:
        world.server.receive(name, message)
    assert caught.value.breach is breach


@pytest.mark.parametrize("anchor", [b"", bytes(KEY_BYTES - 1)])
def test_a_promise_of_another_length_is_refused(anchor):
    world = world_of().rostered()
    shares = world.clients[name_of(0)].receive(world.out[name_of(0)])
    refused(world, name_of(0), replace(shares, surplus_anchor=anchor), Breach.MALFORMED)
    plain = World(6).rostered()
    shares = plain.clients[name_of(0)].receive(plain.out[name_of(0)])
    refused(plain, name_of(0), replace(shares, surplus_anchor=bytes(KEY_BYTES)), Breach.MALFORMED)


def test_an_opening_without_the_shares_or_with_altered_ones_is_refused():
    world = world_of().agreed()
    name, message = next(iter(world.out.items()))
    opening = world.clients[name].receive(message)
    refused(world, name, replace(opening, surplus=opening.surplus[::-1]), Breach.BAD_SIGNATURE)
    for surplus in ((), opening.surplus[:-1]):
        signed = world.server._transcript.opening(0, world.server._survivors, 6, (*opening.shares, *surplus))
        bad = replace(opening, surplus=surplus, signature=world.clients[name]._sign(signed))
        refused(world, name, bad, Breach.MALFORMED)


def test_shares_for_another_number_of_levels_are_refused():
    one, two = world_of(), world_of(surplus=(6,))
    assert one.terms.digest() != two.terms.digest()
    for world in (one, two):
        world.delivered()
    with pytest.raises(SecureAggregationError):
        one.clients[name_of(0)].receive(two.out[name_of(0)])


def test_no_level_is_opened_that_the_survivors_shown_do_not_reach():
    """A server that got every vector, but shows five survivors, gets shares of the first level's keys only."""
    world = world_of(Profile.SEMI_MALICIOUS).masked()
    victim = name_of(0)
    told = world.out[victim]
    fewer = replace(told, survivors=told.survivors & ~(1 << 5), inclusions=told.inclusions[:-1])
    low = world.clients[victim].receive(fewer)
    full = world.clients[name_of(1)].receive(world.out[name_of(1)])
    assert len(low.surplus) == 5
    assert len(full.surplus) == 6
    assert set(low.surplus).isdisjoint(full.surplus)


@pytest.mark.parametrize(
    "levels", [(4,), (7,), (6, 5), (5, 5), tuple(range(5, 5 + LEVELS_LIMIT + 1))], ids=lambda levels: f"{levels[:3]}"
)
def test_a_plan_refuses_levels_that_cannot_be(levels):
    clients = 6 if len(levels) < LEVELS_LIMIT else 40
    with pytest.raises(StudyError, match="surplus noise goes at"):
        Plan(Encoding(5, clients, 1.0), minimum=4, surplus=levels)
