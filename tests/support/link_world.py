"""Two ends of the link joined by a fake stream that can be cut, damaged and slowed: no sockets, no clock."""

from __future__ import annotations

import random
from collections import deque
from itertools import count

from fedlearn.link.frames import Start
from fedlearn.link.limits import LinkLimits
from fedlearn.link.mailbox import Mailbox
from fedlearn.link.session import Session
from fedlearn.link.states import Cancelled, Opened, Received, Side
from fedlearn.link.transfer import Outgoing, Payload

SMALL = LinkLimits(chunk_bytes=16, checksum_retries=1_000)
FAR = 1e9


class Server:
    """Sends instructions and waits for one answer to each."""

    def __init__(self, limits: LinkLimits = SMALL) -> None:
        self.mailbox = Mailbox(limits, self._wanted)
        self.incarnation = b"S" * 16
        self.pending: dict[str, tuple[bytes, ...]] = {}
        self.answers: dict[str, tuple[bytes, ...]] = {}
        self.ids = (f"m{i}" for i in count())
        self.session: Session | None = None

    def _wanted(self, start: Start) -> bool:
        return start.reply_to in self.pending

    def push(self, buffers: tuple[bytes, ...], payload: Payload | None = None) -> str:
        payload = payload or Payload(buffers, self.mailbox.limits.chunk_bytes)
        message = Outgoing(next(self.ids), "", b"meta", payload, FAR)
        self.pending[message.message_id] = buffers
        self.mailbox.put(message)
        if self.session:
            self.session.submit(message)
        return message.message_id

    def cancel(self, message_id: str) -> None:
        self.pending.pop(message_id, None)
        if self.session:
            self.session.cancel(message_id)
        else:
            self.mailbox.settle(message_id)

    def connect(self) -> Session:
        self.session = Session(Side.ACCEPTOR, self.mailbox, self.incarnation, 0.0, node_id=7)
        return self.session

    def on(self, event: object) -> None:
        if isinstance(event, Opened):
            self.session.wanted(tuple(self.pending))
        elif isinstance(event, Received):
            assert event.reply_to in self.pending, "an answer came twice, or to nothing"
            self.answers[event.reply_to] = event.buffers
            self.pending.pop(event.reply_to)
            self.mailbox.settle(event.reply_to)


class Client:
    """Answers each instruction with its own buffers reversed; counts how often each was run."""

    def __init__(self, number: int, limits: LinkLimits = SMALL) -> None:
        self.mailbox = Mailbox(limits, self._wanted)
        self.incarnation = bytes([number % 256]) * 16
        self.number = number
        self.working: dict[str, tuple[bytes, ...]] = {}
        self.ran: list[str] = []
        self.session: Session | None = None
        self._ids = (f"r{number}-{i}" for i in count())

    def _wanted(self, start: Start) -> bool:
        held = {reply.reply_to for reply in self.mailbox.outgoing.values()}
        return start.message_id not in self.working and start.message_id not in held

    def connect(self) -> Session:
        self.session = Session(Side.INITIATOR, self.mailbox, self.incarnation, 0.0, facts={"k": "v"})
        return self.session

    def on(self, event: object) -> None:
        if isinstance(event, Opened):
            for message_id in set(self.working) - set(event.hello.wanted):
                del self.working[message_id]
        elif isinstance(event, Received):
            assert event.metadata == b"meta"
            self.working[event.message_id] = event.buffers
            self.ran.append(event.message_id)
        elif isinstance(event, Cancelled):
            self.working.pop(event.message_id, None)
            for reply in list(self.mailbox.outgoing.values()):
                if reply.reply_to == event.message_id:
                    self.mailbox.settle(reply.message_id)

    def finish(self, message_id: str) -> None:
        buffers = self.working.pop(message_id)
        payload = Payload(buffers[::-1], self.mailbox.limits.chunk_bytes)
        reply = Outgoing(next(self._ids), message_id, b"reply", payload, FAR)
        self.mailbox.put(reply)
        if self.session:
            self.session.submit(reply)


class World:
    """A server, one client identity, and the stream between them."""

    def __init__(self, rng: random.Random | None = None, limits: LinkLimits = SMALL) -> None:
        self.rng = rng or random.Random(0)
        self.limits = limits
        self.server = Server(limits)
        self.client = Client(1, limits)
        self.clients = [self.client]
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.sent = {"up": 0, "down": 0}
        self.connect()

    def connect(self) -> None:
        """A new stream; whatever was in flight on the old one is lost."""
        self.up.clear()
        self.down.clear()
        self.server.connect()
        self.client.connect()

    def restart_client(self) -> None:
        """The client's process dies with all that it held; another takes its place."""
        self.client = Client(self.client.number + 1, self.limits)
        self.clients.append(self.client)
        self.connect()

    def move(self, *, damage: bool = False) -> bool:
        """One step of one end or of the stream, at random; False when nothing can move."""
        moves = [self._client_sends, self._server_sends, self._client_reads, self._server_reads, self._client_works]
        self.rng.shuffle(moves)
        return any(move(damage) for move in moves)

    def settle(self) -> None:
        """Run undisturbed until nothing moves."""
        while self.move():
            pass

    def _client_sends(self, damage: bool) -> bool:
        return self._put(self.client.session, self.up, "up", damage)

    def _server_sends(self, damage: bool) -> bool:
        return self._put(self.server.session, self.down, "down", damage)

    def _put(self, session: Session, stream: deque[bytes], name: str, damage: bool) -> bool:
        frame = session.send(0.0)
        if frame is None:
            return False
        self.sent[name] += len(frame)
        if damage and frame[0] == 0x2A and self.rng.random() < 0.2:
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        stream.append(frame)
        return True

    def _client_reads(self, _: bool) -> bool:
        return self._take(self.client, self.down)

    def _server_reads(self, _: bool) -> bool:
        return self._take(self.server, self.up)

    def _take(self, end: Server | Client, stream: deque[bytes]) -> bool:
        if not stream:
            return False
        for event in end.session.receive(stream.popleft(), 0.0):
            end.on(event)
        return True

    def _client_works(self, _: bool) -> bool:
        if not self.client.working:
            return False
        self.client.finish(self.rng.choice(sorted(self.client.working)))
        return True
