"""The coordinator's end of the link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlearn.clock import Clock
    from fedlearn.link.control import ControlHandlers
    from fedlearn.link.events import Emit
    from fedlearn.link.grid import LinkGrid
    from fedlearn.link.limits import LinkLimits
    from fedlearn.link.tls import TlsBundle


@dataclass(frozen=True)
class Node:
    """A client that the server knows. `client_id` is the name in its certificate; `facts` is what it says of itself."""

    node_id: int
    client_id: str
    connected: bool
    facts: Mapping[str, str]


class LinkServer:
    """Accepts clients (role CLIENT) and control calls on one port. Runs on the asyncio loop that calls `start`."""

    def __init__(
        self,
        address: str,
        tls: TlsBundle,
        limits: LinkLimits | None = None,
        clock: Clock | None = None,
        emit: Emit | None = None,
        control: ControlHandlers | None = None,
    ) -> None:
        raise NotImplementedError

    async def start(self) -> str:
        """Listen; return `host:port` with the port that was bound (port 0 asks for any).

        Raises:
            AddressInUseError: the port is taken.
            LinkError: the address cannot be listened on.
        """
        raise NotImplementedError

    async def stop(self, grace_s: float | None = None) -> None:
        """Say goodbye to clients (they dial again later), end every call, cancel every grid."""
        raise NotImplementedError

    def nodes(self) -> tuple[Node, ...]:
        """Every client seen since `start`, by name. From any thread."""
        raise NotImplementedError

    def grid(self, run_id: int) -> LinkGrid:
        """The grid of one run; the same object for the same run id. From any thread."""
        raise NotImplementedError

    def close_grid(self, run_id: int) -> None:
        """Cancel and forget a run's grid. From any thread."""
        raise NotImplementedError
