"""Flower's `Grid` in memory: real ClientApps are called directly, and replies come in another order than they were asked for.

What a network, a crash or somebody hostile does to a reply is a `Fault`: a function from (request, reply) to what arrives, None for
nothing. A client's `Context` goes through Flower's protobuf between calls, as a SuperNode keeps it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.serverapp import Grid

from client.app import app as client_app
from fedlearn.learning.messages import Request, decode_request
from fedlearn.link import flower

Fault = Callable[[Message, Message], Message | None]

RUN_ID = 77


@dataclass
class Node:
    """One client as Flower knows it: its config, and its state between messages."""

    config: Mapping[str, str | int]
    state: bytes = b""
    calls: int = 0


@dataclass
class MemoryGrid(Grid):
    """A grid over ClientApps in this process.

    Args:
        nodes: by node id.
        order: seeds the order in which clients compute and replies arrive.
        fault: what happens to each reply.
        app: the ClientApp.
    """

    nodes: dict[int, Node]
    order: int = 0
    fault: Fault = lambda request, reply: reply
    app: Callable[[Message, Context], Message] = client_app
    requests: list[Request] = field(default_factory=list)
    _ready: dict[str, Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flower.ensure_identity(RUN_ID)
        self._random = random.Random(self.order)
        self._run = flower.empty_run(RUN_ID)

    @property
    def run(self):
        return self._run

    def set_run(self, run) -> None:
        self._run = run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        ids = list(self.nodes)
        self._random.shuffle(ids)
        return ids

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        asked = list(messages)
        for message in asked:
            flower.stamp(message, message_id=flower.new_message_id(), run_id=RUN_ID, src_node_id=1)
        ids = [message.metadata.message_id for message in asked]
        self._random.shuffle(asked)
        for message in asked:
            self._compute(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """One reply at a time, any of those asked for."""
        here = [i for i in message_ids if i in self._ready]
        return [self._ready.pop(self._random.choice(here))] if here else []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError("the loop pushes and pulls")

    def _compute(self, message: Message) -> None:
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None:
            self._answer(message, Message(Error(ErrorCode.NODE_UNAVAILABLE, "unknown node"), reply_to=message))
            return
        node.calls += 1
        self.requests.append(decode_request(message.content))
        context = Context(RUN_ID, message.metadata.dst_node_id, dict(node.config), RecordDict(), {})
        if node.state:
            context = context_from_proto(type(context_to_proto(context)).FromString(node.state))
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
        else:
            node.state = context_to_proto(context).SerializeToString()
        self._answer(message, reply)

    def _answer(self, message: Message, reply: Message) -> None:
        arrived = self.fault(message, reply)
        if arrived is not None:
            self._ready[message.metadata.message_id] = arrived


def nodes_of(clients: Iterable[str]) -> dict[int, Node]:
    """A node for each client, under ids that do not follow their names."""
    return {flower.node_id_of(client): Node({"client-id": client}) for client in clients}
