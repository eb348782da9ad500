"""The link between a coordinator and its sites: gRPC over mutual TLS, under Flower's `Grid`.

Coordinator: `LinkServer` accepts clients; `LinkServer.grid(run_id)` is a Flower `Grid` for a ServerApp's thread.
Site: `LinkClient` dials out and hands each message to a handler. People: `ControlClient`, answered by `ControlHandlers`.
Each name is imported when it is first used, because gRPC and Flower are slow to load.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlearn.link.client import Handler, LinkClient
    from fedlearn.link.control import ControlClient, ControlHandlers, ModelFile, RunDetail, RunSummary
    from fedlearn.link.events import Emit, LinkEvent, ignore
    from fedlearn.link.grid import GridCancelledError, LinkGrid
    from fedlearn.link.limits import LinkLimits
    from fedlearn.link.server import LinkServer, Node
    from fedlearn.link.tls import Identity, Role, TlsBundle, create_authority, issue

_HOMES = {
    "ControlClient": "control",
    "ControlHandlers": "control",
    "Emit": "events",
    "GridCancelledError": "grid",
    "Handler": "client",
    "Identity": "tls",
    "LinkClient": "client",
    "LinkEvent": "events",
    "LinkGrid": "grid",
    "LinkLimits": "limits",
    "LinkServer": "server",
    "ModelFile": "control",
    "Node": "server",
    "Role": "tls",
    "RunDetail": "control",
    "RunSummary": "control",
    "TlsBundle": "tls",
    "create_authority": "tls",
    "ignore": "events",
    "issue": "tls",
}

# gRPC's core writes each refused handshake to stderr on its own; what matters comes as events and errors.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__all__ = [
    "ControlClient",
    "ControlHandlers",
    "Emit",
    "GridCancelledError",
    "Handler",
    "Identity",
    "LinkClient",
    "LinkEvent",
    "LinkGrid",
    "LinkLimits",
    "LinkServer",
    "ModelFile",
    "Node",
    "Role",
    "RunDetail",
    "RunSummary",
    "TlsBundle",
    "create_authority",
    "ignore",
    "issue",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
