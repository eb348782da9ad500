"""What one end holds for one peer between connections: messages on their way out, and unfinished ones on their way in.

A `Session` lives as long as one stream; the mailbox lives on, which is why a broken stream loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from fedlearn.errors import LimitExceededError
from fedlearn.link.frames import Resume, Start
from fedlearn.link.limits import LinkLimits
from fedlearn.link.transfer import Incoming, Outgoing

Wanted = Callable[[Start], bool]
"""Decides, when a message begins, whether anybody here still waits for it. False for one that was received before."""


class Mailbox:
    """Durable state of a link with one peer, for one process.

    Attributes:
        limits: the named limits.
        wanted: asked once for each message that the peer begins.
        peer_incarnation: the peer's process when last heard of; empty before.
        outgoing: by message id, in the order in which they were put.
        incoming: by payload id.
    """

    def __init__(self, limits: LinkLimits, wanted: Wanted) -> None:
        self.limits = limits
        self.wanted = wanted
        self.peer_incarnation = b""
        self.outgoing: dict[str, Outgoing] = {}
        self.incoming: dict[int, Incoming] = {}

    def put(self, message: Outgoing) -> None:
        """Take a message to be sent.

        Raises:
            LimitExceededError: too many messages or bytes wait already, or the message is too large.
        """
        check_outgoing(message, self.limits)
        if len(self.outgoing) >= self.limits.outgoing_messages:
            raise LimitExceededError(
                f"outgoing: {len(self.outgoing)} messages wait, limit outgoing_messages is {self.limits.outgoing_messages}",
                hint="the peer is slow or away; send less at a time or with a shorter ttl",
            )
        waiting = sum(m.payload.size_bytes for m in self.outgoing.values())
        if waiting + message.payload.size_bytes > self.limits.outgoing_bytes:
            raise LimitExceededError(
                f"outgoing: {waiting} bytes wait and {message.payload.size_bytes} more came,"
                f" limit outgoing_bytes is {self.limits.outgoing_bytes}",
                hint="the peer is slow or away; send less at a time or with a shorter ttl",
            )
        self.outgoing[message.message_id] = message

    def settle(self, message_id: str) -> None:
        """Forget an outgoing message, and whatever came of its answer."""
        self.outgoing.pop(message_id, None)
        for payload_id, message in list(self.incoming.items()):
            if message.start.reply_to == message_id:
                del self.incoming[payload_id]

    def drop_incoming(self, message_id: str) -> None:
        """Forget an unfinished incoming message, if there is one."""
        for payload_id, message in list(self.incoming.items()):
            if message.start.message_id == message_id:
                del self.incoming[payload_id]

    def met(self, incarnation: bytes) -> bool:
        """Note the peer's process. True when it is the one that was met before; else what it held is gone."""
        if incarnation == self.peer_incarnation:
            return True
        self.peer_incarnation = incarnation
        self.incoming.clear()
        for message in self.outgoing.values():
            message.acked = False
        return False

    def offers(self) -> tuple[Resume, ...]:
        """How far each unfinished incoming message has come."""
        return tuple(
            Resume(message.start.message_id, payload_id, message.received_bytes)
            for payload_id, message in self.incoming.items()
            if message.received_bytes
        )

    def admit(self, start: Start) -> Incoming:
        """Begin to receive a message, or go on with it.

        Raises:
            LimitExceededError: too many messages, or announced bytes, are unfinished.
        """
        held = self.incoming.get(start.payload_id)
        if held is not None and start.offset == held.received_bytes:
            held.rewinding, held.ttl_s = False, start.ttl_s
            return held
        limits = self.limits
        others = [m for payload_id, m in self.incoming.items() if payload_id != start.payload_id]
        if len(others) >= limits.incoming_messages:
            raise LimitExceededError(
                f"incoming: {len(others)} messages are unfinished, limit incoming_messages is {limits.incoming_messages}"
            )
        announced = sum(m.size_bytes for m in others) + sum(start.buffer_bytes)
        if announced > limits.incoming_bytes:
            raise LimitExceededError(
                f"incoming: {announced} bytes are announced, limit incoming_bytes is {limits.incoming_bytes}"
            )
        message = self.incoming[start.payload_id] = Incoming(start)
        return message


def check_outgoing(message: Outgoing, limits: LinkLimits) -> None:
    """Refuse a message that no receiver with the same limits would take.

    Raises:
        LimitExceededError: the message, its metadata or its number of buffers is too large.
    """
    for got, limit, name in (
        (message.payload.size_bytes, limits.message_bytes, "message_bytes"),
        (len(message.metadata), limits.metadata_bytes, "metadata_bytes"),
        (len(message.payload.buffer_bytes), limits.message_buffers, "message_buffers"),
    ):
        if got > limit:
            raise LimitExceededError(
                f"message: got {got}, limit {name} is {limit}",
                hint="send less in one message, or raise the limit on both ends",
            )
