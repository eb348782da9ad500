import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import LimitExceededError, RemoteProtocolError
from fedlearn.link import framing
from fedlearn.link.frames import (
    Ack,
    Cancel,
    Chunk,
    End,
    Fault,
    FaultCode,
    Goodbye,
    Heartbeat,
    Hello,
    Resume,
    Retry,
    Start,
    Welcome,
)
from fedlearn.link.limits import MIB, LinkLimits
from fedlearn.proto import link_pb2 as pb

LIMITS = LinkLimits()
U64 = st.integers(0, 2**64 - 1)
FRAMES = [
    Hello(1, 3, b"i" * 16, {"site": "cleveland"}, (Resume("m", 5, 7),)),
    Welcome(1, b"j" * 16, 9, (Resume("n", 2**64 - 1, 2**40),), ("a", "b")),
    Heartbeat(2.5),
    Start("m", "", 4, b"meta", (0, 3, 2**20), 60.0, 3),
    Start("r", "m", 0, b"", (), 0.0),
    End(3),
    Ack("m"),
    Retry(2**63, 1024),
    Cancel("m"),
    Goodbye("bye"),
    Fault(FaultCode.LIMIT, "too much", "m"),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_comes_back_as_it_went(frame):
    assert framing.unpack(framing.pack(frame), LIMITS) == frame


@given(payload_id=U64, offset=U64, checksum=U64, parts=st.lists(st.binary(min_size=1, max_size=300), min_size=1))
def test_a_chunk_written_by_hand_is_what_protobuf_reads(payload_id, offset, checksum, parts):
    data = b"".join(parts)
    packed = framing.pack_chunk(payload_id, offset, checksum, parts)
    proto = pb.Frame.FromString(packed).chunk
    assert (proto.payload_id, proto.offset, proto.checksum, proto.data) == (payload_id, offset, checksum, data)
    assert framing.unpack(packed, LIMITS) == Chunk(payload_id, offset, checksum, data)


@given(payload_id=U64, offset=U64, checksum=U64, data=st.binary(max_size=300))
def test_a_chunk_written_by_protobuf_is_read_too(payload_id, offset, checksum, data):
    proto = pb.Frame(chunk=pb.Chunk(payload_id=payload_id, offset=offset, checksum=checksum, data=data))
    assert framing.unpack(proto.SerializeToString(), LIMITS) == Chunk(payload_id, offset, checksum, data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_named_error(data):
    with contextlib.suppress(RemoteProtocolError):
        framing.unpack(data, LIMITS)


@given(st.binary(max_size=60), st.integers(0, 90))
def test_a_cut_chunk_is_refused(data, keep):
    packed = framing.pack_chunk(1, 2, 3, (data,))
    if keep < len(packed):
        with pytest.raises(RemoteProtocolError):
            framing.unpack(packed[:keep], LIMITS)


@pytest.mark.parametrize(
    ("proto", "limit"),
    [
        ({"hello": pb.Hello(incarnation=b"i" * 16, facts={str(i): "" for i in range(65)})}, "limit facts is 64"),
        ({"hello": pb.Hello(incarnation=b"i" * 16, facts={"a": "b" * 1025})}, "limit fact_bytes is 1024"),
        (
            {"hello": pb.Hello(incarnation=b"i" * 16, resumes=[pb.Resume(message_id="m")] * 1025)},
            "limit outgoing_messages is 1024",
        ),
        ({"welcome": pb.Welcome(incarnation=b"i" * 16, wanted=["m"] * 1025)}, "limit outgoing_messages is 1024"),
        ({"start": pb.Start(message_id="m", metadata=b"x" * (16 * MIB + 1))}, "limit metadata_bytes is"),
        ({"start": pb.Start(message_id="m", buffer_bytes=[0] * 100_001)}, "limit message_buffers is 100000"),
        ({"start": pb.Start(message_id="m", buffer_bytes=[2**63, 2**63])}, "limit message_bytes is"),
        ({"ack": pb.Ack(message_id="m" * 129)}, "limit id_bytes is 128"),
        ({"heartbeat": pb.Heartbeat(next_within_s=61)}, "limit heartbeat_promise_s is"),
        ({"goodbye": pb.Goodbye(reason="r" * 4097)}, "limit reason_bytes is 4096"),
        ({"fault": pb.Fault(reason="r" * 4097)}, "limit reason_bytes is 4096"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_exceeds_a_limit_is_refused_by_the_limits_name(proto, limit):
    with pytest.raises(LimitExceededError, match=limit):
        framing.unpack(pb.Frame(**proto).SerializeToString(), LIMITS)


def test_a_frame_that_is_too_large_is_refused_before_it_is_read():
    with pytest.raises(LimitExceededError, match="limit frame_bytes is"):
        framing.unpack(bytes(LIMITS.frame_bytes + 1), LIMITS)


@pytest.mark.parametrize(
    "proto",
    [
        {"hello": pb.Hello(incarnation=b"short")},
        {"start": pb.Start(message_id="")},
        {"start": pb.Start(message_id="m", ttl_s=float("nan"))},
        {"start": pb.Start(message_id="m", ttl_s=-1)},
        {"start": pb.Start(message_id="m", buffer_bytes=[5], offset=6)},
        {"heartbeat": pb.Heartbeat(next_within_s=float("inf"))},
        {"cancel": pb.Cancel()},
        {},
    ],
    ids=str,
)
def test_what_no_correct_peer_sends_is_refused(proto):
    with pytest.raises(RemoteProtocolError):
        framing.unpack(pb.Frame(**proto).SerializeToString(), LIMITS)


def test_limits_must_fit_each_other():
    with pytest.raises(ValueError, match="frame_bytes"):
        LinkLimits(chunk_bytes=32 * MIB)
    with pytest.raises(ValueError, match="heartbeat_s"):
        LinkLimits(heartbeat_s=0)
