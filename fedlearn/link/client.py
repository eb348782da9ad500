"""A site's end of the link: dials out, keeps the session alive, hands messages to a handler."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from flwr.app import Message

from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import FedlearnError, LimitExceededError, LinkError, ProtocolError, TlsError
from fedlearn.link import events, flower, wire
from fedlearn.link.faults import VersionError
from fedlearn.link.frames import INCARNATION_BYTES, FaultCode, Start, Welcome
from fedlearn.link.limits import LinkLimits
from fedlearn.link.mailbox import Mailbox
from fedlearn.link.pump import Pump
from fedlearn.link.session import Session
from fedlearn.link.states import (
    Cancelled,
    Closed,
    Damaged,
    Event,
    Opened,
    Received,
    Refused,
    Resumed,
    Side,
)
from fedlearn.link.transfer import Outgoing, Payload

if TYPE_CHECKING:
    from fedlearn.link.tls import TlsBundle

Handler = Callable[[Message], Awaitable[Message]]
"""Answers an instruction, usually with `Message(content, reply_to=message)`. Cancelled when nobody waits any more."""


class LinkClient:
    """One site. A handler that raises costs an error message to the server, never the client.

    A message runs once in this process, however often it is delivered; its answer is kept, and sent again after a loss,
    until the server has it.

    Args:
        address: `host:port` of the server; the server's certificate must name this host.
        tls: a bundle of role CLIENT.
        handler: answers instructions; up to `limits.running_handlers` at the same time.
        facts: what the server is told of this site, for people to read.
        limits: the named limits.
        clock: for deadlines.
        emit: receives the link's events, on the loop.
    """

    def __init__(
        self,
        address: str,
        tls: TlsBundle,
        handler: Handler,
        facts: Mapping[str, str] | None = None,
        limits: LinkLimits | None = None,
        clock: Clock | None = None,
        emit: events.Emit | None = None,
    ) -> None:
        wire.split_address(address)
        self.address = address
        self.limits = limits or LinkLimits()
        self.node_id = 0
        self._tls = tls
        self._handler = handler
        self._facts = dict(facts or {})
        self._clock = clock or SystemClock()
        self._emit = emit or events.ignore
        self._incarnation = secrets.token_bytes(INCARNATION_BYTES)
        self._mailbox = Mailbox(self.limits, self._wanted)
        self._pump: Pump | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(self.limits.running_handlers)
        self._opened_at: float | None = None
        self._fatal: FedlearnError | None = None

    @property
    def connected(self) -> bool:
        """True while a session is open."""
        return self._pump is not None and self._pump.session.is_open

    async def run(self) -> NoReturn:
        """Serve until cancelled; dial again, with jittered exponential waits, after every loss.

        On cancellation: says goodbye, cancels running handlers.

        Raises:
            TlsError: a certificate is refused, on either side; dialling again would not help.
            ProtocolError: the server speaks another version of the protocol.
        """
        wait_s = self.limits.backoff_min_s
        try:
            while True:
                reason, open_s = await self._connection()
                # Only a connection that lasted counts as success; else two programs with one certificate, each
                # replacing the other, would dial without pause.
                if open_s >= self.limits.backoff_max_s:
                    wait_s = self.limits.backoff_min_s
                pause = wait_s * random.uniform(0.5, 1.0)  # noqa: S311  # jitter, not a secret
                self._emit(events.LinkLost(self.address, reason, pause))
                await asyncio.sleep(pause)
                wait_s = min(wait_s * 2, self.limits.backoff_max_s)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def check(self) -> None:
        """Connect, shake hands, say goodbye: a dry run.

        Raises:
            LinkError: the server cannot be reached. Else as `run`.
        """
        reason, open_s = await self._connection(once=True)
        if open_s < 0:
            raise LinkError(
                f"{self.address}: {reason}", hint="is the server running, and does the firewall let us out?"
            )

    async def _connection(self, *, once: bool = False) -> tuple[str, float]:
        """One connection, from dialling to its end; why it ended, and how many seconds it was open (-1: never)."""
        self._opened_at = None
        credentials = grpc.ssl_channel_credentials(self._tls.ca_pem, self._tls.key_pem, self._tls.cert_pem)
        options = wire.client_options(self.limits, self.address)
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            call: Any = channel.stream_stream(wire.CONNECT)()
            try:
                reason = await self._serve(call, once=once)
            except VersionError:
                raise
            except (LinkError, grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
                reason = await self._explain(call, error)
            finally:
                self._pump = None
                call.cancel()
        if self._fatal is not None:
            raise self._fatal
        return reason, -1.0 if self._opened_at is None else self._clock.monotonic() - self._opened_at

    async def _serve(self, call: Any, *, once: bool) -> str:
        session = Session(Side.INITIATOR, self._mailbox, self._incarnation, self._clock.monotonic(), facts=self._facts)
        pump = self._pump = Pump(
            session, call.read, call.write, self._clock, lambda event: self._on_event(session, event, once=once)
        )
        running = asyncio.create_task(pump.run(), name="link-client")
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            session.close("the client stops")
            pump.wake()
            await asyncio.wait([running], timeout=self.limits.stop_s)
            raise
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _explain(self, call: Any, error: Exception) -> str:
        """Why a connection failed, in words; raises where dialling again would not help."""
        if self._fatal is not None or not call.done():
            return str(error)
        code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.CANCELLED:
            return str(error)
        if code is grpc.StatusCode.PERMISSION_DENIED:
            raise TlsError(f"{self.address}: the server refuses this end: {details}") from None
        if code is grpc.StatusCode.UNAVAILABLE and self._opened_at is None:
            await asyncio.to_thread(wire.probe, self.address, self._tls)
            return f"cannot be reached ({details})"
        return str(details or error)

    # Messages.

    def _wanted(self, start: Start) -> bool:
        if start.reply_to or start.message_id in self._tasks:
            return False
        if len(self._tasks) >= self.limits.unanswered_messages:
            raise LimitExceededError(
                f"server: sent {len(self._tasks)} messages without waiting for answers,"
                f" limit unanswered_messages is {self.limits.unanswered_messages}"
            )
        return all(reply.reply_to != start.message_id for reply in self._mailbox.outgoing.values())

    def _on_event(self, session: Session, event: Event, *, once: bool) -> None:
        match event:
            case Opened():
                self._on_opened(session, event, once=once)
            case Received():
                self._tasks[event.message_id] = asyncio.create_task(self._handle(event), name="link-handler")
            case Cancelled():
                self._forget(event.message_id)
            case Refused():
                self._on_refused(event)
            case Resumed():
                self._emit(events.TransferResumed(self.address, event.message_id, event.offset, event.size_bytes))
            case Damaged():
                self._emit(events.ChecksumFailed(self.address, event.message_id, event.offset, event.attempt))
            case Closed():
                pass

    def _on_opened(self, session: Session, event: Opened, *, once: bool) -> None:
        self._opened_at = self._clock.monotonic()
        if isinstance(event.hello, Welcome):
            self.node_id = event.hello.node_id
            for message_id in set(self._tasks) - set(event.hello.wanted):
                self._forget(message_id)
        self._emit(events.LinkConnected(self.address, self.node_id, event.resumed))
        if once:
            session.close("only a check")

    def _on_refused(self, event: Refused) -> None:
        if event.code is FaultCode.VERSION:
            self._fatal = ProtocolError(
                f"{self.address}: {event.reason}", hint="install the same release of fedlearn on both ends"
            )
        reply = self._mailbox.outgoing.get(event.message_id)
        if reply is None:
            return
        # The server will never take this answer, so it gets to know why instead.
        self._mailbox.settle(reply.message_id)
        failed = flower.as_error(reply.metadata, flower.ERROR_CLIENT_RAISED, f"the answer was refused: {event.reason}")
        if failed is not None:
            self._post(failed, (), reply.reply_to, reply.deadline)

    def _forget(self, message_id: str) -> None:
        """Nobody waits for this instruction's answer any more."""
        task = self._tasks.get(message_id)
        if task is not None:
            task.cancel()
        for reply in list(self._mailbox.outgoing.values()):
            if reply.reply_to == message_id:
                self._mailbox.settle(reply.message_id)

    async def _handle(self, event: Received) -> None:
        arrived = self._clock.monotonic()
        try:
            async with self._slots:
                message = flower.decode(event.metadata, event.buffers)
                left_s = max(0.0, event.ttl_s - (self._clock.monotonic() - arrived))
                # Wall clocks of two machines are never compared: the message begins here, now, with what time is left.
                flower.stamp(message, created_at=self._clock.wall(), ttl=left_s)
                reply = await self._answer(message)
                self._send(message, reply, arrived + event.ttl_s)
        finally:
            self._tasks.pop(event.message_id, None)

    async def _answer(self, message: Message) -> Message:
        try:
            return _checked(await self._handler(message))
        except Exception as error:
            said, code = f"{type(error).__name__}: {error}", flower.ERROR_CLIENT_RAISED
            if isinstance(error, FedlearnError):  # in words of its own
                said, code = str(error), flower.ERROR_REFUSED if error.permanent else code
            self._emit(events.HandlerFailed(message.metadata.message_id, said))
            return flower.error_reply(message, code, said)

    def _send(self, message: Message, reply: Message, deadline: float) -> None:
        message_id = message.metadata.message_id
        try:
            wired = flower.encode(reply)
            self._post(wired.metadata, wired.buffers, message_id, deadline)
        except LimitExceededError as error:
            self._emit(events.HandlerFailed(message_id, error.message))
            failed = flower.encode(flower.error_reply(message, flower.ERROR_CLIENT_RAISED, error.message))
            self._post(failed.metadata, (), message_id, deadline)

    def _post(self, metadata: bytes, buffers: Sequence[bytes], reply_to: str, deadline: float) -> None:
        payload = Payload(buffers, self.limits.chunk_bytes)
        outgoing = Outgoing(flower.new_message_id(), reply_to, metadata, payload, deadline)
        self._mailbox.put(outgoing)
        if self._pump is not None:
            self._pump.session.submit(outgoing)
            self._pump.wake()


def _checked(reply: object) -> Message:
    if not isinstance(reply, Message):
        raise TypeError(f"the handler returned {type(reply).__name__}, expected a Message")
    return reply
