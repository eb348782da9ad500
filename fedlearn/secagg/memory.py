"""All parties of one attempt in memory: the protocol in forty lines, and its documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlearn.secagg.client import ClientRound
from fedlearn.secagg.messages import Delivery, FromClient, FromServer, from_bytes, to_bytes
from fedlearn.secagg.quantize import Decoded
from fedlearn.secagg.ring import Vector
from fedlearn.secagg.server import ServerRound, Stage

Answers = Callable[[Stage, str], bool]
"""Whether a client's message of a stage arrives."""


def run_in_memory(
    server: ServerRound,
    clients: Mapping[str, ClientRound],
    vectors: Mapping[str, Vector],
    subject: bytes,
    *,
    arrives: Answers = lambda stage, client: True,  # noqa: ARG005  # the signature is the documentation
) -> Decoded:
    """One attempt from check-in to the open sum; every message passes as bytes.

    Args:
        server: fresh.
        clients: fresh, by name.
        vectors: each client's encoded update, by name.
        subject: digest of the model and the configuration.
        arrives: loses messages: False and the client has dropped out.

    Raises:
        SecureAggregationError: the attempt is void, or somebody broke the protocol.
    """

    def answer(name: str, message: FromServer) -> FromClient | None:
        reply = clients[name].receive(message)
        return clients[name].mask(vectors[name].copy()) if isinstance(message, Delivery) else reply

    def send(name: str, message: FromClient | None) -> None:
        if message is not None and arrives(server.stage, name):
            server.receive(name, from_bytes(to_bytes(message)))  # type: ignore[arg-type]

    for name, client in clients.items():
        client.bind(subject)
        send(name, client.check_in())
    while server.stage is not Stage.OPENED:
        for name, message in server.close().items():
            send(name, answer(name, from_bytes(to_bytes(message))))  # type: ignore[arg-type]
    return server.total
