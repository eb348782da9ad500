"""A site's end of the link: dials out, keeps the session alive, hands messages to a handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

from flwr.app import Message

if TYPE_CHECKING:
    from fedlearn.clock import Clock
    from fedlearn.link.events import Emit
    from fedlearn.link.limits import LinkLimits
    from fedlearn.link.tls import TlsBundle

Handler = Callable[[Message], Awaitable[Message]]
"""Answers an instruction, usually with `Message(content, reply_to=message)`. Cancelled when nobody waits any more."""


class LinkClient:
    """One site. A handler that raises costs an error message to the server, never the client."""

    def __init__(
        self,
        address: str,
        tls: TlsBundle,
        handler: Handler,
        facts: Mapping[str, str] | None = None,
        limits: LinkLimits | None = None,
        clock: Clock | None = None,
        emit: Emit | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        """True while a session is open."""
        raise NotImplementedError

    async def run(self) -> NoReturn:
        """Serve until cancelled; dial again, with jittered exponential waits, after every loss.

        On cancellation: says goodbye, cancels running handlers.

        Raises:
            TlsError: a certificate is refused, on either side; dialling again would not help.
            ProtocolError: the server refuses this version of the protocol.
        """
        raise NotImplementedError

    async def check(self) -> None:
        """Connect, shake hands, say goodbye: a dry run.

        Raises:
            LinkError: the server cannot be reached. Else as `run`.
        """
        raise NotImplementedError
