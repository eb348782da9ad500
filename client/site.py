"""What a site does with a message: policy, gate, worker, gate again. Nothing that was computed leaves by another way."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from flwr.app import ConfigRecord, Message

from client import records
from client.frames import Frame, Kind
from client.process import WorkerRaisedError
from fedlearn.app import RUN_CONFIG
from fedlearn.errors import PolicyRefusedError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.strategy import ServerState
from fedlearn.link import flower
from fedlearn.release.keys import TRAIN, AttemptId, ReleaseKey
from fedlearn.release.records import Finished, InProgress, Refused, Reserved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from client.crew import Crew
    from client.policy import SiteRules
    from fedlearn.learning.messages import Request
    from fedlearn.release.site import SiteGate

log = logging.getLogger("fedlearn.client")
T = TypeVar("T")

FOREIGN_STATES: Final = 16
"""Runs of a foreign app whose memory is kept."""


class Site:
    """Answers fedlearn's messages.

    An update is computed after the gate reserved it, committed with the client's new memory, and sent from the committed
    bytes; whoever asks again gets those. Evaluations change nothing and are computed anew.

    Args:
        crew: where the app runs.
        rules: the site's policy, defaults filled in.
        gate: the release path's; calls to it do not overlap.
        node_config: what the app is told of this site (`client-id`, `data`, `device`, `threads`).
    """

    def __init__(self, crew: Crew, rules: SiteRules, gate: SiteGate, node_config: Mapping[str, Any]) -> None:
        self._crew, self._rules, self._gate = crew, rules, gate
        self._node_config = dict(node_config)
        self._gate_lock = asyncio.Lock()
        self._computing: dict[ReleaseKey, asyncio.Event] = {}

    async def handle(self, message: Message) -> Message:
        """The reply to one message.

        Raises:
            FedlearnError: refused, or failed; the link reports it to the server as an error reply.
        """
        request = messages.decode_facts(message.content)
        self._rules.admit(request)
        if request.exchange is Exchange.TRAIN:
            payload = await self._train(message, request)
            return Message(records.unpack(payload), reply_to=message)
        state = None
        if request.exchange is Exchange.EVALUATE:
            state = await self._at_gate(self._settled_state, request)
        reply, _ = await compute(self._crew, message, request.run, state, self._node_config)
        return reply

    async def _train(self, message: Message, request: Request) -> bytes:
        key = _key(request)
        await asyncio.to_thread(_check_broadcast, message, request)
        base = None if request.base is None else AttemptId(*request.base)
        while True:
            answer = await self._at_gate(lambda: self._gate.reserve(key, base=base))
            if isinstance(answer, InProgress):
                await self._computing[key].wait()
                continue
            break
        if isinstance(answer, Finished):
            log.info("%s: sent again, %d bytes, computed once", key.at, len(answer.payload))
            return answer.payload
        return await self._computed(message, key, _granted(answer))

    async def _computed(self, message: Message, key: ReleaseKey, reserved: Reserved) -> bytes:
        done = self._computing[key] = asyncio.Event()
        try:
            reply, state = await compute(self._crew, message, key.run, reserved.state, self._node_config)
            payload = records.pack(reply.content)
            finished = await self._at_gate(lambda: self._gate.commit(key, payload, state=state))
        except BaseException:
            # Nothing was committed, so nothing can have left: the reservation goes back. Not awaited, since this may be
            # a cancellation.
            self._gate.abandon(key)
            raise
        finally:
            del self._computing[key]
            done.set()
        if isinstance(finished, Refused):
            raise _refusal(finished)
        log.info("run %s, %s: update of %d bytes committed and released", key.run, key.at, len(finished.payload))
        return finished.payload

    def _settled_state(self, request: Request) -> bytes | None:
        base = None if request.base is None else AttemptId(*request.base)
        if (refused := self._gate.settle(request.run, base)) is not None:
            raise _refusal(refused)
        return self._gate.state(request.run)

    async def _at_gate(self, call: Callable[..., T], *args: Any) -> T:
        """One gate call at a time, in a thread: it waits for the disk."""
        async with self._gate_lock:
            return await asyncio.shield(asyncio.to_thread(call, *args))


class ForeignSite:
    """Answers messages of somebody else's Flower App: no gate, and memory that ends with this process.

    Args:
        crew: where the app runs.
        node_config: what the app is told of this site.
        run_config: the app's own defaults, under what the coordinator says of a run.
    """

    def __init__(self, crew: Crew, node_config: Mapping[str, Any], run_config: Mapping[str, Any] | None = None) -> None:
        self._crew, self._node_config, self._run_config = crew, dict(node_config), dict(run_config or {})
        self._states: OrderedDict[int, bytes] = OrderedDict()

    async def handle(self, message: Message) -> Message:
        run = message.metadata.run_id
        told = message.content.pop(RUN_CONFIG, None) if message.has_content() else None
        config = self._run_config | (dict(told) if isinstance(told, ConfigRecord) else {})
        state = self._states.get(run)
        reply, state = await compute(self._crew, message, str(run), state, self._node_config, config)
        if state is not None:
            self._states[run] = state
            self._states.move_to_end(run)
            while len(self._states) > FOREIGN_STATES:
                self._states.popitem(last=False)
        return reply


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


def _check_broadcast(message: Message, request: Request) -> None:
    """The key of a release names the broadcast that it answers: the broadcast must be what it says."""
    whole = messages.decode_request(message.content)
    digest = broadcast_digest(ServerState(whole.model, whole.shared))
    if digest != request.model_digest:
        raise RemoteProtocolError(
            f"message: its model and shared arrays have the digest {digest[:16]}, it says {request.model_digest[:16]}"
        )


def _key(request: Request) -> ReleaseKey:
    try:
        return ReleaseKey(request.run, request.round, request.attempt, TRAIN, request.model_digest)
    except ValueError as error:
        raise RemoteProtocolError(f"message: {error}") from None


def _granted(answer: Reserved | Refused) -> Reserved:
    if isinstance(answer, Refused):
        raise _refusal(answer)
    return answer


def _refusal(refused: Refused) -> PolicyRefusedError:
    return PolicyRefusedError(f"gate: {refused.reason.value}: {refused.message}")
