import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import RemoteProtocolError
from fedlearn.link import framing
from fedlearn.link.frames import Chunk, Start
from fedlearn.link.limits import MIB, LinkLimits
from fedlearn.link.transfer import Incoming, Payload

LIMITS = LinkLimits()


def start_of(payload):
    return Start("m", "", payload.payload_id, b"", payload.buffer_bytes, 9.0)


def chunks(payload, offset=0):
    while offset < payload.size_bytes:
        frame, offset = payload.frame_at(offset)
        yield framing.unpack(frame, LIMITS)


@given(st.lists(st.binary(max_size=50), max_size=12), st.integers(1, 40))
def test_buffers_come_back_whatever_their_sizes_and_the_chunks(buffers, chunk_bytes):
    payload = Payload(buffers, chunk_bytes)
    message = Incoming(start_of(payload))
    for chunk in chunks(payload):
        assert not message.complete
        assert message.write(chunk)
    assert message.complete
    assert message.buffers() == tuple(buffers)


def test_many_streams_cost_one_encoding():
    payload = Payload([b"x" * MIB, b"y" * MIB], 64 * 1024)
    messages = [Incoming(start_of(payload)) for _ in range(50)]
    for offset in range(0, payload.size_bytes, 64 * 1024):
        frames = {id(payload.frame_at(offset)[0]) for _ in messages}
        assert len(frames) == 1
        for message in messages:
            message.write(framing.unpack(payload.frame_at(offset)[0], LIMITS))
    assert payload.frames_built == 32
    assert all(message.buffers() == (b"x" * MIB, b"y" * MIB) for message in messages)


def test_frames_kept_are_bounded():
    payload = Payload([bytes(MIB)] * 100, MIB)
    tracemalloc.start()
    try:
        for offset in range(0, payload.size_bytes, MIB):
            payload.frame_at(offset)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 6 * MIB


def test_an_announcement_allocates_nothing():
    tracemalloc.start()
    try:
        message = Incoming(Start("m", "", 1, b"", (2 * 1024**3 - 1, 1), 9.0))
        data = b"z" * 1024
        message.write(Chunk(1, 0, _sum(data), data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024


def test_a_large_buffer_is_received_without_a_second_copy():
    payload = Payload([bytes(64 * MIB)], MIB)
    message = Incoming(start_of(payload))
    tracemalloc.start()
    try:
        for chunk in chunks(payload):
            message.write(chunk)
        (buffer,) = message.buffers()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(buffer) == 64 * MIB
    # The buffer with the growth that is ahead of it (an eighth), and the sender's window of frames.
    assert peak < 64 * MIB * 9 / 8 + 8 * MIB


def _sum(data):
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


def test_a_damaged_chunk_is_not_kept():
    message = Incoming(Start("m", "", 1, b"", (4,), 9.0))
    assert not message.write(Chunk(1, 0, _sum(b"abcd"), b"abce"))
    assert message.received_bytes == 0
    assert message.write(Chunk(1, 0, _sum(b"abcd"), b"abcd"))
    assert message.buffers() == (b"abcd",)


@pytest.mark.parametrize(
    ("offset", "data"), [(1, b"a"), (0, b""), (0, b"abcde")], ids=["hole", "empty", "longer than announced"]
)
def test_a_chunk_that_cannot_be_the_next_is_refused(offset, data):
    message = Incoming(Start("m", "", 1, b"", (4,), 9.0))
    with pytest.raises(RemoteProtocolError):
        message.write(Chunk(1, offset, _sum(data), data))
    assert message.received_bytes == 0


def test_only_the_beginnings_of_chunks_are_boundaries():
    payload = Payload([b"x" * 25], 10)
    assert [offset for offset in range(40) if payload.is_boundary(offset)] == [0, 10, 20, 25]
