"""A hostile client in masked rounds: it drops out or is named, and the others' rounds go on with an exact sum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import arrays, events
from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Exchange, Said
from fedlearn.secagg.messages import Agreement, Masked, Opening, from_bytes, to_bytes
from tests.unit.simulation.test_masked import Sim, study_of

LIAR = "ada"


def spoiling(exchange, change, at_round=2):
    """The liar's answers to one exchange of one round are changed; it answers first, as who hurries would."""

    def spoil(now, work, replies):
        for reply in replies:
            lies = (now, work.round, reply.client) == (exchange, at_round, LIAR) and isinstance(reply, Said)
            yield change(reply) if lies else reply

    return spoil


def vector(change):
    def changed(reply):
        masked = from_bytes(reply.body)
        return replace(reply, body=to_bytes(Masked(masked.signature, change(masked.vector))))

    return changed


def body(data):
    return lambda reply: replace(reply, body=data)


NO_VECTORS = {
    "one byte is missing": vector(lambda v: v[:-1]),
    "two bytes": vector(lambda v: v[:2]),
    "seven bytes": vector(lambda v: v[:7]),
    "one number too many": vector(lambda v: v + v[:4]),
    "a message that cannot be read": body(b"\xff\xff"),
    "an empty message": body(b""),
    "a message of another exchange": body(to_bytes(Agreement(b"x"))),
}


@pytest.mark.parametrize("bits", [16, 24, 32])
@pytest.mark.parametrize("attack", NO_VECTORS)
def test_what_is_no_masked_vector_costs_its_sender_the_round_and_nobody_else(attack, bits):
    study = study_of(f"secure_aggregation.ring_bits={bits}", "secure_aggregation.max_clients=4")
    sim = Sim(study, spoil=spoiling(Exchange.TRAIN, NO_VECTORS[attack]))
    sim.run()
    assert [event.clients for event in sim.of(events.RoundFinished)] == [4, 3, 4]
    assert [event.client for event in sim.of(events.ClientDropped)] == [LIAR]
    assert not sim.of(events.RoundVoid)


def false_shares(sim):
    """It answers first with shares of nothing, well signed."""

    def changed(reply):
        (mine,) = [one.round for at, one in sim.secure._backend._sessions[LIAR]._open.items() if at.round == 2]
        opening = from_bytes(reply.body)
        shares = tuple(bytes([0, *share[1:-1], share[-1] ^ 1]) for share in opening.shares)
        signed = mine._transcript.opening(mine._index, mine._survivors, len(mine._members), shares)
        return replace(reply, body=to_bytes(Opening(shares, mine._sign(signed))))

    return changed


def test_false_shares_are_outweighed_by_the_others():
    """With as many openings as the threshold asks for, one of them false, the others are waited for."""
    sim = Sim(study_of())
    speak, spoil = sim.secure._backend.secure, spoiling(Exchange.UNMASK, false_shares(sim))
    sim.secure._backend.secure = lambda *asked: spoil(*asked[:2], speak(*asked))
    model = sim.run()
    assert not sim.of(events.RoundVoid)
    assert arrays.digest(model) == arrays.digest(Sim(study_of()).run())


def added(numbers):
    """Added to the masked vector, as who knows the ring would: the masks fall off it all the same."""

    def change(data):
        ring = np.frombuffer(data, dtype=np.uint32).copy()
        ring[: len(numbers)] += np.array(numbers, dtype=np.int64).astype(np.uint32)
        return ring.tobytes()

    return vector(change)


def weight(more):
    """The last number, by so much more."""
    return vector(lambda v: v[:-4] + ((int.from_bytes(v[-4:], "little") + more) % 2**32).to_bytes(4, "little"))


CENTRAL = (
    'privacy={unit="client", noise_multiplier=0.5, delta=0.01, units=4, clip_l2=0.3, clipping="adaptive"}',
    "secure_aggregation.max_examples=10000",
)
WEIGHTED = ("secure_aggregation.max_examples=20",)


@pytest.mark.parametrize(
    ("options", "attack"),
    [
        (WEIGHTED, added([2**30] * 30)),
        (WEIGHTED, weight(-(10**6))),
        (WEIGHTED, weight(10**6)),
        (CENTRAL, added([2**30] * 30)),
        (CENTRAL, weight(-(10**6))),
    ],
    ids=["values", "weight below", "weight above", "client level values", "client level weight"],
)
def test_a_sum_that_no_clipped_updates_can_have_is_not_used(attack, options):
    """The coordinator cannot look at one vector; at the sum it can."""
    study = study_of("secure_aggregation.max_clients=4", "rounds=2", *options)
    sim = Sim(study, spoil=spoiling(Exchange.TRAIN, attack))
    with pytest.raises(RunFailedError, match="no encoded update"):
        sim.run()
    assert len(sim.of(events.RoundFinished)) == 1


def entry(data):
    return lambda reply: replace(reply, entry=data)


def twice(reply):
    return replace(reply, entry=reply.entry * 2)


BAD_ENTRIES = {"no entry": entry(b""), "no message": entry(b"\xff\xff"), "two of them": twice}


@pytest.mark.parametrize("attack", BAD_ENTRIES)
def test_a_bad_check_in_that_rides_along_is_asked_for_again(attack):
    sim = Sim(study_of(), spoil=spoiling(Exchange.TRAIN, BAD_ENTRIES[attack]))
    sim.run()
    assert [event.clients for event in sim.of(events.RoundFinished)] == [4, 4, 4]


@pytest.mark.parametrize("attack", BAD_ENTRIES)
def test_a_bad_check_in_costs_its_sender_the_round(attack):
    sim = Sim(study_of(), spoil=spoiling(Exchange.CHECK_IN, BAD_ENTRIES[attack], at_round=1))
    sim.run()
    assert [event.clients for event in sim.of(events.RoundFinished)] == [3, 4, 4]


UNREADABLE = {
    "bytes": body(b"\xff\xff"),
    "nothing": body(b""),
    "an agreement": body(to_bytes(Agreement(b"x"))),
    "no shares": body(to_bytes(Opening((), b"x"))),
    "one share": body(to_bytes(Opening((bytes(33),), b"x"))),
    "shares out of range": body(to_bytes(Opening((b"\xff" * 33,) * 4, b"x"))),
    "a vector": body(to_bytes(Masked(b"x", bytes(1000)))),
}


@pytest.mark.parametrize("attack", UNREADABLE)
@pytest.mark.parametrize(
    ("exchange", "clients", "profile"),
    [
        (Exchange.SHARE, 3, "semi-malicious"),
        (Exchange.UNMASK, 4, "semi-malicious"),
        (Exchange.AGREE, 4, "malicious"),
        (Exchange.UNMASK, 4, "malicious"),
    ],
)
def test_nonsense_at_any_exchange_is_one_clients_dropout(exchange, clients, profile, attack):
    sim = Sim(
        study_of(f"secure_aggregation.profile={profile}", "rounds=2"), spoil=spoiling(exchange, UNREADABLE[attack])
    )
    sim.run()
    assert [event.clients for event in sim.of(events.RoundFinished)] == [4, clients]
    assert not sim.of(events.RoundVoid)
