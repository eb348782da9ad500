"""The frames of protos/link.proto as values. Who sends which, and when, is in `session` and `states`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

VERSION: Final = 1
"""The protocol version that this code speaks."""

INCARNATION_BYTES: Final = 16


@dataclass(frozen=True)
class Resume:
    """An offer to go on with an unfinished message after `received_bytes` bytes."""

    message_id: str
    payload_id: int
    received_bytes: int


@dataclass(frozen=True)
class Hello:
    """First frame of the end that dialled."""

    version_min: int
    version_max: int
    incarnation: bytes
    facts: Mapping[str, str] = field(default_factory=dict)
    resumes: Sequence[Resume] = ()


@dataclass(frozen=True)
class Welcome:
    """First frame of the end that was dialled."""

    version: int
    incarnation: bytes
    node_id: int
    resumes: Sequence[Resume] = ()
    wanted: Sequence[str] = ()


@dataclass(frozen=True)
class Heartbeat:
    """The sender lives, and sends again within so many seconds."""

    next_within_s: float


@dataclass(frozen=True)
class Start:
    """A message begins."""

    message_id: str
    reply_to: str
    payload_id: int
    metadata: bytes = field(repr=False)
    buffer_bytes: Sequence[int] = field(repr=False)
    ttl_s: float
    offset: int = 0


@dataclass(frozen=True)
class Chunk:
    """Part of a payload; `data` may be a view into the received frame."""

    payload_id: int
    offset: int
    checksum: int
    data: bytes | memoryview = field(repr=False)


@dataclass(frozen=True)
class End:
    """No more chunks of this payload."""

    payload_id: int


@dataclass(frozen=True)
class Ack:
    """The message is here, or is not wanted."""

    message_id: str


@dataclass(frozen=True)
class Retry:
    """Send this payload again from `offset`."""

    payload_id: int
    offset: int


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this message or its answer."""

    message_id: str


@dataclass(frozen=True)
class Goodbye:
    """The sender closes in order."""

    reason: str = ""


class FaultCode(Enum):
    """Why an end closed on the other."""

    UNSPECIFIED = 0
    PROTOCOL = 1
    LIMIT = 2
    VERSION = 3


@dataclass(frozen=True)
class Fault:
    """The other end broke the protocol; `message_id` names the message that did, if one did."""

    code: FaultCode
    reason: str
    message_id: str = ""


Frame = Hello | Welcome | Heartbeat | Start | Chunk | End | Ack | Retry | Cancel | Goodbye | Fault
