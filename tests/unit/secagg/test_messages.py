"""Messages and their bytes, from friends and from anybody."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.proto import secagg_pb2 as pb
from fedlearn.secagg import messages
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.messages import Masked, Opening, Survivors, from_bytes, to_bytes
from tests.support.secagg_world import malicious


def all_messages():
    world, found = malicious(4), []
    for name, client in world.clients.items():
        client.bind(b"s")
        found.append(client.check_in())
        world.server.receive(name, found[-1])
    world.server._subject = b"s"
    world.out = world.server.close()
    while world.out:
        replies = {name: world.answer(name, message) for name, message in world.out.items()}
        found += [*world.out.values(), *replies.values()]
        for name, reply in replies.items():
            world.server.receive(name, reply)
        world.out = world.server.close()
    return [*found, messages.Reveal(bytes(32)), messages.Reveals((bytes(32), b"", bytes(32)))]


ALL = all_messages()


def test_every_message_survives_the_wire():
    assert {type(message) for message in ALL} == set(messages._NAMES)
    for message in ALL:
        assert from_bytes(to_bytes(message)) == message
        assert to_bytes(from_bytes(to_bytes(message))) == to_bytes(message)


def test_no_repr_shows_shares_or_vectors():
    for message in ALL:
        text = repr(message)
        for name in ("sealed", "vector", "shares"):
            value = getattr(message, name, ())
            for one in [value] if isinstance(value, bytes) else value:
                assert repr(one)[2:12] not in text


@given(st.binary(min_size=1, max_size=300), st.integers(1, 70_000))
def test_a_masked_vector_has_the_bytes_that_protobuf_makes(signature, size):
    vector = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    whole = envelope(masked=lambda target: (setattr(target, "signature", signature), setattr(target, "vector", vector)))
    assert to_bytes(Masked(signature, vector)) == whole
    if size > 1:
        assert from_bytes(whole) == Masked(signature, vector)


@given(st.data())
def test_a_masked_vector_is_read_as_protobuf_reads_it_or_left_to_it(data):
    good = to_bytes(Masked(b"s" * 64, bytes(200)))
    start = data.draw(st.integers(0, 90))
    bad = good[:start] + data.draw(st.binary(max_size=6)) + good[start + data.draw(st.integers(0, 6)) :]
    with suppress(SecureAggregationError):
        if (found := messages._masked_from(bad)) is not None:
            other = pb.Envelope.FromString(bad)
            assert (other.version, other.WhichOneof("kind")) == (1, "masked")
            assert (other.masked.signature, other.masked.vector) == (found.signature, found.vector)


@given(st.sampled_from(ALL), st.data())
def test_bytes_from_anybody_end_in_a_message_or_in_a_named_error(message, data):
    good = to_bytes(message)
    start = data.draw(st.integers(0, len(good)))
    stop = data.draw(st.integers(start, len(good)))
    bad = good[:start] + data.draw(st.binary(max_size=8)) + good[stop:]
    with suppress(SecureAggregationError):
        assert type(from_bytes(bad)) in messages._NAMES


def envelope(**kinds):
    message = pb.Envelope(version=1)
    for name, fill in kinds.items():
        target = getattr(message, name)
        target.SetInParent()
        fill(target)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("data", "breach"),
    [
        (b"", Breach.MALFORMED),
        (b"\xff" * 10, Breach.MALFORMED),
        (pb.Envelope(version=1).SerializeToString(), Breach.MALFORMED),
        (pb.Envelope(version=2, reveal=pb.Reveal(nonce=bytes(32))).SerializeToString(), Breach.MALFORMED),
        (envelope(reveal=lambda m: None), Breach.MALFORMED),
        (envelope(reveal=lambda m: setattr(m, "nonce", bytes(31))), Breach.MALFORMED),
        (envelope(reveal=lambda m: setattr(m, "nonce", bytes(33))), Breach.TOO_LARGE),
        (envelope(opening=lambda m: setattr(m, "shares", bytes(34))), Breach.MALFORMED),
        (envelope(opening=lambda m: setattr(m, "shares", bytes(33))), Breach.MALFORMED),
        (envelope(survivors=lambda m: setattr(m, "survivors", b"")), Breach.MALFORMED),
        (envelope(survivors=lambda m: setattr(m, "survivors", bytes(1251))), Breach.TOO_LARGE),
        (envelope(agreement=lambda m: setattr(m, "signature", bytes(73))), Breach.TOO_LARGE),
        (envelope(check_in=lambda m: setattr(m, "client", "x" * 201)), Breach.TOO_LARGE),
        (envelope(reveals=lambda m: m.nonces.extend([b""] * 10_001)), Breach.TOO_LARGE),
        (envelope(roster=lambda m: m.members.add()), Breach.MALFORMED),
        (envelope(agreements=lambda m: setattr(m, "signers", b"")), Breach.MALFORMED),
    ],
)
def test_what_cannot_be_a_message_is_refused(data, breach):
    with pytest.raises(SecureAggregationError) as caught:
        from_bytes(data)
    assert caught.value.breach is breach


def test_only_a_vector_may_be_long(monkeypatch):
    monkeypatch.setattr(messages, "SMALL_LIMIT_BYTES", 1000)
    long = Masked(bytes(64), bytes(2000))
    assert from_bytes(to_bytes(long)) == long
    with pytest.raises(SecureAggregationError) as caught:
        from_bytes(to_bytes(Survivors(1, (bytes(64),) * 20)))
    assert caught.value.breach is Breach.TOO_LARGE
    monkeypatch.setattr(messages, "MESSAGE_LIMIT_BYTES", 1000)
    with pytest.raises(SecureAggregationError):
        from_bytes(to_bytes(long))


def test_a_leading_zero_place_is_no_other_set():
    assert from_bytes(to_bytes(Survivors(0, ()))) == Survivors(0, ())
    assert from_bytes(to_bytes(Opening((bytes(33),), b"s"))) == Opening((bytes(33),), b"s")
