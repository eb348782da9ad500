"""Frames between the agent and its worker, on one inherited socket pair: a kind, a JSON header, raw buffers.

A frame is `!4sBII` (magic, kind, header bytes, number of buffers), one `!Q` for each buffer's size, the header, the buffers.
Both ends run on one machine under one program, yet every size has a named limit: the worker runs the app's code.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, unique
from typing import Any, Final

from fedlearn.errors import LimitExceededError, RemoteProtocolError

MAGIC: Final = b"FLW1"
HEADER_LIMIT_BYTES: Final = 4 * 1024**2
BUFFERS_LIMIT: Final = 200_000
TOTAL_LIMIT_BYTES: Final = 8 * 1024**3
"""A message of the link's size and a client's state, with room to spare."""

_PREFIX = struct.Struct("!4sBII")
_RECEIVE_BYTES: Final = 1024**3
_JOIN_BYTES: Final = 256 * 1024
"""Smaller pieces are sent together: one system call costs more than their copy."""


@unique
class Kind(IntEnum):
    """What a frame is."""

    INIT = 1  # agent: load this app
    READY = 2  # worker: it is loaded
    CALL = 3  # agent: answer this message from this state
    DONE = 4  # worker: the answer, and the state after it
    RAISED = 5  # worker: an exception; the worker lives on


@dataclass(frozen=True)
class Frame:
    """One frame. Buffers are array data and Flower metadata, which are data of people: not in the repr."""

    kind: Kind
    header: Mapping[str, Any] = field(default_factory=dict)
    buffers: Sequence[bytes] = field(default=(), repr=False)


def send(sock: socket.socket, frame: Frame) -> None:
    """Send a frame; blocks until the other end's buffer has taken all of it.

    Raises:
        OSError: the other end is gone.
    """
    header = json.dumps(frame.header, separators=(",", ":")).encode()
    sizes = struct.pack(f"!{len(frame.buffers)}Q", *(len(b) for b in frame.buffers))
    pending = bytearray(_PREFIX.pack(MAGIC, frame.kind, len(header), len(frame.buffers)) + sizes + header)
    for buffer in frame.buffers:
        if len(buffer) <= _JOIN_BYTES:
            pending += buffer
        if len(pending) > _JOIN_BYTES or len(buffer) > _JOIN_BYTES:
            sock.sendall(pending)
            pending = bytearray()
        if len(buffer) > _JOIN_BYTES:
            sock.sendall(buffer)
    if pending:
        sock.sendall(pending)


def receive(sock: socket.socket) -> Frame | None:
    """The next frame, or None at the end of the stream.

    Raises:
        RemoteProtocolError: this is no frame, or the stream ends within one.
        LimitExceededError: a named limit is exceeded; nothing was allocated for it.
    """
    prefix = sock.recv(_PREFIX.size, socket.MSG_WAITALL)
    if not prefix:
        return None
    if len(prefix) < _PREFIX.size:
        raise RemoteProtocolError("worker channel: the stream ended within a frame")
    magic, kind, header_bytes, count = _PREFIX.unpack(prefix)
    if magic != MAGIC or kind not in Kind.__members__.values():
        raise RemoteProtocolError(f"worker channel: got a frame {magic!r} of kind {kind}, expected {MAGIC!r}, 1 to 5")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise LimitExceededError(f"worker channel: header of {header_bytes} bytes, limit is {HEADER_LIMIT_BYTES}")
    if count > BUFFERS_LIMIT:
        raise LimitExceededError(f"worker channel: {count} buffers, limit is {BUFFERS_LIMIT}")
    sizes = struct.unpack(f"!{count}Q", _exactly(sock, 8 * count))
    if sum(sizes) > TOTAL_LIMIT_BYTES:
        raise LimitExceededError(f"worker channel: {sum(sizes)} bytes, limit is {TOTAL_LIMIT_BYTES}")
    try:
        header = json.loads(_exactly(sock, header_bytes))
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"worker channel: header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise RemoteProtocolError(f"worker channel: header is {type(header).__name__}, expected an object")
    return Frame(Kind(kind), header, tuple(_exactly(sock, size) for size in sizes))


def _exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes, received where they will stay: `recv` with MSG_WAITALL makes no second copy."""
    pieces = []
    left = size
    while left:
        piece = sock.recv(min(left, _RECEIVE_BYTES), socket.MSG_WAITALL)
        if not piece:
            raise RemoteProtocolError(f"worker channel: the stream ended, {left} of {size} bytes missing")
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
