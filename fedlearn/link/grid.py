"""A Flower `Grid` over the link, for the thread of a ServerApp."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlearn.errors import LinkError, LocalProtocolError
from fedlearn.link import flower
from fedlearn.link.transfer import Payload

if TYPE_CHECKING:
    from flwr.supercore.run import Run

    from fedlearn.link.limits import LinkLimits


class GridCancelledError(LinkError):
    """The run was stopped while its ServerApp waited for messages."""

    kind = "cancelled"


@dataclass(frozen=True)
class Item:
    """One instruction on its way to the server's loop: its metadata without arrays, and its parts for the wire."""

    origin: Message
    node_id: int
    metadata: bytes
    payload: Payload


class Exchange(Protocol):
    """What a grid needs of its server. `dispatch` and `withdraw` only leave word for the server's loop and return."""

    limits: LinkLimits

    def connected(self) -> Sequence[int]:
        """Node ids of connected clients, ascending."""
        ...

    def connected_count(self) -> int:
        """How many clients are connected."""
        ...

    def dispatch(self, grid: LinkGrid, items: Sequence[Item]) -> None:
        """Send; every item is answered once through `LinkGrid.answer`."""
        ...

    def withdraw(self, message_ids: Sequence[str]) -> None:
        """Nobody waits for these any more."""
        ...

    def on_loop(self) -> bool:
        """True on the loop's own thread, which must never block."""
        ...


class LinkGrid(Grid):
    """Thread-safe, blocking and event-driven; made by `LinkServer.grid(run_id)`.

    `push_messages` returns at once. Each message is answered exactly once, by its reply or by a message with a Flower
    `Error` (client unknown, gone, or its deadline passed); the answer is handed over once and then freed here. Messages
    with the same arrays, in one push or in several, share one encoding while any of them is under way.
    """

    def __init__(self, exchange: Exchange, run_id: int) -> None:
        self._exchange = exchange
        self._run = flower.empty_run(run_id)
        self._changed = threading.Condition()
        self._waiting: set[str] = set()
        self._ready: dict[str, Message] = {}
        self._cancelled = False
        self._payloads: weakref.WeakValueDictionary[tuple[int, ...], _Shared] = weakref.WeakValueDictionary()
        flower.ensure_identity(run_id)

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        if run.run_id != self._run.run_id:
            raise LocalProtocolError(f"grid: made for run {self._run.run_id}, asked to serve run {run.run_id}")
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        flower.ensure_identity(self._run.run_id)
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Connected clients, in ascending order."""
        self._check()
        return list(self._exchange.connected())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send; the ids by which the answers can be had, in the order of `messages`.

        The run, the sender and the id of each message are set here, whatever they were.

        Raises:
            LimitExceededError: a message is larger than a named limit; none was sent.
            GridCancelledError: `cancel` was called.
        """
        self._check()
        items = [self._item(message) for message in messages]
        ids = [item.origin.metadata.message_id for item in items]
        with self._changed:
            self._waiting.update(ids)
        try:
            self._exchange.dispatch(self, items)
        except LinkError:
            with self._changed:
                self._waiting.difference_update(ids)
            raise
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answers that are here by now; never blocks."""
        self._check()
        with self._changed:
            return self._take(list(message_ids))

    def wait_messages(self, message_ids: Iterable[str], timeout_s: float | None = None) -> list[Message]:
        """Block until at least one answer is here, and hand over all that are.

        Empty after `timeout_s` seconds, and at once when none of `message_ids` is awaited (never sent, or handed over
        already). Waits for ever without `timeout_s`; each message has its own deadline anyway.

        Raises:
            GridCancelledError: `cancel` was called.
        """
        ids = list(message_ids)

        def settled() -> bool:
            return self._cancelled or any(i in self._ready for i in ids) or not any(i in self._waiting for i in ids)

        self._block(settled, timeout_s)
        self._check()
        with self._changed:
            return self._take(ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, wait for all answers or `timeout` seconds; what came by then, in the order of arrival."""
        ids = self.push_messages(messages)
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while len(replies) < len(ids):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                self.drop(ids)
                break
            replies += self.wait_messages(ids, left)
        return replies

    def wait_nodes(self, count: int, timeout_s: float | None = None) -> Sequence[int]:
        """Block until `count` clients are connected or `timeout_s` seconds passed; the connected ones, ascending."""
        self._block(lambda: self._cancelled or self._exchange.connected_count() >= count, timeout_s)
        self._check()
        return list(self._exchange.connected())

    def drop(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more: tell the clients, free what came."""
        ids = list(message_ids)
        with self._changed:
            self._waiting.difference_update(ids)
            for message_id in ids:
                self._ready.pop(message_id, None)
            self._changed.notify_all()
        self._exchange.withdraw(ids)

    def cancel(self) -> None:
        """Stop: pending and later calls raise `GridCancelledError`, clients are told to drop the run's messages."""
        with self._changed:
            self._cancelled = True
            ids = list(self._waiting)
            self._waiting.clear()
            self._ready.clear()
            self._changed.notify_all()
        self._exchange.withdraw(ids)

    # For the server.

    def answer(self, message_id: str, reply: Message) -> None:
        """The one answer to a message; ignored when nobody waits for it."""
        with self._changed:
            if message_id in self._waiting:
                self._waiting.discard(message_id)
                self._ready[message_id] = reply
                self._changed.notify_all()

    def nodes_changed(self) -> None:
        """A client came or went."""
        with self._changed:
            self._changed.notify_all()

    def _check(self) -> None:
        if self._cancelled:
            raise GridCancelledError(f"run {self._run.run_id} was stopped")

    def _block(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        if self._exchange.on_loop():
            raise LocalProtocolError("grid: a waiting call on the server's own loop would block it; use another thread")
        with self._changed:
            self._changed.wait_for(done, timeout_s)

    def _take(self, message_ids: Sequence[str]) -> list[Message]:
        return [self._ready.pop(i) for i in message_ids if i in self._ready]

    def _item(self, message: Message) -> Item:
        node_id = message.metadata.dst_node_id
        flower.stamp(
            message,
            message_id=flower.new_message_id(),
            run_id=self._run.run_id,
            src_node_id=flower.SERVER_NODE_ID,
            reply_to_message_id="",
        )
        wire = flower.encode(message)
        key = tuple(id(buffer) for buffer in wire.buffers)
        shared = self._payloads.get(key)
        if shared is None or node_id in shared.node_ids:
            # One connection carries a payload once, so a second message to the same client gets its own.
            shared = _Shared(wire.buffers, self._exchange.limits.chunk_bytes)
            self._payloads[key] = shared
        shared.node_ids.add(node_id)
        return Item(flower.without_content(message), node_id, wire.metadata, shared)


class _Shared(Payload):
    """A payload that remembers who gets it, and keeps its buffers, so that their ids stay theirs."""

    def __init__(self, buffers: Sequence[bytes], chunk_bytes: int) -> None:
        super().__init__(buffers, chunk_bytes)
        self.buffers = tuple(buffers)
        self.node_ids: set[int] = set()
