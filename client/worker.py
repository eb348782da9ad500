"""The worker process: loads the app once, then answers one message after another for its agent.

It holds no key and knows no path of the agent's state, opens no sockets (see `client.sandbox`), and has one way out: the socket pair
that it was started with. It ends when the agent does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from flwr.app import Context, Message, RecordDict

from client import frames, records, sandbox
from client.frames import Frame, Kind
from fedlearn.app import App, load_app
from fedlearn.errors import FedlearnError, LocalProtocolError, WorkerCrashedError
from fedlearn.link import flower

WHERE_LIMIT: Final = 12
"""Frames of a traceback that are reported, innermost last."""

MESSAGE_LIMIT: Final = 2_000
"""Characters of an error's message that are reported."""


def main(fd: int, agent_pid: int) -> int:
    """Run until the agent closes its end.

    Args:
        fd: this process's end of the socket pair.
        agent_pid: the agent's process id.
    """
    # Made before the sandbox closes: afterwards not even this is possible.
    sock = socket.socket(fileno=fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    box = sandbox.enter(agent_pid)
    first = frames.receive(sock)
    if first is None:
        return 0
    if first.kind is not Kind.INIT:
        raise LocalProtocolError(f"worker: got {first.kind.name} first, expected INIT")
    try:
        app = _load(first.header)
    except BaseException as error:
        frames.send(sock, Frame(Kind.RAISED, describe(error)))
        return WorkerCrashedError.exit_code
    frames.send(sock, Frame(Kind.READY, {"sandbox": box.to_dict()}))
    while (frame := frames.receive(sock)) is not None:
        try:
            reply = _answer(app, frame)
        except BaseException as error:
            traceback.print_exc()
            reply = Frame(Kind.RAISED, describe(error))
        frames.send(sock, reply)
    return 0


def describe(error: BaseException) -> dict[str, Any]:
    """An exception for the agent: what and where. The text of an exception that nobody foresaw may hold data of people."""
    where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    known = error if isinstance(error, FedlearnError) else None
    return {
        "kind": known.kind if known else WorkerCrashedError.kind,
        "type": type(error).__name__,
        "message": (known.message if known else str(error))[:MESSAGE_LIMIT],
        "hint": (known.hint if known else "")[:MESSAGE_LIMIT],
        "where": where[-WHERE_LIMIT:],
    }


def _load(header: dict[str, Any] | Any) -> Any:
    folder = header["app_dir"]
    app: App = load_app(folder)
    if not app.native:
        # A foreign app may have packages of these names itself.
        for name in [n for n in sys.modules if n.partition(".")[0] in {"client", "server", "strategies"}]:
            del sys.modules[name]
    for name in header["preload"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    return app.client_app


def _answer(app: Any, frame: Frame) -> Frame:
    if frame.kind is not Kind.CALL:
        raise LocalProtocolError(f"worker: got {frame.kind.name}, expected CALL")
    header = frame.header
    pieces = iter(frame.buffers)
    message = flower.decode(next(pieces), _take(pieces, header["message"]))
    state = RecordDict()
    if header["state"] >= 0:
        state = records.from_wire(next(pieces), _take(pieces, header["state"]))
    context = Context(
        run_id=header["run_id"],
        node_id=header["node_id"],
        node_config=dict(header["node_config"]),
        state=state,
        run_config=dict(header["run_config"]),
    )
    flower.ensure_identity(header["run_id"])
    reply = app(message, context)
    if not isinstance(reply, Message):
        raise WorkerCrashedError(f"the app returned {type(reply).__name__}, expected a flwr Message")
    answer = flower.encode(reply)
    buffers: list[bytes] = [answer.metadata, *answer.buffers]
    kept = -1
    if context.state:
        after = records.to_wire(context.state)
        buffers += [after.metadata, *after.buffers]
        kept = len(after.buffers)
    return Frame(Kind.DONE, {"message": len(answer.buffers), "state": kept}, buffers)


def _take(pieces: Iterator[bytes], count: int) -> Sequence[bytes]:
    return [next(pieces) for _ in range(count)]


if __name__ == "__main__":
    # Not `return`ed to the interpreter's own shutdown: threads of the app's libraries must not keep a finished worker alive.
    sys.stdout.flush()
    os._exit(main(int(sys.argv[1]), int(sys.argv[2])))
