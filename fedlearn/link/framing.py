"""Frames to and from the bytes that protos/link.proto describes. Every field is checked here, before it is used.

Chunks carry nearly all bytes, so they are written and read by hand in exactly protobuf's wire format: protobuf's own
classes would copy the data twice on each side. Any other valid encoding of a chunk is read by protobuf.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from fedlearn.errors import LimitExceededError, RemoteProtocolError
from fedlearn.link.faults import MessageLimitError
from fedlearn.link.frames import (
    INCARNATION_BYTES,
    Ack,
    Cancel,
    Chunk,
    End,
    Fault,
    FaultCode,
    Frame,
    Goodbye,
    Heartbeat,
    Hello,
    Resume,
    Retry,
    Start,
    Welcome,
)
from fedlearn.link.limits import LinkLimits
from fedlearn.proto import link_pb2 as pb

# One Frame whose field 5 is a Chunk: outer tag and length, three fixed64 fields, then the tag and length of data.
_CHUNK_TAG: Final = 0x2A
_CHUNK_FIELDS: Final = struct.Struct("<BQBQBQB")
_FIELD_TAGS: Final = (0x09, 0x11, 0x19, 0x22)


def pack_chunk(payload_id: int, offset: int, checksum: int, parts: Sequence[bytes | memoryview]) -> bytes:
    """A chunk's frame. `parts` together are the data; they are copied once, into the frame."""
    size = sum(len(part) for part in parts)
    tags = _FIELD_TAGS
    fields = _CHUNK_FIELDS.pack(tags[0], payload_id, tags[1], offset, tags[2], checksum, tags[3]) + _varint(size)
    return b"".join((bytes((_CHUNK_TAG,)), _varint(len(fields) + size), fields, *parts))


def pack(frame: Frame) -> bytes:
    """Any frame as bytes."""
    if isinstance(frame, Chunk):
        return pack_chunk(frame.payload_id, frame.offset, frame.checksum, (frame.data,))
    name, proto = _PACKERS[type(frame)](frame)
    data: bytes = pb.Frame(**{name: proto}).SerializeToString()
    return data


def unpack(data: bytes, limits: LinkLimits) -> Frame:
    """Bytes from the other end to a frame, checked against every limit that concerns one frame alone.

    Raises:
        LimitExceededError: a named limit is exceeded.
        RemoteProtocolError: not a frame, or a field that no correct peer would send.
    """
    if len(data) > limits.frame_bytes:
        raise LimitExceededError(f"frame: got {len(data)} bytes, limit frame_bytes is {limits.frame_bytes}")
    chunk = _fast_chunk(data)
    if chunk is not None:
        return chunk
    try:
        proto = pb.Frame.FromString(data)
    except DecodeError:
        raise RemoteProtocolError(f"frame: got {len(data)} bytes that are not a Frame") from None
    kind = proto.WhichOneof("kind")
    if kind is None:
        raise RemoteProtocolError("frame: got a kind that this version does not know")
    return _UNPACKERS[kind](getattr(proto, kind), limits)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Value and the position after it; a position of 0 where there is no varint of at most 5 bytes."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(data):
            return 0, 0
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, 0


def _fast_chunk(data: bytes) -> Chunk | None:
    if not data or data[0] != _CHUNK_TAG:
        return None
    size, at = _read_varint(data, 1)
    if at == 0 or at + size != len(data) or size <= _CHUNK_FIELDS.size:
        return None
    tag_id, payload_id, tag_offset, offset, tag_sum, checksum, tag_data = _CHUNK_FIELDS.unpack_from(data, at)
    if (tag_id, tag_offset, tag_sum, tag_data) != _FIELD_TAGS:
        return None
    size, at = _read_varint(data, at + _CHUNK_FIELDS.size)
    if at == 0 or at + size != len(data):
        return None
    return Chunk(payload_id, offset, checksum, memoryview(data)[at:])


def _id(value: str, what: str, limits: LinkLimits, *, empty: bool = False) -> str:
    if not value and not empty:
        raise RemoteProtocolError(f"{what}: got an empty id")
    if len(value.encode()) > limits.id_bytes:
        raise LimitExceededError(f"{what}: an id of {len(value)} characters, limit id_bytes is {limits.id_bytes}")
    return value


def _incarnation(value: bytes) -> bytes:
    if len(value) != INCARNATION_BYTES:
        raise RemoteProtocolError(f"incarnation: got {len(value)} bytes, expected {INCARNATION_BYTES}")
    return value


def _seconds(value: float, what: str) -> float:
    if not math.isfinite(value) or value < 0:
        raise RemoteProtocolError(f"{what}: got {value}, expected seconds")
    return value


def _count(value: int, limit: int, what: str, name: str) -> None:
    if value > limit:
        raise LimitExceededError(f"{what}: got {value}, limit {name} is {limit}")


def _resumes(protos: Sequence[Any], limits: LinkLimits) -> tuple[Resume, ...]:
    _count(len(protos), limits.outgoing_messages, "resume offers", "outgoing_messages")
    return tuple(Resume(_id(r.message_id, "resume", limits), r.payload_id, r.received_bytes) for r in protos)


def _hello(proto: Any, limits: LinkLimits) -> Hello:
    _count(len(proto.facts), limits.facts, "facts", "facts")
    for key, value in proto.facts.items():
        _count(max(len(key.encode()), len(value.encode())), limits.fact_bytes, "bytes of a fact", "fact_bytes")
    return Hello(
        proto.version_min,
        proto.version_max,
        _incarnation(proto.incarnation),
        dict(proto.facts),
        _resumes(proto.resumes, limits),
    )


def _welcome(proto: Any, limits: LinkLimits) -> Welcome:
    _count(len(proto.wanted), limits.outgoing_messages, "wanted messages", "outgoing_messages")
    return Welcome(
        proto.version,
        _incarnation(proto.incarnation),
        proto.node_id,
        _resumes(proto.resumes, limits),
        tuple(_id(i, "wanted", limits) for i in proto.wanted),
    )


def _heartbeat(proto: Any, limits: LinkLimits) -> Heartbeat:
    promise = _seconds(proto.next_within_s, "heartbeat")
    if promise > limits.heartbeat_promise_s:
        raise LimitExceededError(
            f"heartbeat: got a promise of {promise} s, limit heartbeat_promise_s is {limits.heartbeat_promise_s}"
        )
    return Heartbeat(promise)


def _start(proto: Any, limits: LinkLimits) -> Start:
    message_id = _id(proto.message_id, "start", limits)
    sizes = tuple(proto.buffer_bytes)
    try:
        _count(len(proto.metadata), limits.metadata_bytes, "bytes of metadata", "metadata_bytes")
        _count(len(sizes), limits.message_buffers, "buffers of a message", "message_buffers")
        _count(sum(sizes), limits.message_bytes, "bytes of a message", "message_bytes")
    except LimitExceededError as error:
        raise MessageLimitError(error.message, message_id) from None
    if proto.offset > sum(sizes):
        raise RemoteProtocolError(f"start: got offset {proto.offset} of {sum(sizes)} bytes")
    reply_to = _id(proto.reply_to, "start", limits, empty=True)
    ttl_s = _seconds(proto.ttl_s, "ttl")
    return Start(message_id, reply_to, proto.payload_id, proto.metadata, sizes, ttl_s, proto.offset)


def _fault(proto: Any, limits: LinkLimits) -> Fault:
    _count(len(proto.reason), limits.reason_bytes, "characters of a reason", "reason_bytes")
    code = FaultCode(proto.code) if proto.code in {c.value for c in FaultCode} else FaultCode.UNSPECIFIED
    return Fault(code, proto.reason, _id(proto.message_id, "fault", limits, empty=True))


def _goodbye(proto: Any, limits: LinkLimits) -> Goodbye:
    _count(len(proto.reason), limits.reason_bytes, "characters of a reason", "reason_bytes")
    return Goodbye(proto.reason)


_UNPACKERS: Final[dict[str, Callable[[Any, LinkLimits], Frame]]] = {
    "hello": _hello,
    "welcome": _welcome,
    "heartbeat": _heartbeat,
    "start": _start,
    "chunk": lambda p, _: Chunk(p.payload_id, p.offset, p.checksum, p.data),
    "end": lambda p, _: End(p.payload_id),
    "ack": lambda p, limits: Ack(_id(p.message_id, "ack", limits)),
    "retry": lambda p, _: Retry(p.payload_id, p.offset),
    "cancel": lambda p, limits: Cancel(_id(p.message_id, "cancel", limits)),
    "goodbye": _goodbye,
    "fault": _fault,
}


def _pack_resumes(resumes: Sequence[Resume]) -> list[Any]:
    return [
        pb.Resume(message_id=r.message_id, payload_id=r.payload_id, received_bytes=r.received_bytes) for r in resumes
    ]


_PACKERS: Final[dict[type, Callable[[Any], tuple[str, Any]]]] = {
    Hello: lambda f: (
        "hello",
        pb.Hello(
            version_min=f.version_min,
            version_max=f.version_max,
            incarnation=f.incarnation,
            facts=dict(f.facts),
            resumes=_pack_resumes(f.resumes),
        ),
    ),
    Welcome: lambda f: (
        "welcome",
        pb.Welcome(
            version=f.version,
            incarnation=f.incarnation,
            node_id=f.node_id,
            resumes=_pack_resumes(f.resumes),
            wanted=f.wanted,
        ),
    ),
    Heartbeat: lambda f: ("heartbeat", pb.Heartbeat(next_within_s=f.next_within_s)),
    Start: lambda f: (
        "start",
        pb.Start(
            message_id=f.message_id,
            reply_to=f.reply_to,
            payload_id=f.payload_id,
            metadata=f.metadata,
            buffer_bytes=f.buffer_bytes,
            ttl_s=f.ttl_s,
            offset=f.offset,
        ),
    ),
    End: lambda f: ("end", pb.End(payload_id=f.payload_id)),
    Ack: lambda f: ("ack", pb.Ack(message_id=f.message_id)),
    Retry: lambda f: ("retry", pb.Retry(payload_id=f.payload_id, offset=f.offset)),
    Cancel: lambda f: ("cancel", pb.Cancel(message_id=f.message_id)),
    Goodbye: lambda f: ("goodbye", pb.Goodbye(reason=f.reason)),
    Fault: lambda f: ("fault", pb.Fault(code=f.code.value, reason=f.reason, message_id=f.message_id)),
}
