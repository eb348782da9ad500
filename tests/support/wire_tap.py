"""What sites send over the link, as it comes out of TLS at the coordinator: every frame, and every message put together from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from flwr.app import Message

from fedlearn.link import flower
from fedlearn.link.server import LinkServer
from fedlearn.link.session import Session
from fedlearn.link.states import Received, Side


@dataclass
class Tap:
    """What was heard, in order of arrival."""

    frames: list[bytes] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """Every message, read."""
        return [flower.decode(one.metadata, one.buffers) for one in self.received]


@contextlib.contextmanager
def tapped() -> Iterator[Tap]:
    """Listen at every `LinkServer` of this process."""
    tap = Tap()
    receive, answered = Session.receive, LinkServer._answered

    def hear(session: Session, data: bytes, now: float):
        if session.side is not Side.INITIATOR:
            tap.frames.append(bytes(data))
        return receive(session, data, now)

    def hear_whole(server: LinkServer, peer, event: Received) -> None:
        tap.received.append(event)
        answered(server, peer, event)

    Session.receive, LinkServer._answered = hear, hear_whole  # type: ignore[method-assign]
    try:
        yield tap
    finally:
        Session.receive, LinkServer._answered = receive, answered  # type: ignore[method-assign]
