"""The client by itself: order, secrets, and what its caller may get wrong."""

from __future__ import annotations

import logging
import os
import pickle
import traceback

import numpy as np
import pytest

from fedlearn.errors import LocalProtocolError
from fedlearn.secagg.breach import SecureAggregationError
from fedlearn.secagg.client import EXPECTED, SECRETS, ClientRound, ClientState, Identity
from fedlearn.secagg.messages import Roster
from tests.support.secagg_world import World, malicious

NAME = "site-000"


def secrets_of(client):
    """Every secret byte string that a client holds now."""
    found = []
    for name in SECRETS:
        value = client.__dict__.get(name, ())
        if hasattr(value, "secret"):
            found.append(value.secret)
        elif isinstance(value, bytes):
            found.append(value)
        elif isinstance(value, dict):
            found += [part for one in value.values() for part in (one if isinstance(one, tuple) else (one,)) if part]
    return found


def forms(secret):
    return (secret.hex(), repr(secret)[2:-1], str(int.from_bytes(secret, "big")))


def test_no_secret_is_in_a_log_an_error_or_a_repr_of_a_whole_run(caplog):
    caplog.set_level(logging.DEBUG)
    world, seen, texts = malicious(4), set(), []
    world.rostered()
    while world.out:
        for client in world.clients.values():
            seen |= set(secrets_of(client))
        texts += [repr(vars(one)) for one in (*world.identities.values(), world.server)]
        texts += [repr(one) for one in (*world.clients.values(), world.server, world.server._came, world.out)]
        replies = {name: world.answer(name, message) for name, message in world.out.items()}
        texts += [repr(replies)]
        for name, reply in replies.items():
            world.server.receive(name, reply)
        world.out = world.server.close()
    broken = World(4).rostered()
    try:
        broken.clients[NAME].receive(Roster(broken.out[NAME].members[1:]))
    except SecureAggregationError as error:
        texts.append("".join(traceback.format_exception(error)) + repr(error))
    everything = "\n".join([*texts, caplog.text])
    assert len(seen) > 4 * 5
    assert len(everything) > 1000
    for secret in seen:
        assert not any(form in everything for form in forms(secret))


def test_each_secret_goes_when_it_is_needed_no_more():
    world, held = World(4), []

    def holding():
        return {name for name in SECRETS if name in world.clients[NAME].__dict__}

    world.rostered()
    while world.out:
        held.append(holding())
        world.step()
    assert held == [
        {"_mask_key", "_transport_key", "_nonce"},
        {"_mask_key", "_seed", "_held", "_channels"},
        {"_held"},
    ]
    assert not holding()


def test_secrets_are_gone_when_the_sum_is_open_and_when_the_round_is_given_up():
    world = World(4).masked()
    assert secrets_of(world.clients[NAME])
    world.step()
    assert all(not secrets_of(client) for client in world.clients.values())
    other = World(4).masked()
    other.clients[NAME].abandon()
    assert not secrets_of(other.clients[NAME])
    assert other.clients[NAME].state is ClientState.FAILED


def test_a_client_cannot_be_pickled_with_its_secrets_by_accident():
    world = World(4)
    client = ClientRound(world.terms, world.identities[NAME], world.trust, os.urandom)
    client.check_in()
    with pytest.raises(TypeError, match="never stored"):
        pickle.dumps(client)


def test_states_are_taken_in_order():
    world = malicious(4)
    client, states = world.clients[NAME], []
    states.append(client.state)
    world.rostered()
    while world.out:
        states.append(client.state)
        world.step()
    states.append(client.state)
    assert [s.name for s in states] == ["NEW", "CHECKED_IN", "SHARED", "MASKED", "AGREED", "OPENED"]
    assert set(EXPECTED) == set(ClientState) - {
        ClientState.NEW,
        ClientState.READY,
        ClientState.OPENED,
        ClientState.FAILED,
    }


def test_a_client_checks_in_once_and_binds_before_it_answers():
    world = World(4).rostered()
    client = world.clients[NAME]
    with pytest.raises(LocalProtocolError, match="expected new"):
        client.check_in()
    unbound = World(4)
    unbound.clients[NAME].check_in()
    with pytest.raises(LocalProtocolError, match="bind"):
        unbound.clients[NAME].receive(world.out[NAME])
    world.step()
    with pytest.raises(LocalProtocolError, match="bind in state"):
        client.bind(b"later")


def test_a_vector_is_masked_once_and_only_the_right_one():
    world = World(4).delivered()
    client, vector = world.clients[NAME], world.vectors[NAME]
    with pytest.raises(LocalProtocolError, match="expected ready"):
        client.mask(vector)
    client.receive(world.out[NAME])
    for wrong in (vector[:-1], vector.astype(np.int64), vector.reshape(-1, 1)):
        with pytest.raises(LocalProtocolError, match="to mask"):
            client.mask(wrong)
    client.mask(vector)
    with pytest.raises(LocalProtocolError, match="expected ready"):
        client.mask(vector)


def test_a_client_that_is_not_enrolled_with_its_own_key_does_not_start():
    world = World(4)
    other = Identity(NAME, world.identities["site-001"].key)
    with pytest.raises(LocalProtocolError, match="not enrolled"):
        ClientRound(world.terms, other, world.trust, world.draw("x"))


def test_fresh_keys_every_time():
    one, other = World(3, seed="one"), World(3, seed="other")
    a, b = one.clients[NAME].check_in(), other.clients[NAME].check_in()
    assert not {a.mask_key, a.transport_key, a.commitment} & {b.mask_key, b.transport_key, b.commitment}
