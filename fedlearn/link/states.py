"""The session's states, its one transition table, and the events that it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

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
    Retry,
    Start,
    Welcome,
)


class Side(Enum):
    """Who dialled."""

    INITIATOR = "initiator"
    ACCEPTOR = "acceptor"


class State(Enum):
    """Where one side stands."""

    IDLE = "idle"
    GREETED = "greeted"
    READY = "ready"
    OPEN = "open"
    CLOSED = "closed"


_TRAFFIC: Final = (Heartbeat, Start, Chunk, End, Ack, Retry, Cancel)
_CLOSING: Final[dict[type, State]] = {Goodbye: State.CLOSED, Fault: State.CLOSED}

# What a side may send in each of its states, and the state that it is in after.
TRANSITIONS: Final[dict[Side, dict[State, dict[type, State]]]] = {
    Side.INITIATOR: {
        State.IDLE: {Hello: State.GREETED},
        State.GREETED: _CLOSING,
        State.OPEN: dict.fromkeys(_TRAFFIC, State.OPEN) | _CLOSING,
        State.CLOSED: {},
    },
    Side.ACCEPTOR: {
        State.IDLE: _CLOSING,
        State.READY: {Welcome: State.OPEN} | _CLOSING,
        State.OPEN: dict.fromkeys(_TRAFFIC, State.OPEN) | _CLOSING,
        State.CLOSED: {},
    },
}

# Joint states (initiator, acceptor) that move on by themselves.
TRIGGERED: Final[dict[tuple[State, State], tuple[State, State]]] = {
    (State.GREETED, State.IDLE): (State.GREETED, State.READY),
    (State.GREETED, State.OPEN): (State.OPEN, State.OPEN),
}


@dataclass(frozen=True)
class Opened:
    """The handshake is done. `resumed` is true when the peer is the process that was met before."""

    hello: Hello | Welcome
    resumed: bool


@dataclass(frozen=True)
class Received:
    """A message is here, whole and checked."""

    message_id: str
    reply_to: str
    metadata: bytes = field(repr=False)
    buffers: tuple[bytes, ...] = field(repr=False)
    ttl_s: float


@dataclass(frozen=True)
class Cancelled:
    """The peer waits for this message, or for its answer, no longer."""

    message_id: str


@dataclass(frozen=True)
class Resumed:
    """A transfer goes on after `offset` bytes."""

    message_id: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Damaged:
    """A chunk did not fit its checksum and was asked for again."""

    message_id: str
    offset: int
    attempt: int


@dataclass(frozen=True)
class Refused:
    """The peer closed because of this message of ours (empty: of something else)."""

    message_id: str
    code: FaultCode
    reason: str


@dataclass(frozen=True)
class Closed:
    """The peer said goodbye."""

    reason: str


Event = Opened | Received | Cancelled | Resumed | Damaged | Refused | Closed
