"""Moves frames between a gRPC stream and a `Session`, until the session or the stream ends. The same for both ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fedlearn.errors import LinkError, ProtocolError
from fedlearn.link.states import Side

if TYPE_CHECKING:
    from fedlearn.clock import Clock
    from fedlearn.link.session import Session
    from fedlearn.link.states import Event


class Pump:
    """One connection at work.

    Args:
        session: the state machine.
        read: the next frame; anything but bytes when the stream has ended.
        write: hand over a frame; returns when flow control allows the next.
        clock: for the session's deadlines.
        on_event: called for each event, on the loop, in order; must not block.
    """

    def __init__(
        self,
        session: Session,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[bytes], Awaitable[Any]],
        clock: Clock,
        on_event: Callable[[Event], None],
    ) -> None:
        self.session = session
        self._read = read
        self._write = write
        self._clock = clock
        self._on_event = on_event
        self._wake = asyncio.Event()
        self._detached: asyncio.Event = asyncio.Event()

    def wake(self) -> None:
        """The session has something to send."""
        self._wake.set()

    def detach(self) -> None:
        """Take no further frame for this session: another connection has taken its place."""
        self._detached.set()

    async def run(self) -> str:
        """Serve until the end; why it ended in order: the peer's goodbye, ours, or another connection's arrival.

        Raises:
            ProtocolError: the peer broke the protocol; it was told, as far as it listened.
            LinkError: the stream broke, or the peer fell silent.
        """
        writer = asyncio.create_task(self._send(), name="link-writer")
        others = [
            asyncio.create_task(self._receive(), name="link-reader"),
            asyncio.create_task(self._keep_time(), name="link-timer"),
            asyncio.create_task(self._wait_detached(), name="link-detached"),
        ]
        try:
            done, _ = await asyncio.wait([writer, *others], return_when=asyncio.FIRST_COMPLETED)
            if not self._detached.is_set() and not any(_is_broken(task) for task in done):
                await self._part(writer, others[0])
            for task in (*others, writer):
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise task.exception() or AssertionError
            return next((str(task.result()) for task in done if task is not writer), "goodbye")
        finally:
            for task in (writer, *others):
                task.cancel()
            await asyncio.gather(writer, *others, return_exceptions=True)

    async def _part(self, writer: asyncio.Task[Any], reader: asyncio.Task[Any]) -> None:
        """Let the last word go out, a goodbye or a fault, and the other end hear it before the stream is torn down."""
        self.wake()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.session.limits.stop_s):
                await asyncio.wait([writer])
                if self.session.side is Side.INITIATOR:
                    await asyncio.wait([reader])
                    while not self.session.peer_closed and isinstance(await self._read(), bytes):
                        pass

    async def _send(self) -> str:
        session = self.session
        while not self._detached.is_set():
            frame = session.send(self._clock.monotonic())
            if frame is not None:
                await self._write(frame)
            elif session.finished:
                return "goodbye"
            else:
                await self._wake.wait()
                self._wake.clear()
        return "replaced"

    async def _receive(self) -> str:
        session = self.session
        while True:
            data = await self._read()
            if self._detached.is_set():
                return "replaced"
            if not isinstance(data, bytes):
                raise LinkError("the stream ended without a goodbye")
            try:
                events = session.receive(data, self._clock.monotonic())
            except ProtocolError as error:
                session.refuse(error)
                raise
            while events:
                # Nothing here may hold an event, and with it a message's bytes, until the next frame comes.
                self._on_event(events.pop(0))
            del data
            self._wake.set()
            if session.peer_closed:
                session.close()
                return "the peer said goodbye"

    async def _keep_time(self) -> None:
        session = self.session
        while True:
            left_s = session.deadline() - self._clock.monotonic()
            # The handshake's deadline is far and the first heartbeat near, so never sleep longer than one heartbeat.
            await asyncio.sleep(min(max(0.0, left_s), session.limits.heartbeat_s))
            session.tick(self._clock.monotonic())
            self._wake.set()

    async def _wait_detached(self) -> str:
        await self._detached.wait()
        return "replaced by another connection of the same client"


def _is_broken(task: asyncio.Task[Any]) -> bool:
    """True when a task ended because the stream is gone, so that nothing more can be said on it."""
    if task.cancelled():
        return True
    error = task.exception()
    return error is not None and not isinstance(error, ProtocolError)
