"""The coordinator's end of the link."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import LimitExceededError, LinkError, RemoteProtocolError, TlsError
from fedlearn.link import events, flower, wire
from fedlearn.link.frames import INCARNATION_BYTES, Start
from fedlearn.link.grid import Item, LinkGrid
from fedlearn.link.limits import LinkLimits
from fedlearn.link.mailbox import Mailbox, check_outgoing
from fedlearn.link.pump import Pump
from fedlearn.link.session import Session
from fedlearn.link.states import Damaged, Event, Opened, Received, Refused, Resumed, Side
from fedlearn.link.tls import Role
from fedlearn.link.transfer import Outgoing

if TYPE_CHECKING:
    from flwr.app import Message

    from fedlearn.link.control import ControlHandlers
    from fedlearn.link.tls import Identity, TlsBundle


@dataclass(frozen=True)
class Node:
    """A client that the server knows. `client_id` is the name in its certificate; `facts` is what it says of itself."""

    node_id: int
    client_id: str
    connected: bool
    facts: Mapping[str, str]


@dataclass
class _Pending:
    """An instruction without an answer."""

    grid: LinkGrid
    origin: Message
    peer: _Peer
    timer: asyncio.TimerHandle


@dataclass
class _Peer:
    """One client, connected or not."""

    client_id: str
    node_id: int
    mailbox: Mailbox
    facts: Mapping[str, str] = field(default_factory=dict)
    pump: Pump | None = None
    gone: asyncio.TimerHandle | None = None
    unanswered: set[str] = field(default_factory=set)


class LinkServer:
    """Accepts clients (role CLIENT) and control calls on one port. Runs on the asyncio loop that calls `start`.

    Args:
        address: `host:port` to listen on; port 0 asks for any.
        tls: a bundle of role SERVER.
        limits: the named limits.
        clock: for deadlines.
        emit: receives the link's events, on the loop.
        control: answers control calls; without it they are refused.
    """

    def __init__(
        self,
        address: str,
        tls: TlsBundle,
        limits: LinkLimits | None = None,
        clock: Clock | None = None,
        emit: events.Emit | None = None,
        control: ControlHandlers | None = None,
    ) -> None:
        if tls.identity.role is not Role.SERVER:
            raise TlsError(f"server: got a certificate for {tls.identity.uri}, expected the role server")
        self.limits = limits or LinkLimits()
        self.address = address
        self._tls = tls
        self._clock = clock or SystemClock()
        self._emit = emit or events.ignore
        self._control = control
        self._incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._server: Any = None
        self._peers: dict[int, _Peer] = {}
        self._pending: dict[str, _Pending] = {}
        self._grids: dict[int, LinkGrid] = {}
        self._grids_lock = threading.Lock()
        self._connected: set[int] = set()

    async def start(self) -> str:
        """Listen; return `host:port` with the port that was bound.

        Raises:
            AddressInUseError: the port is taken.
            LinkError: the address cannot be listened on.
        """
        host, port = wire.split_address(self.address)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        credentials = grpc.ssl_server_credentials(
            [(self._tls.key_pem, self._tls.cert_pem)],
            root_certificates=self._tls.ca_pem,
            require_client_auth=True,
        )
        self._server = grpc.aio.server(
            options=wire.server_options(self.limits), maximum_concurrent_rpcs=self.limits.connections
        )
        self._server.add_generic_rpc_handlers(self._handlers())
        # gRPC reports a taken port in its own words, on stderr too; asking the system first gives a clear answer.
        wire.check_bindable(self.address)
        try:
            bound = self._server.add_secure_port(self.address, credentials)
        except RuntimeError:
            wire.check_bindable(self.address)
            raise LinkError(f"{self.address}: cannot listen") from None
        await self._server.start()
        self.address = wire.join_address(host, bound or port)
        self._emit(events.LinkListening(self.address))
        return self.address

    async def stop(self, grace_s: float | None = None) -> None:
        """Say goodbye to clients (they dial again later), end every call, cancel every grid."""
        with self._grids_lock:
            grids, self._grids = list(self._grids.values()), {}
        for grid in grids:
            grid.cancel()
        for peer in self._peers.values():
            if peer.pump is not None:
                peer.pump.session.close("the server stops")
                peer.pump.wake()
            if peer.gone is not None:
                peer.gone.cancel()
        for pending in self._pending.values():
            pending.timer.cancel()
        if self._server is not None:
            await self._server.stop(self.limits.stop_s if grace_s is None else grace_s)
        self._loop = None

    def nodes(self) -> tuple[Node, ...]:
        """Every client seen since `start`, by name. From any thread."""
        peers = sorted(self._peers.copy().values(), key=lambda peer: peer.client_id)
        return tuple(Node(p.node_id, p.client_id, p.pump is not None, p.facts) for p in peers)

    def grid(self, run_id: int) -> LinkGrid:
        """The grid of one run; the same object for the same run id. From any thread."""
        with self._grids_lock:
            if run_id not in self._grids:
                self._grids[run_id] = LinkGrid(self, run_id)
            return self._grids[run_id]

    def close_grid(self, run_id: int) -> None:
        """Cancel and forget a run's grid. From any thread."""
        with self._grids_lock:
            grid = self._grids.pop(run_id, None)
        if grid is not None:
            grid.cancel()

    # What a grid asks, from any thread (see `grid.Exchange`).

    def connected(self) -> Sequence[int]:
        """Node ids of connected clients, ascending."""
        return sorted(self._connected.copy())

    def connected_count(self) -> int:
        """How many clients are connected."""
        return len(self._connected)

    def dispatch(self, grid: LinkGrid, items: Sequence[Item]) -> None:
        """Check sizes here, in the caller's thread, then leave the items for the loop."""
        for item in items:
            check_outgoing(Outgoing("", "", item.metadata, item.payload, 0.0), self.limits)
        self._post(self._dispatch_all, grid, items)

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Nobody waits for these any more."""
        if self._loop is not None and message_ids:
            self._post(self._settle_all, message_ids)

    def on_loop(self) -> bool:
        """True on the loop's own thread."""
        return threading.get_ident() == self._thread

    def _post(self, call: Callable[..., None], *args: object) -> None:
        loop = self._loop
        if loop is None:
            raise LinkError("server: not listening")
        loop.call_soon_threadsafe(call, *args)

    # On the loop: instructions and their answers.

    def _dispatch_all(self, grid: LinkGrid, items: Sequence[Item]) -> None:
        for item in items:
            self._dispatch(grid, item)

    def _settle_all(self, message_ids: Sequence[str]) -> None:
        for message_id in message_ids:
            self._settle(message_id)

    def _dispatch(self, grid: LinkGrid, item: Item) -> None:
        message_id = item.origin.metadata.message_id
        peer = self._peers.get(item.node_id)
        if peer is None or (peer.pump is None and peer.gone is None):
            known = f"no client with node id {item.node_id} has connected"
            reason = known if peer is None else f"client {peer.client_id} is away"
            grid.answer(message_id, flower.error_reply(item.origin, flower.ERROR_UNREACHABLE, reason))
            return
        ttl_s = max(0.0, item.origin.metadata.ttl)
        outgoing = Outgoing(message_id, "", item.metadata, item.payload, self._clock.monotonic() + ttl_s)
        try:
            self._check_unanswered(peer)
            peer.mailbox.put(outgoing)
        except LimitExceededError as error:
            grid.answer(message_id, flower.error_reply(item.origin, flower.ERROR_UNREACHABLE, error.message))
            return
        peer.unanswered.add(message_id)
        timer = asyncio.get_running_loop().call_later(ttl_s, self._fail, message_id, f"no answer within {ttl_s:g} s")
        self._pending[message_id] = _Pending(grid, item.origin, peer, timer)
        if peer.pump is not None:
            peer.pump.session.submit(outgoing)
            peer.pump.wake()

    def _check_unanswered(self, peer: _Peer) -> None:
        if len(peer.unanswered) >= self.limits.unanswered_messages:
            raise LimitExceededError(
                f"client {peer.client_id} has {len(peer.unanswered)} unanswered messages,"
                f" limit unanswered_messages is {self.limits.unanswered_messages}"
            )

    def _settle(self, message_id: str) -> _Pending | None:
        """End an instruction, whoever ends it; the client is told to drop it if it may still work on it."""
        pending = self._pending.pop(message_id, None)
        if pending is None:
            return None
        pending.timer.cancel()
        peer = pending.peer
        peer.unanswered.discard(message_id)
        if peer.pump is not None:
            peer.pump.session.cancel(message_id)
            peer.pump.wake()
        else:
            peer.mailbox.settle(message_id)
        return pending

    def _fail(self, message_id: str, reason: str, code: int = flower.ERROR_NO_REPLY) -> None:
        pending = self._settle(message_id)
        if pending is not None:
            text = f"client {pending.peer.client_id}: {reason}"
            self._emit(events.MessageExpired(pending.peer.client_id, message_id, reason))
            pending.grid.answer(message_id, flower.error_reply(pending.origin, code, text))

    def _answered(self, peer: _Peer, event: Received) -> None:
        pending = self._pending.pop(event.reply_to, None)
        if pending is None:
            return
        pending.timer.cancel()
        peer.unanswered.discard(event.reply_to)
        peer.mailbox.settle(event.reply_to)
        metadata = pending.origin.metadata
        try:
            reply = flower.decode(event.metadata, event.buffers)
            flower.stamp(
                reply,
                run_id=metadata.run_id,
                message_id=event.message_id,
                src_node_id=peer.node_id,
                dst_node_id=metadata.src_node_id,
                reply_to_message_id=event.reply_to,
            )
        except RemoteProtocolError as error:
            self._emit(events.PeerRefused(peer.client_id, error.message))
            reply = flower.error_reply(
                pending.origin, flower.ERROR_NO_REPLY, f"client {peer.client_id}: {error.message}"
            )
        pending.grid.answer(event.reply_to, reply)

    # On the loop: connections.

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        link = grpc.method_handlers_generic_handler(
            wire.LINK_SERVICE, {"Connect": grpc.stream_stream_rpc_method_handler(self._connect)}
        )
        if self._control is None:
            return (link,)
        from fedlearn.link.control_server import control_handler

        return (link, control_handler(self._control, self.nodes, self.limits))

    async def _connect(self, _requests: object, context: Any) -> None:
        try:
            peer = self._peer(wire.peer_identity(context.auth_context()))
        except (TlsError, LimitExceededError) as error:
            self._emit(events.PeerRefused(str(context.peer()), error.message))
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.message)
            return
        session = Session(Side.ACCEPTOR, peer.mailbox, self._incarnation, self._clock.monotonic(), node_id=peer.node_id)
        pump = Pump(session, context.read, context.write, self._clock, lambda event: self._on_event(peer, pump, event))
        reason = "the connection was cut"
        try:
            reason = await pump.run()
        except RemoteProtocolError as error:
            reason = error.message
            self._emit(events.PeerRefused(peer.client_id, error.message))
        except (LinkError, grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            reason = str(error)
        finally:
            if peer.pump is pump:
                self._lost(peer, reason)

    def _peer(self, identity: Identity) -> _Peer:
        if identity.role is not Role.CLIENT:
            raise TlsError(f"{identity.uri} may not connect as a client")
        client_id = identity.name
        node_id = flower.node_id_of(client_id)
        peer = self._peers.get(node_id)
        if peer is None:
            if len(self._peers) >= self.limits.clients:
                raise LimitExceededError(
                    f"server: {len(self._peers)} clients known, limit clients is {self.limits.clients}"
                )

            def wanted(start: Start) -> bool:
                pending = self._pending.get(start.reply_to)
                return pending is not None and pending.peer.node_id == node_id

            peer = self._peers[node_id] = _Peer(client_id, node_id, Mailbox(self.limits, wanted))
        return peer

    def _on_event(self, peer: _Peer, pump: Pump, event: Event) -> None:
        match event:
            case Opened():
                self._attach(peer, pump, event)
            case Received():
                self._answered(peer, event)
            case Refused():
                self._fail(event.message_id, f"refused the message: {event.reason}")
            case Resumed():
                self._emit(events.TransferResumed(peer.client_id, event.message_id, event.offset, event.size_bytes))
            case Damaged():
                self._emit(events.ChecksumFailed(peer.client_id, event.message_id, event.offset, event.attempt))
            case _:
                pass

    def _attach(self, peer: _Peer, pump: Pump, event: Opened) -> None:
        if peer.pump is not None:
            peer.pump.detach()
        if peer.gone is not None:
            peer.gone.cancel()
            peer.gone = None
        peer.pump = pump
        self._connected.add(peer.node_id)
        peer.facts = getattr(event.hello, "facts", {})
        pump.session.wanted(tuple(peer.unanswered))
        self._emit(events.LinkConnected(peer.client_id, peer.node_id, event.resumed))
        self._tell_grids()

    def _lost(self, peer: _Peer, reason: str) -> None:
        peer.pump = None
        self._connected.discard(peer.node_id)
        self._emit(events.LinkLost(peer.client_id, reason))
        if self._loop is not None:
            peer.gone = self._loop.call_later(self.limits.reconnect_s, self._gone, peer)
        self._tell_grids()

    def _gone(self, peer: _Peer) -> None:
        peer.gone = None
        for message_id in list(peer.unanswered):
            self._fail(message_id, f"away for more than {self.limits.reconnect_s:g} s", flower.ERROR_UNREACHABLE)

    def _tell_grids(self) -> None:
        with self._grids_lock:
            grids = list(self._grids.values())
        for grid in grids:
            grid.nodes_changed()
