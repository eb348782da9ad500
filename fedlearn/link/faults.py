"""Breaches of the protocol that say more than that there was one."""

from __future__ import annotations

from fedlearn.errors import LimitExceededError, RemoteProtocolError


class MessageError(RemoteProtocolError):
    """One message of the peer's broke the protocol; `message_id` names it, so that the peer need not send it again."""

    def __init__(self, message: str, message_id: str) -> None:
        super().__init__(message)
        self.message_id = message_id


class MessageLimitError(MessageError, LimitExceededError):
    """One message of the peer's exceeds a named limit."""


class VersionError(RemoteProtocolError):
    """The two ends speak different versions of the protocol."""
