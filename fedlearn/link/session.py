"""One connection as a state machine without sockets, threads or clocks: frames in, events out, time as an argument.

The same class serves both ends. `receive` takes a frame and returns what it meant; `send` gives the next frame to put on
the wire, or None; `tick` is to be called at `deadline()`. What must outlive the connection is in the `Mailbox`. The handshake
and the close are one table for both sides; everything between is symmetric.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from fedlearn.errors import LimitExceededError, LinkError, LocalProtocolError, ProtocolError, RemoteProtocolError
from fedlearn.link import framing
from fedlearn.link.faults import MessageError, MessageLimitError, VersionError
from fedlearn.link.frames import (
    VERSION,
    Ack,
    Cancel,
    Chunk,
    End,
    Fault,
    FaultCode,
    Frame,
    Goodbye,
    Heartbeat,
    Hello,
    Resume,
    Retry,
    Start,
    Welcome,
)
from fedlearn.link.mailbox import Mailbox
from fedlearn.link.states import (
    TRANSITIONS,
    TRIGGERED,
    Cancelled,
    Closed,
    Damaged,
    Event,
    Opened,
    Received,
    Refused,
    Resumed,
    Side,
    State,
)
from fedlearn.link.transfer import Incoming, Outgoing, Sending


class Session:
    """One connection with one peer.

    Args:
        side: whether this end dialled.
        mailbox: what outlives the connection.
        incarnation: 16 random bytes of this process.
        now: monotonic seconds.
        node_id: told to the initiator; used by an acceptor only.
        facts: told to the acceptor; used by an initiator only.
    """

    def __init__(
        self,
        side: Side,
        mailbox: Mailbox,
        incarnation: bytes,
        now: float,
        *,
        node_id: int = 0,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self.side = side
        self.mailbox = mailbox
        self.limits = mailbox.limits
        self.states = {Side.INITIATOR: State.IDLE, Side.ACCEPTOR: State.IDLE}
        self._incarnation = incarnation
        self._node_id = node_id
        self._control: deque[Frame] = deque()
        self._queue: deque[Sending] = deque()
        self._sendings: dict[int, Sending] = {}
        self._active: set[int] = set()
        self._declined: set[int] = set()
        # Payloads that were asked for again: whether one more End comes for them depends on what crossed our Retry.
        self._retried: set[int] = set()
        self._offers: dict[tuple[str, int], int] = {}
        self._last_sent = now
        self._peer_deadline = now + self.limits.handshake_s
        if side is Side.INITIATOR:
            self._put(Hello(VERSION, VERSION, incarnation, dict(facts or {}), mailbox.offers()))

    @property
    def other(self) -> Side:
        """The peer's side."""
        return Side.ACCEPTOR if self.side is Side.INITIATOR else Side.INITIATOR

    @property
    def is_open(self) -> bool:
        """True between handshake and close."""
        return self.states[self.side] is State.OPEN and self.states[self.other] is State.OPEN

    @property
    def peer_closed(self) -> bool:
        """True when the peer has said its last word."""
        return self.states[self.other] is State.CLOSED

    @property
    def finished(self) -> bool:
        """True when this side has closed and everything that it had to say was taken by `send`."""
        return self.states[self.side] is State.CLOSED and not self._control

    # What this end does.

    def submit(self, message: Outgoing) -> None:
        """Send a message that was put into the mailbox. Before the handshake is done: it will be sent after."""
        if self.is_open:
            self._queue.append(self._sending(message))

    def cancel(self, message_id: str) -> None:
        """Settle an outgoing message and tell the peer that nobody waits for it or its answer."""
        known = self.mailbox.outgoing.get(message_id)
        self.mailbox.settle(message_id)
        if known is None or not self.is_open:
            return
        sending = self._sendings.pop(known.payload.payload_id, None)
        # Not among the sendings any more: the peer has all of it.
        if sending is None or sending.started:
            self._put(Cancel(message_id))
        self._abandon(sending)

    def wanted(self, message_ids: tuple[str, ...]) -> None:
        """Acceptor: answer the peer's Hello; `message_ids` are the instructions whose replies are still wanted."""
        self._put(Welcome(VERSION, self._incarnation, self._node_id, self.mailbox.offers(), message_ids))
        self._open_queue()

    def close(self, reason: str = "") -> None:
        """Say goodbye. Nothing is sent after it."""
        if self.states[self.side] is not State.CLOSED:
            self._queue.clear()
            self._put(Goodbye(reason))

    def refuse(self, error: ProtocolError) -> None:
        """Close because the peer broke the protocol; it is told why."""
        if self.states[self.side] is State.CLOSED:
            return
        limit = isinstance(error, LimitExceededError)
        code = (
            FaultCode.VERSION if isinstance(error, VersionError) else FaultCode.LIMIT if limit else FaultCode.PROTOCOL
        )
        message_id = error.message_id if isinstance(error, MessageError) else ""
        self._control.clear()
        self._queue.clear()
        self._put(Fault(code, error.message[: self.limits.reason_bytes // 4], message_id))

    def send(self, now: float) -> bytes | None:
        """The next frame for the wire: control first, then the current message's chunks. None when there is none."""
        frame = self._next(now)
        if frame is not None:
            self._last_sent = now
        return frame

    def _next(self, now: float) -> bytes | None:
        if self._control:
            return framing.pack(self._control.popleft())
        while self._queue:
            sending = self._queue[0]
            payload = sending.message.payload
            if sending.ended or self._sendings.get(payload.payload_id) is not sending:
                self._queue.popleft()
            elif sending.message.message_id not in self.mailbox.outgoing:
                # Settled meanwhile: the mailbox decides, whoever changed it.
                del self._sendings[payload.payload_id]
                self._abandon(sending)
                if self._control:
                    return framing.pack(self._control.popleft())
            elif not sending.started:
                sending.started = True
                return framing.pack(self._start(sending, now))
            elif sending.offset < payload.size_bytes:
                frame, sending.offset = payload.frame_at(sending.offset)
                return frame
            else:
                sending.ended = True
                self._queue.popleft()
                return framing.pack(End(payload.payload_id))
        return None

    # Time.

    def deadline(self) -> float:
        """When `tick` is due: the next heartbeat, or the end of patience with the peer."""
        if not self.is_open:
            return self._peer_deadline
        return min(self._last_sent + self.limits.heartbeat_s, self._peer_deadline)

    def tick(self, now: float) -> None:
        """Let time pass; may queue a heartbeat.

        Raises:
            LinkError: the peer was silent for longer than it promised.
        """
        if now >= self._peer_deadline:
            what = "no handshake" if not self.is_open else "no sign of life"
            raise LinkError(f"{what} from the peer in time")
        if self.is_open and now >= self._last_sent + self.limits.heartbeat_s:
            self._put(Heartbeat(self.limits.heartbeat_s))
            self._last_sent = now

    # What the peer does.

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take one frame.

        Raises:
            RemoteProtocolError: the peer broke the protocol or a limit; nothing of the frame was used. Call `refuse`.
        """
        frame = framing.unpack(data, self.limits)
        self._move(self.other, type(frame), RemoteProtocolError)
        promise = frame.next_within_s if isinstance(frame, Heartbeat) else self.limits.heartbeat_s
        self._peer_deadline = now + promise + self.limits.heartbeat_grace_s
        match frame:
            case Chunk():
                return self._on_chunk(frame)
            case Start():
                return self._on_start(frame)
            case End():
                return self._on_end(frame)
            case Ack():
                return self._on_ack(frame)
            case Retry():
                return self._on_retry(frame)
            case Cancel():
                return self._on_cancel(frame)
            case Hello():
                return self._on_hello(frame)
            case Welcome():
                return self._on_welcome(frame)
            case Goodbye():
                return [Closed(frame.reason)]
            case Fault():
                return [Refused(frame.message_id, frame.code, frame.reason)]
            case Heartbeat():
                return []

    def _on_hello(self, hello: Hello) -> list[Event]:
        if not hello.version_min <= VERSION <= hello.version_max:
            raise VersionError(
                f"protocol: the peer speaks versions {hello.version_min} to {hello.version_max}, this end {VERSION}"
            )
        resumed = self.mailbox.met(hello.incarnation)
        self._take_offers(hello.resumes)
        return [Opened(hello, resumed)]

    def _on_welcome(self, welcome: Welcome) -> list[Event]:
        if welcome.version != VERSION:
            raise VersionError(f"protocol: the peer chose version {welcome.version}, this end speaks {VERSION}")
        resumed = self.mailbox.met(welcome.incarnation)
        self._take_offers(welcome.resumes)
        wanted = set(welcome.wanted)
        for payload_id, message in list(self.mailbox.incoming.items()):
            if message.start.message_id not in wanted:
                del self.mailbox.incoming[payload_id]
        for reply in list(self.mailbox.outgoing.values()):
            if reply.reply_to and reply.reply_to not in wanted:
                self.mailbox.settle(reply.message_id)
        self._open_queue()
        return [Opened(welcome, resumed)]

    def _on_start(self, start: Start) -> list[Event]:
        if start.payload_id in self._active or start.payload_id in self._declined:
            raise RemoteProtocolError(f"start: payload {start.payload_id:x} is on its way already")
        if not self.mailbox.wanted(start):
            if len(self._declined) >= self.limits.incoming_messages:
                raise LimitExceededError(
                    f"start: {len(self._declined)} unwanted messages, limit incoming_messages is"
                    f" {self.limits.incoming_messages}"
                )
            self._declined.add(start.payload_id)
            self._put(Ack(start.message_id))
            return []
        self._check_resume(start)
        try:
            message = self.mailbox.admit(start)
        except LimitExceededError as error:
            raise MessageLimitError(error.message, start.message_id) from None
        self._active.add(start.payload_id)
        return [Resumed(start.message_id, start.offset, message.size_bytes)] if start.offset else []

    def _check_resume(self, start: Start) -> None:
        held = self.mailbox.incoming.get(start.payload_id)
        if held is not None and (held.start.message_id, held.start.buffer_bytes) != (
            start.message_id,
            start.buffer_bytes,
        ):
            raise RemoteProtocolError(f"start: payload {start.payload_id:x} belongs to another message")
        if start.offset and (held is None or start.offset != held.received_bytes):
            have = 0 if held is None else held.received_bytes
            raise RemoteProtocolError(f"start: got offset {start.offset}, expected 0 or the {have} bytes held here")
        for payload_id, other in self.mailbox.incoming.items():
            if payload_id in self._active and other.start.message_id == start.message_id:
                raise RemoteProtocolError(f"start: message {start.message_id} is on its way already")

    def _on_chunk(self, chunk: Chunk) -> list[Event]:
        message = self._incoming(chunk.payload_id)
        if message is None:
            return []
        if message.rewinding:
            # Sent before the peer saw our Retry; what we wait for begins where the damaged chunk did.
            if chunk.offset > message.received_bytes:
                return []
            message.rewinding = False
        if message.write(chunk):
            return []
        message.failures += 1
        message_id = message.start.message_id
        if message.failures > self.limits.checksum_retries:
            self.mailbox.drop_incoming(message_id)
            raise MessageError(
                f"checksum: message {message_id} came damaged {message.failures} times at offset {chunk.offset},"
                f" limit checksum_retries is {self.limits.checksum_retries}",
                message_id,
            )
        message.rewinding = True
        self._retried.add(chunk.payload_id)
        if len(self._retried) > self.limits.incoming_messages:
            raise LimitExceededError(
                f"checksum: {len(self._retried)} messages came damaged, limit incoming_messages is"
                f" {self.limits.incoming_messages}"
            )
        self._put(Retry(chunk.payload_id, message.received_bytes))
        return [Damaged(message_id, message.received_bytes, message.failures)]

    def _on_end(self, end: End) -> list[Event]:
        message = self._incoming(end.payload_id)
        if message is None:
            self._declined.discard(end.payload_id)
            return []
        if message.rewinding:
            return []
        start = message.start
        if not message.complete:
            raise MessageError(
                f"end: message {start.message_id} ended after {message.received_bytes} of {message.size_bytes} bytes",
                start.message_id,
            )
        self._active.remove(end.payload_id)
        del self.mailbox.incoming[end.payload_id]
        self._put(Ack(start.message_id))
        return [Received(start.message_id, start.reply_to, start.metadata, message.buffers(), message.ttl_s)]

    def _on_ack(self, ack: Ack) -> list[Event]:
        for payload_id, sending in self._sendings.items():
            if sending.message.message_id == ack.message_id:
                self._abandon(self._sendings.pop(payload_id))
                break
        message = self.mailbox.outgoing.get(ack.message_id)
        if message is None:
            return []
        if message.reply_to:
            self.mailbox.settle(message.message_id)
        else:
            message.acked = True
        return []

    def _on_retry(self, retry: Retry) -> list[Event]:
        sending = self._sendings.get(retry.payload_id)
        if sending is None:
            return []
        sending.retries += 1
        if sending.retries > self.limits.checksum_retries:
            raise LimitExceededError(
                f"retry: asked {sending.retries} times for one message, limit checksum_retries is"
                f" {self.limits.checksum_retries}"
            )
        payload = sending.message.payload
        if retry.offset >= sending.offset or not payload.is_boundary(retry.offset):
            raise RemoteProtocolError(
                f"retry: got offset {retry.offset}, expected the beginning of a chunk that was sent"
            )
        payload.forget(retry.offset)
        sending.offset = retry.offset
        if sending.ended:
            sending.ended = False
            self._queue.appendleft(sending)
        return []

    def _on_cancel(self, cancel: Cancel) -> list[Event]:
        self.mailbox.drop_incoming(cancel.message_id)
        return [Cancelled(cancel.message_id)]

    # Helpers.

    def _incoming(self, payload_id: int) -> Incoming | None:
        """The message that a payload belongs to; None for one that was announced and is not wanted (any more)."""
        message = self.mailbox.incoming.get(payload_id)
        if payload_id in self._active:
            if message is not None:
                return message
            self._active.remove(payload_id)
            self._declined.add(payload_id)
        if payload_id not in self._declined and payload_id not in self._retried:
            raise RemoteProtocolError(f"payload {payload_id:x} was not announced")
        return None

    def _abandon(self, sending: Sending | None) -> None:
        """A message that the peer no longer needs: if its chunks are under way, say that no more will come."""
        if sending is not None and sending.started and not sending.ended:
            sending.ended = True
            self._put(End(sending.message.payload.payload_id))

    def _take_offers(self, offers: Sequence[Resume]) -> None:
        self._offers = {(o.message_id, o.payload_id): o.received_bytes for o in offers}

    def _open_queue(self) -> None:
        self._queue.extend(self._sending(m) for m in self.mailbox.outgoing.values() if not m.acked)

    def _sending(self, message: Outgoing) -> Sending:
        payload = message.payload
        if payload.payload_id in self._sendings:
            raise LocalProtocolError(f"payload {payload.payload_id:x} is on its way already on this connection")
        sending = self._sendings[payload.payload_id] = Sending(message)
        offered = self._offers.pop((message.message_id, payload.payload_id), 0)
        if payload.is_boundary(offered):
            sending.offset = offered
        return sending

    def _start(self, sending: Sending, now: float) -> Start:
        message = sending.message
        return Start(
            message.message_id,
            message.reply_to,
            message.payload.payload_id,
            message.metadata,
            message.payload.buffer_bytes,
            max(0.0, message.deadline - now),
            sending.offset,
        )

    def _put(self, frame: Frame) -> None:
        self._move(self.side, type(frame), LocalProtocolError)
        self._control.append(frame)

    def _move(self, side: Side, kind: type, error: type[ProtocolError]) -> None:
        state = self.states[side]
        after = TRANSITIONS[side].get(state, {}).get(kind)
        if after is None:
            raise error(f"{kind.__name__.lower()} from the {side.value} while it is {state.value}")
        self.states[side] = after
        joint = (self.states[Side.INITIATOR], self.states[Side.ACCEPTOR])
        self.states[Side.INITIATOR], self.states[Side.ACCEPTOR] = TRIGGERED.get(joint, joint)
