"""Flower records as one run of bytes: what the gate commits. Equal records give equal bytes; nothing is pickled.

The bytes are `!II` (metadata bytes, number of buffers), one `!Q` for each buffer's size, the metadata (Flower's protobuf without array
data), the buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from flwr.app import Message, RecordDict

from fedlearn.errors import StateError
from fedlearn.link import flower

_HEAD = struct.Struct("!II")


def to_wire(content: RecordDict) -> flower.WireMessage:
    """Records taken apart; buffers are the arrays' own bytes."""
    flower.ensure_identity(0)
    message = Message(content, 0, "query")
    # What Flower stamps on a message is no part of its content.
    flower.stamp(message, message_id="", created_at=0.0, src_node_id=0)
    return flower.encode(message)


def from_wire(metadata: bytes, buffers: Sequence[bytes]) -> RecordDict:
    """Records put together again.

    Raises:
        RemoteProtocolError: they cannot be read.
    """
    return flower.decode(metadata, buffers).content


def pack(content: RecordDict) -> bytes:
    """Records as one run of bytes."""
    wire = to_wire(content)
    return join(wire.metadata, wire.buffers)


def join(metadata: bytes, buffers: Sequence[bytes]) -> bytes:
    """Records that are taken apart already, as one run of bytes; the inverse of `split`."""
    sizes = struct.pack(f"!{len(buffers)}Q", *(len(b) for b in buffers))
    return b"".join((_HEAD.pack(len(metadata), len(buffers)), sizes, metadata, *buffers))


def split(data: bytes) -> tuple[bytes, list[bytes]]:
    """Metadata and buffers of packed records.

    Raises:
        StateError: these are no packed records.
    """
    try:
        metadata_bytes, count = _HEAD.unpack_from(data)
        sizes = struct.unpack_from(f"!{count}Q", data, _HEAD.size)
    except struct.error:
        raise StateError(f"records: got {len(data)} bytes that do not begin with a table of sizes") from None
    at = _HEAD.size + 8 * count
    if at + metadata_bytes + sum(sizes) != len(data):
        raise StateError(f"records: got {len(data)} bytes, expected {at + metadata_bytes + sum(sizes)}")
    pieces = []
    for size in (metadata_bytes, *sizes):
        pieces.append(data[at : at + size])
        at += size
    return pieces[0], pieces[1:]


def unpack(data: bytes) -> RecordDict:
    """Records back from `pack`.

    Raises:
        StateError: these are no packed records.
    """
    return from_wire(*split(data))
