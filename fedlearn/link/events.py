"""What happens on the link, as values. Whoever runs an end passes `emit` and decides who reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlearn.events import Event


@dataclass(frozen=True)
class LinkEvent(Event):
    """Root of the link's events."""


@dataclass(frozen=True)
class LinkListening(LinkEvent):
    """The server accepts connections at `address`."""

    address: str


@dataclass(frozen=True)
class LinkConnected(LinkEvent):
    """A session is open. On the server `peer` is the client's name, on a client the server's address."""

    peer: str
    node_id: int
    resumed: bool


@dataclass(frozen=True)
class LinkLost(LinkEvent):
    """A session ended; `retry_in_s` is the client's wait before it dials again, None where nobody dials."""

    peer: str
    reason: str
    retry_in_s: float | None = None


@dataclass(frozen=True)
class TransferResumed(LinkEvent):
    """A broken transfer goes on at `offset` of `size_bytes` bytes instead of at 0."""

    peer: str
    message_id: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class ChecksumFailed(LinkEvent):
    """A chunk did not fit its checksum and was not used; it was asked for again (`attempt` counts from 1)."""

    peer: str
    message_id: str
    offset: int
    attempt: int


@dataclass(frozen=True)
class PeerRefused(LinkEvent):
    """A peer was turned away: its role, its identity, or what it sent."""

    peer: str
    reason: str


@dataclass(frozen=True)
class MessageExpired(LinkEvent):
    """No answer came by the message's deadline, or its client stayed away too long."""

    peer: str
    message_id: str
    reason: str


@dataclass(frozen=True)
class HandlerFailed(LinkEvent):
    """The client's handler raised; an error message went back and the client lives on."""

    message_id: str
    error: str


Emit = Callable[[LinkEvent], None]


def ignore(event: LinkEvent) -> None:
    """An `Emit` for nobody."""
    del event
