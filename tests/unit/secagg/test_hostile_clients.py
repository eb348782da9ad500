"""Clients that do everything wrong: the server refuses by name and goes on without them, and what it opens is right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import ClientRound, Identity
from fedlearn.secagg.messages import Agreement, Masked, Opening, Reveal
from fedlearn.secagg.primitives import new_key, sign
from fedlearn.secagg.server import ServerRound, Stage
from fedlearn.secagg.shamir import PRIME
from tests.support.secagg_world import SUBJECT, World, malicious, name_of

LIAR, OTHER, THIRD = (name_of(i) for i in range(3))


def refused(world, breach, message, client=LIAR):
    """The server refuses the message by this name, names the client, and stands where it stood."""
    stage, waiting = world.server.stage, world.server.waiting
    with pytest.raises(SecureAggregationError) as caught:
        world.server.receive(client, message)
    assert caught.value.breach is breach
    assert caught.value.culprits == (client,)
    assert (world.server.stage, world.server.waiting) == (stage, waiting)


def goes_on_without(world, *gone):
    """The rest of the round is played by the others, and their sum is exact."""
    for name in gone:
        world.out.pop(name, None)
    while world.server.stage is not Stage.OPENED:
        for name, message in world.out.items():
            if name not in gone:
                world.server.receive(name, world.answer(name, message))
        world.out = world.server.close()
    total = world.server.total
    assert [*total.integers.tolist(), total.weight] == world.expected(world.server.survivors)
    assert not set(gone) & set(world.server.survivors)


def checking_in(n=5):
    """All but the liar have checked in."""
    world = World(n)
    for name, client in world.clients.items():
        client.bind(SUBJECT)
        if name != LIAR:
            world.server.receive(name, client.check_in())
    return world


@pytest.mark.parametrize(
    ("breach", "change"),
    [
        (Breach.NOT_ENROLLED, lambda _w, c: replace(c, client=OTHER)),
        (Breach.BAD_SIGNATURE, lambda _w, c: replace(c, signature=bytes(64))),
        (Breach.BAD_SIGNATURE, lambda w, c: w.sign_in(LIAR, c, replace(w.terms, run="other"))),
        (Breach.BAD_SIGNATURE, lambda w, c: replace(c, mask_key=new_key(w.suite, w.draw("x")).public)),
        (Breach.BAD_KEY, lambda w, c: w.sign_in(LIAR, replace(c, mask_key=bytes(32)))),
        (Breach.BAD_KEY, lambda w, c: w.sign_in(LIAR, replace(c, transport_key=bytes([1]) + bytes(31)))),
        (Breach.REPEATED_KEY, lambda w, c: w.sign_in(LIAR, replace(c, mask_key=w.clients[OTHER]._own.mask_key))),
        (Breach.REPEATED_KEY, lambda w, c: w.sign_in(LIAR, replace(c, transport_key=c.mask_key))),
    ],
)
def test_a_bad_check_in(breach, change):
    world = checking_in()
    refused(world, breach, change(world, world.clients[LIAR].check_in()))
    world.out = world.server.close()
    goes_on_without(world, LIAR)


def test_a_stranger_and_one_too_many():
    world = checking_in()
    stranger = World(6).clients[name_of(5)]
    refused(world, Breach.NOT_ENROLLED, stranger.check_in(), name_of(5))
    full = World(3, room=3)
    full.server = ServerRound(full.terms, World(4).trust, SUBJECT)
    full.rostered()
    late = World(3, room=3)
    late.server = ServerRound(late.terms, World(4).trust, SUBJECT)
    for name, client in late.clients.items():
        late.server.receive(name, client.check_in())
    fourth = ClientRound(late.terms, World(4).identities[name_of(3)], World(4).trust, late.draw("fourth"))
    refused(late, Breach.ROSTER_SIZE, fourth.check_in(), name_of(3))


def test_one_identity_under_two_names():
    world = World(5)
    twin = Identity(OTHER, world.identities[LIAR].key)
    trust = {**world.trust, OTHER: twin.key.public}
    world.server = ServerRound(world.terms, trust, SUBJECT)
    world.server.receive(LIAR, world.clients[LIAR].check_in())
    refused(world, Breach.REPEATED_KEY, ClientRound(world.terms, twin, trust, world.draw("twin")).check_in(), OTHER)


def test_another_check_in_than_before_and_one_after_the_roster():
    world = checking_in()
    first = world.clients[LIAR].check_in()
    assert world.server.receive(LIAR, first)
    assert not world.server.receive(LIAR, first), "a resend is no offence"
    refused(world, Breach.EQUIVOCATION, World(5, seed="again").clients[LIAR].check_in())
    world.server.close()
    refused(world, Breach.UNEXPECTED, first)


def test_a_message_of_another_stage():
    world = World(5).rostered()
    for message in (Masked(bytes(64), bytes(32)), Opening((), bytes(64)), Agreement(bytes(64)), Reveal(bytes(32))):
        refused(world, Breach.UNEXPECTED, message)
    world.step()
    goes_on_without(world)


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: (*s, s[0]), lambda _s: ()])
def test_shares_for_more_or_fewer_than_the_neighbours(change):
    world = World(5).rostered()
    shares = world.clients[LIAR].receive(world.out[LIAR])
    refused(world, Breach.MALFORMED, replace(shares, sealed=change(shares.sealed)))
    goes_on_without(world, LIAR)


def test_shares_that_do_not_decrypt_end_the_round_of_who_finds_it_out():
    world = World(5).rostered()
    for name, client in world.clients.items():
        shares = client.receive(world.out[name])
        spoiled = (bytes(82), *shares.sealed[1:])  # the first neighbour of site-000 is site-001
        world.server.receive(name, replace(shares, sealed=spoiled) if name == LIAR else shares)
    world.out = world.server.close()
    with pytest.raises(SecureAggregationError) as caught:
        world.clients[OTHER].receive(world.out[OTHER])
    assert caught.value.breach is Breach.BAD_SHARE
    goes_on_without(world, OTHER)


@pytest.mark.parametrize(
    ("breach", "change"),
    [
        (Breach.BAD_VECTOR, lambda m: replace(m, vector=m.vector[:-4])),
        (Breach.BAD_VECTOR, lambda m: replace(m, vector=m.vector + bytes(4))),
        (Breach.BAD_VECTOR, lambda m: replace(m, vector=b"")),
        (Breach.BAD_SIGNATURE, lambda m: replace(m, signature=bytes(64))),
    ],
)
def test_a_bad_masked_vector(breach, change):
    world = World(5).delivered()
    refused(world, breach, change(world.answer(LIAR, world.out[LIAR])))
    goes_on_without(world, LIAR)


def test_a_second_vector_is_not_added():
    world = World(5).delivered()
    masked = world.answer(LIAR, world.out[LIAR])
    world.out.pop(LIAR)
    assert world.server.receive(LIAR, masked)
    assert not world.server.receive(LIAR, masked)
    refused(world, Breach.EQUIVOCATION, replace(masked, signature=bytes(64)))
    refused(world, Breach.EQUIVOCATION, replace(masked, vector=bytes(len(masked.vector))))
    world.step()
    goes_on_without(world)
    assert LIAR in world.server.survivors


def test_a_vector_of_who_did_not_share():
    world = World(5).rostered()
    for name, client in world.clients.items():
        if name != LIAR:
            world.server.receive(name, client.receive(world.out[name]))
    world.out = world.server.close()
    refused(world, Breach.WRONG_SET, Masked(bytes(64), bytes(32)))
    goes_on_without(world, LIAR)


def test_an_agreement_to_something_else():
    world = malicious(5).masked()
    refused(world, Breach.BAD_SIGNATURE, Agreement(bytes(64)))
    goes_on_without_agreement = world.out.pop(LIAR)
    assert goes_on_without_agreement
    world.step()
    for name, message in world.out.items():
        if name != LIAR:
            world.server.receive(name, world.answer(name, message))
    world.server.close()
    assert world.server.total.integers.tolist() == world.expected(world.clients)[:-1]


def opening(world):
    return world.clients[LIAR].receive(world.out[LIAR])


def signed_anew(world, shares):
    client = world.clients[LIAR]
    message = client._transcript.opening(client._index, client._survivors, len(client._members), shares)
    return Opening(shares, sign(world.suite, world.identities[LIAR].key.secret, message))


@pytest.mark.parametrize(
    ("breach", "change"),
    [
        (Breach.BAD_SIGNATURE, lambda _w, o: replace(o, signature=bytes(64))),
        (Breach.BAD_SIGNATURE, lambda _w, o: replace(o, shares=(o.shares[1], o.shares[0], *o.shares[2:]))),
        (Breach.MALFORMED, lambda w, o: signed_anew(w, o.shares[:-1])),
        (Breach.MALFORMED, lambda w, o: signed_anew(w, ())),
        (Breach.BAD_SHARE, lambda w, o: signed_anew(w, (PRIME.to_bytes(33, "big"), *o.shares[1:]))),
        (Breach.BAD_SHARE, lambda w, o: signed_anew(w, (bytes(32), *o.shares[1:]))),
    ],
)
def test_a_bad_opening(breach, change):
    world = World(5).masked()
    refused(world, breach, change(world, opening(world)))
    world.out.pop(LIAR)
    for name, message in world.out.items():
        world.server.receive(name, world.answer(name, message))
    world.server.close()
    assert world.server.total.integers.tolist() == world.expected(world.clients)[:-1]


@pytest.mark.parametrize("n", [5, 9])
@pytest.mark.parametrize("gone", [0, 1])
def test_false_shares_are_found_out_and_the_sum_is_exact(n, gone):
    world = World(n).delivered()
    dead = [name_of(n - 1)][:gone]
    for name in dead:
        world.out.pop(name)
    world.step()
    for name, message in world.out.items():
        reply = world.answer(name, message)
        if name == LIAR:
            reply = signed_anew(world, tuple((1).to_bytes(33, "big") for _ in reply.shares))
        world.server.receive(name, reply)
    if n - gone - 1 < world.plan.parameters(n).threshold:
        with pytest.raises(SecureAggregationError) as caught:
            world.server.close()
        assert caught.value.breach is Breach.BAD_RECONSTRUCTION
        assert world.server.stage is Stage.VOID
        return
    world.server.close()
    total = world.server.total
    assert [*total.integers.tolist(), total.weight] == world.expected(world.server.survivors)
    assert world.server.culprits == (LIAR,)


class Dealer(ClientRound):
    """Promises one seed or key and shares another."""

    spoiled = ""

    def _share(self, graph):
        shares = super()._share(graph)
        if self.spoiled == "commitment":
            return replace(shares, seed_commitment=bytes(32))
        return shares


@pytest.mark.parametrize("spoiled", ["commitment", "key"])
def test_a_dealer_of_false_secrets_voids_the_round_and_is_named(spoiled):
    world = World(5)
    dealer = Dealer(world.terms, world.identities[LIAR], world.trust, world.draw("dealer"))
    dealer.spoiled = spoiled
    world.clients[LIAR] = dealer
    world.rostered()
    if spoiled == "key":  # shares another key than it checked in with, and then drops out
        dealer._mask_key = new_key(world.suite, world.draw("another"))
    world.step()
    if spoiled == "key":
        world.out.pop(LIAR)
    world.step()
    for name, message in world.out.items():
        world.server.receive(name, world.answer(name, message))
    with pytest.raises(SecureAggregationError) as caught:
        world.server.close()
    assert caught.value.breach is Breach.BAD_RECONSTRUCTION
    assert caught.value.culprits == (LIAR,)
    assert world.server.stage is Stage.VOID


@pytest.mark.parametrize("answering", [3, 2, 0])
def test_too_few_openings_open_nothing(answering):
    world = World(5).masked()
    for name, message in list(world.out.items())[:answering]:
        world.server.receive(name, world.answer(name, message))
    assert not world.server.ready()
    with pytest.raises(SecureAggregationError) as caught:
        world.server.close()
    assert caught.value.breach is Breach.BELOW_THRESHOLD
    assert world.server._sum.size == 0


def test_ready_says_when_the_openings_suffice():
    world = World(5).masked()
    ready = []
    for name, message in world.out.items():
        world.server.receive(name, world.answer(name, message))
        ready.append(world.server.ready())
    assert ready == [False, False, False, True, True]
