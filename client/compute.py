"""One message, answered by an app in a worker."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from client import records
from client.frames import Frame, Kind
from client.process import WorkerRaisedError
from fedlearn.errors import RemoteProtocolError
from fedlearn.link import flower

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import Message

    from client.crew import Crew

log = logging.getLogger("fedlearn.client")


async def compute(
    crew: Crew,
    message: Message,
    run: str,
    state: bytes | None,
    node_config: Mapping[str, Any],
    run_config: Mapping[str, Any] | None = None,
) -> tuple[Message, bytes | None]:
    """Let the app answer a message.

    Args:
        crew: where the app runs.
        message: to answer.
        run: whose worker answers.
        state: the app's packed `Context.state` before; None for an empty one.
        node_config: what the app is told of this site.
        run_config: what a foreign app is told of the run.

    Returns:
        The reply, and the packed state after; None when it is empty.
    """
    wire = flower.encode(message)
    metadata, arrays = records.split(state) if state is not None else (b"", [])
    header = {
        "message": len(wire.buffers),
        "state": len(arrays) if state is not None else -1,
        "run_id": message.metadata.run_id,
        "node_id": message.metadata.dst_node_id,
        "node_config": dict(node_config),
        "run_config": dict(run_config or {}),
    }
    buffers = [wire.metadata, *wire.buffers, *([metadata, *arrays] if state is not None else [])]
    try:
        frame = await crew.call(run, Frame(Kind.CALL, header, buffers))
    except WorkerRaisedError as error:
        # The exception's own text may hold data of people: it stays in this site's log.
        log.error("run %s: %s: %s", run, error.message, error.detail)  # noqa: TRY400  # the trace is the worker's
        raise
    pieces = list(frame.buffers)
    count, kept = int(frame.header["message"]), int(frame.header["state"])
    reply = flower.decode(pieces[0], pieces[1 : 1 + count])
    if reply.has_error():
        raise RemoteProtocolError(f"run {run}: the app answered with an error: {reply.error.reason}")
    after = None if kept < 0 else records.join(pieces[1 + count], pieces[2 + count : 2 + count + kept])
    return reply, after
