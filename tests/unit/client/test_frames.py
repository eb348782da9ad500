from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import frames
from client.frames import Frame, Kind
from fedlearn.errors import LimitExceededError, RemoteProtocolError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(10)
        right.settimeout(10)
        yield left, right


def exchange(frame: Frame) -> Frame | None:
    left, right = socket.socketpair()
    with left, right:
        # A frame may be larger than what the system holds for a socket.
        sender = threading.Thread(target=frames.send, args=(left, frame))
        sender.start()
        try:
            return frames.receive(right)
        finally:
            sender.join()


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(Kind),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9)),
    st.lists(st.binary(max_size=50) | st.integers(0, 600_000).map(bytes), max_size=5),
)
def test_what_is_received_was_sent(kind: Kind, header: dict, buffers: list[bytes]):
    got = exchange(Frame(kind, header, buffers))
    assert got is not None
    assert (got.kind, got.header, list(got.buffers)) == (kind, header, buffers)


def test_buffers_are_bytes_and_not_in_the_repr():
    got = exchange(Frame(Kind.CALL, {}, [b"patient"]))
    assert got is not None
    assert isinstance(got.buffers[0], bytes)
    assert "patient" not in repr(got)


def test_the_end_of_the_stream_between_frames_is_none(pair: Pair):
    frames.send(pair[0], Frame(Kind.READY))
    pair[0].close()
    assert frames.receive(pair[1]) is not None
    assert frames.receive(pair[1]) is None


@pytest.mark.parametrize("cut", [1, 5, 12, 14, 20, 30])
def test_the_end_of_the_stream_within_a_frame_is_named(pair: Pair, cut: int):
    sink, source = socket.socketpair()
    with sink, source:
        frames.send(sink, Frame(Kind.DONE, {"a": 1}, [b"0123456789"]))
        whole = source.recv(1000)
    assert cut < len(whole)
    pair[0].sendall(whole[:cut])
    pair[0].close()
    with pytest.raises(RemoteProtocolError, match="ended"):
        frames.receive(pair[1])


def prefix(magic: bytes = frames.MAGIC, kind: int = 3, header: int = 2, count: int = 0) -> bytes:
    return struct.pack("!4sBII", magic, kind, header, count)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (prefix(magic=b"HTTP"), RemoteProtocolError),
        (prefix(kind=0), RemoteProtocolError),
        (prefix(kind=9), RemoteProtocolError),
        (prefix(header=frames.HEADER_LIMIT_BYTES + 1), LimitExceededError),
        (prefix(count=frames.BUFFERS_LIMIT + 1), LimitExceededError),
        (prefix(count=1) + struct.pack("!Q", frames.TOTAL_LIMIT_BYTES + 1), LimitExceededError),
        (prefix(count=2) + struct.pack("!QQ", 2**63, 2**63), LimitExceededError),
        (prefix() + b"{]", RemoteProtocolError),
        (prefix() + b"[]", RemoteProtocolError),
        (prefix(header=60_000) + b"[" * 60_000, RemoteProtocolError),
    ],
)
def test_a_bad_frame_is_refused_before_anything_is_allocated(pair: Pair, data: bytes, error: type[Exception]):
    pair[0].sendall(data)
    with pytest.raises(error, match="worker channel"):
        frames.receive(pair[1])
