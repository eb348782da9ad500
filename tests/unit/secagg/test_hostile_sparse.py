"""Attacks on sparse graphs, which have nonces to play with and neighbours to leave out; at a size that a test can afford."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlearn.secagg import graph
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import ClientState
from fedlearn.secagg.graph import members_of
from fedlearn.secagg.messages import Agreement, Delivery, Opening, Reveal, Reveals, Survivors
from fedlearn.secagg.server import Stage
from fedlearn.secagg.surplus import level_keys
from tests.support.secagg_world import World, name_of

N = 40
VICTIM = name_of(0)


@pytest.fixture(autouse=True)
def sparse(monkeypatch):
    monkeypatch.setattr(graph, "COMPLETE_LIMIT", 10)
    graph.parameters.cache_clear()
    yield
    graph.parameters.cache_clear()


@pytest.fixture
def world():
    """Everybody has revealed; `out` holds the nonces."""
    return World(N, plan={"adversarial": 0.05, "dropout": 0.05}).rostered().step()


def refuses(world, breach, message):
    with pytest.raises(SecureAggregationError) as caught:
        world.clients[VICTIM].receive(message)
    assert caught.value.breach is breach
    assert world.clients[VICTIM].state is ClientState.FAILED


def changed(world, **nonces):
    found = list(world.out[VICTIM].nonces)
    for index, nonce in nonces.items():
        found[int(index[1:])] = nonce
    return Reveals(tuple(found))


def test_surplus_noise_is_opened_by_neighbours_too():
    world = World(N, plan={"adversarial": 0.05, "dropout": 0.05, "minimum": 30, "surplus": (36, 39, 40)}).delivered()
    tops = {name: client.__dict__["_surplus"] for name, client in world.clients.items()}
    for name in [name for name in world.out if name != name_of(7)]:
        world.server.receive(name, world.answer(name, world.out[name]))
    world.out = world.server.close()
    while world.out:
        world.step()
    kept = [top for name, top in tops.items() if name != name_of(7)]
    assert world.server.surplus_keys == tuple(level_keys(top, 3)[1] for top in kept)


def test_a_nonce_that_was_not_committed_to(world):
    refuses(world, Breach.BAD_NONCE, changed(world, i7=bytes(32)))


def test_nonces_are_swapped(world):
    nonces = world.out[VICTIM].nonces
    refuses(world, Breach.BAD_NONCE, changed(world, i7=nonces[8], i8=nonces[7]))


def test_more_nonces_are_withheld_than_may_drop_out(world):
    refuses(world, Breach.BAD_NONCE, changed(world, i7=b"", i8=b"", i9=b""))


def test_the_victims_own_nonce_is_withheld(world):
    refuses(world, Breach.SELF_MISSING, changed(world, i0=b""))


@pytest.mark.parametrize("count", [0, N - 1, N + 1])
def test_another_number_of_nonces(world, count):
    nonces = (*world.out[VICTIM].nonces, bytes(32))
    refuses(world, Breach.MALFORMED, Reveals(nonces[:count]))


def test_two_sets_of_nonces(world):
    world.clients[VICTIM].receive(world.out[VICTIM])
    refuses(world, Breach.EQUIVOCATION, changed(world, i7=b""))


def test_clients_that_see_other_nonces_share_no_keys(world):
    """A server that shows different graphs to different clients: their transcripts differ, and so do their keys."""
    world.out[VICTIM] = changed(world, i7=b"")
    world.step()
    honest = world.out[VICTIM]
    alive = honest.sharers & ~(1 << 7)
    expected = sum(alive >> j & 1 for j in world.clients[VICTIM]._graph.neighbours(0))
    refuses(world, Breach.BAD_SHARE, Delivery(alive, (honest.sealed * 2)[:expected]))


def test_somebody_shares_whose_nonce_is_withheld(world):
    for name in world.out:
        world.out[name] = changed(world, i7=b"") if name != name_of(7) else world.out[name]
    world.out.pop(name_of(7))
    honest = {name: world.answer(name, message) for name, message in world.out.items()}
    near = world.clients[VICTIM]._graph.neighbours(0)
    sealed = tuple(bytes(82) for _ in near)
    assert honest
    refuses(world, Breach.WRONG_SET, Delivery((1 << N) - 1, sealed))


@pytest.fixture
def masked(world):
    """Everybody has masked; `out` holds the survivors."""
    return world.step().step()


def test_survivors_are_always_agreed_upon(masked):
    assert masked.plan.agrees(N)
    assert masked.server.stage is Stage.AGREE
    assert isinstance(masked.clients[VICTIM].receive(masked.out[VICTIM]), Agreement)


def test_too_few_survivors_around_the_victim(masked):
    near = set(masked.clients[VICTIM]._graph.neighbours(0))
    threshold = masked.plan.parameters(N).threshold
    gone = sorted(near)[: len(near) - threshold + 1]
    alive = ((1 << N) - 1) & ~sum(1 << j for j in gone)
    refuses(masked, Breach.BELOW_THRESHOLD, Survivors(alive, (bytes(64),) * (threshold - 1)))


def test_too_few_survivors_around_a_neighbour_of_the_victim(masked):
    found = masked.clients[VICTIM]._graph
    own = set(found.neighbours(0)) | {0}
    far = max(found.neighbours(0), key=lambda j: len(set(found.neighbours(j)) - own))
    apart = sorted(set(found.neighbours(far)) - own)
    spare = found.parameters.degree - found.threshold
    gone = apart[: spare + 1]
    assert len(gone) == spare + 1, "there are neighbours of a neighbour that the victim does not share"
    alive = ((1 << N) - 1) & ~sum(1 << j for j in gone)
    signatures = dict(zip(found.neighbours(0), masked.out[VICTIM].inclusions, strict=True))
    inclusions = tuple(signatures[j] for j in members_of(alive) if j in signatures)
    refuses(masked, Breach.BELOW_THRESHOLD, Survivors(alive, inclusions))


def test_a_client_reveals_what_it_did_not_commit_to():
    world = World(N, plan={"adversarial": 0.05, "dropout": 0.05}).rostered()
    with pytest.raises(SecureAggregationError) as caught:
        world.server.receive(VICTIM, Reveal(bytes(32)))
    assert caught.value.breach is Breach.BAD_NONCE
    for name, message in world.out.items():
        if name != VICTIM:
            world.server.receive(name, world.answer(name, message))
    world.out = world.server.close()
    while world.out:
        world.step()
    assert VICTIM not in world.server.survivors
    assert world.server.total.integers.tolist() == world.expected(world.server.survivors)[:-1]


def test_a_false_opening_is_found_out(masked):
    masked.step()
    for name, message in masked.out.items():
        reply = masked.answer(name, message)
        if name == VICTIM:
            client = masked.clients[VICTIM]
            shares = tuple((1).to_bytes(33, "big") for _ in reply.shares)
            signed = client._transcript.opening(0, client._survivors, N, shares)
            reply = replace(Opening(shares, b""), signature=client._sign(signed))
        masked.server.receive(name, reply)
    masked.server.close()
    assert masked.server.culprits == (VICTIM,)
    assert masked.server.total.integers.tolist() == masked.expected(masked.clients)[:-1]


def test_the_server_voids_a_round_in_which_too_few_reveal():
    world = World(N, plan={"adversarial": 0.05, "dropout": 0.05}).rostered()
    for name, message in list(world.out.items())[3:]:
        world.server.receive(name, world.answer(name, message))
    with pytest.raises(SecureAggregationError) as caught:
        world.server.close()
    assert caught.value.breach is Breach.BELOW_THRESHOLD
    assert world.server.stage is Stage.VOID
