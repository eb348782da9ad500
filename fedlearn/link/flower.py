"""The only file that touches what Flower does not promise to keep (flwr 1.41 to 1.42); a test fails clearly when it moves.

Four private touchpoints: `TaskIdentity` (a `Message` without `reply_to` raises unless it is set), the fields behind
`Metadata`'s read-only properties, `flwr.common.serde` with its utilities, and `Run.create_empty`.

Array bytes stay out of Flower's protobuf: a message becomes metadata bytes and a list of raw buffers, without a copy.
"""

from __future__ import annotations

import copy
import hashlib
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common import serde, serde_utils
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from fedlearn.errors import RemoteProtocolError

if TYPE_CHECKING:
    from flwr.app import Metadata

SERVER_NODE_ID: Final = 1
"""Flower's node id of the server side; no client has it."""

ERROR_UNREACHABLE: Final = ErrorCode.NODE_UNAVAILABLE
ERROR_NO_REPLY: Final = ErrorCode.REPLY_MESSAGE_UNAVAILABLE
ERROR_CLIENT_RAISED: Final = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
ERROR_CLIENT_CRASHED: Final = ErrorCode.CLIENT_APP_CRASHED
ERROR_REFUSED: Final = 1001
"""Not Flower's, which counts from 0: this client will answer nothing more of the run. Whoever does not know it reads the reason, as of any error."""


@dataclass(frozen=True)
class WireMessage:
    """A Flower message taken apart: everything but array data as protobuf, and the array data, in order."""

    metadata: bytes
    buffers: tuple[bytes, ...]


def node_id_of(client_id: str) -> int:
    """The node id of a client: a hash of its name, from 2 to 2**63 - 1, the same in every run and process."""
    digest = hashlib.sha256(b"fedlearn/node-id/v1" + client_id.encode()).digest()
    return 2 + int.from_bytes(digest[:8], "big") % (2**63 - 2)


def ensure_identity(run_id: int) -> None:
    """Let `Message(...)` be called in this process. The grid writes the true run and sender when it sends."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
    TaskIdentity.task_id = 0


def empty_run(run_id: int) -> Run:
    """Flower's description of a run that knows nothing but its id."""
    return Run.create_empty(run_id)


def new_message_id() -> str:
    """A fresh message id."""
    return uuid.uuid4().hex


def stamp(message: Message, **fields: Any) -> None:
    """Set fields of a message's metadata in place: `message_id`, `run_id`, `src_node_id`, `created_at`, `ttl` ..."""
    values = message.metadata.__dict__
    for name, value in fields.items():
        if f"_{name}" not in values:
            raise AttributeError(f"flwr's Metadata has no field _{name}; this version of flwr is not supported")
        values[f"_{name}"] = value


def without_content(message: Message) -> Message:
    """The same metadata with an empty content, so that a pending message holds no arrays."""
    return _make(message.metadata, RecordDict(), None)


def as_type(message: Message, message_type: str, content: RecordDict) -> Message:
    """Another content under the same metadata, asked of the function that answers `message_type`."""
    metadata = copy.copy(message.metadata)
    metadata.message_type = message_type
    return _make(metadata, content, None)


def error_reply(origin: Message, code: int, reason: str) -> Message:
    """An error message that answers `origin`."""
    reply = Message(Error(code, reason), reply_to=origin)
    stamp(reply, message_id=new_message_id())
    return reply


def as_error(metadata: bytes, code: int, reason: str) -> bytes | None:
    """A reply's metadata turned into an error message's; None where it carries an error already."""
    proto = ProtoMessage.FromString(metadata)
    if proto.HasField("error"):
        return None
    proto.ClearField("content")
    proto.error.code, proto.error.reason = code, reason
    data: bytes = proto.SerializeToString()
    return data


def encode(message: Message) -> WireMessage:
    """Take a message apart. Buffers are the arrays' own bytes objects, not copies."""
    proto = ProtoMessage(metadata=serde_utils.metadata_to_proto(message.metadata))
    if message.has_error():
        proto.error.CopyFrom(serde_utils.error_to_proto(message.error))
        return WireMessage(proto.SerializeToString(), ())
    buffers: list[bytes] = []
    rest = RecordDict()
    proto.content.SetInParent()
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord):
            item = proto.content.items.add(key=key)
            item.array_record.SetInParent()
            for name, array in record.items():
                entry = item.array_record.items.add(key=name)
                entry.value.dtype = array.dtype
                entry.value.shape.extend(array.shape)
                entry.value.stype = array.stype
                buffers.append(array.data if isinstance(array.data, bytes) else bytes(array.data))
        else:
            rest.clear()
            rest[key] = record
            proto.content.items.extend(serde.recorddict_to_proto(rest).items)
    return WireMessage(proto.SerializeToString(), tuple(buffers))


def decode(metadata: bytes, buffers: Sequence[bytes]) -> Message:
    """Put a message together again; buffers become the arrays' data without a copy.

    Raises:
        RemoteProtocolError: the metadata is not a Flower message, or names another number of arrays.
    """
    try:
        message = serde.message_from_proto(ProtoMessage.FromString(metadata))
    except (DecodeError, ValueError, TypeError, KeyError) as error:
        raise RemoteProtocolError(f"message: its metadata cannot be read: {error}") from None
    if not math.isfinite(message.metadata.ttl):
        raise RemoteProtocolError(f"message: its ttl is {message.metadata.ttl}, expected seconds")
    arrays = []
    if message.has_content():
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                arrays += list(record.values())
    if len(arrays) != len(buffers):
        raise RemoteProtocolError(f"message: got {len(buffers)} buffers for {len(arrays)} arrays")
    for array, buffer in zip(arrays, buffers, strict=True):
        array.data = buffer
    return message


def _make(metadata: Metadata, content: RecordDict | None, error: Error | None) -> Message:
    from flwr.app.message import make_message

    return make_message(metadata=metadata, content=content, error=error)
