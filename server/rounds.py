"""A round's messages over any Flower `Grid`: our link, or stock Flower."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Message, MessageType, RecordDict

from fedlearn.errors import FedlearnError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Failed, Fitted, Scored, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.serverapp import Grid

DESCRIBE_S: Final = 120.0
"""A client answers its first message only when its worker has loaded torch and the data."""
STOCK_POLL_S: Final = 0.5
"""Flower's own grid cannot be waited on, only asked. Ours is never polled."""

MESSAGE_TYPES: Final = {
    Exchange.DESCRIBE: MessageType.QUERY,
    Exchange.TRAIN: MessageType.TRAIN,
    Exchange.EVALUATE: MessageType.EVALUATE,
}


class GridBackend:
    """Does clients' work by messages.

    Args:
        grid: a Flower grid.
        encoder: makes the requests of this run.
        client_name: node id to the name in that client's certificate; None where the runtime knows no such name.
    """

    def __init__(
        self, grid: Grid, encoder: messages.RequestEncoder, client_name: Callable[[int], str] | None = None
    ) -> None:
        self._grid, self._encoder, self._client_name = grid, encoder, client_name
        self._node_of: dict[str, int] = {}
        self._refused: dict[int, str] = {}

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        """Connected clients that take part in this study; asks newcomers who they are."""
        deadline = time.monotonic() + timeout_s
        while True:
            nodes = set(self._grid.get_node_ids())
            known = set(self._node_of.values())
            self._describe(sorted(nodes - known))
            here = sorted(client for client, node in self._node_of.items() if node in nodes)
            left_s = deadline - time.monotonic()
            if len(here) >= at_least or left_s <= 0:
                return here
            self._wait_for_nodes(len(nodes) + 1, left_s)

    @property
    def refusals(self) -> Sequence[str]:
        """Why connected clients do not take part."""
        return tuple(self._refused[node] for node in sorted(self._refused))

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        for client, reply in self._exchange(Exchange.TRAIN, work):
            try:
                yield Failed(client, reply) if isinstance(reply, str) else Fitted(client, messages.decode_update(reply))
            except FedlearnError as error:
                yield Failed(client, error.message)

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        for client, reply in self._exchange(Exchange.EVALUATE, work):
            try:
                yield Failed(client, reply) if isinstance(reply, str) else messages.decode_scores(client, reply)
            except FedlearnError as error:
                yield Failed(client, error.message)

    def close(self) -> None:
        self._node_of.clear()

    def _exchange(self, exchange: Exchange, work: Work) -> Iterator[tuple[str, RecordDict | str]]:
        """Each client of the cohort once, with its reply's content or the reason why there is none."""
        requests = self._encoder.encode(exchange, work)
        present = {client: request for client, request in requests.items() if client in self._node_of}
        for client in sorted(requests.keys() - present.keys()):
            yield client, "not connected"
        outgoing = {
            self._node_of[client]: Message(
                request, self._node_of[client], MESSAGE_TYPES[exchange], ttl=work.deadline_s, group_id=str(work.round)
            )
            for client, request in present.items()
        }
        client_of = {node: client for client, node in self._node_of.items()}
        del requests, present
        for node, reply in self._send(outgoing, work.deadline_s):
            yield client_of[node], reply

    def _send(self, outgoing: dict[int, Message], deadline_s: float) -> Iterator[tuple[int, RecordDict | str]]:
        deadline = time.monotonic() + deadline_s
        nodes = list(outgoing)
        ids = list(self._grid.push_messages(outgoing.values()))
        outgoing.clear()
        waiting = dict(zip(ids, nodes, strict=True))
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for reply in self._wait(list(waiting), left_s):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply.error.reason or "error without a reason" if reply.has_error() else reply.content
        for node in waiting.values():
            yield node, f"no reply within {deadline_s:g} s"

    def _describe(self, nodes: Sequence[int]) -> None:
        if not nodes:
            return
        outgoing = {n: Message(self._encoder.describe(), n, MessageType.QUERY, ttl=DESCRIBE_S) for n in nodes}
        for node, reply in self._send(outgoing, DESCRIBE_S):
            if isinstance(reply, str):
                self._refused[node] = reply
                continue
            try:
                client = messages.decode_description(reply)
            except FedlearnError as error:
                self._refused[node] = error.message
                continue
            name = self._client_name(node) if self._client_name is not None else client
            if name != client:
                self._refused[node] = f"calls itself {client!r}, its certificate says {name!r}"
                continue
            self._refused.pop(node, None)
            self._node_of[client] = node

    def _wait(self, ids: Sequence[str], timeout_s: float) -> Iterable[Message]:
        wait_messages: Any = getattr(self._grid, "wait_messages", None)
        if wait_messages is not None:
            replies: Iterable[Message] = wait_messages(ids, timeout_s)
            return replies
        found = list(self._grid.pull_messages(ids))
        if not found:
            time.sleep(min(STOCK_POLL_S, timeout_s))
        return found

    def _wait_for_nodes(self, count: int, timeout_s: float) -> None:
        wait_nodes: Any = getattr(self._grid, "wait_nodes", None)
        if wait_nodes is not None:
            wait_nodes(count, timeout_s)
        else:
            time.sleep(min(STOCK_POLL_S, timeout_s))
