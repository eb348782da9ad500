"""The gRPC side of `ControlHandlers`: who may call what, values to and from protobuf, errors to the caller."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from fedlearn.errors import FedlearnError, LimitExceededError, PolicyRefusedError, TlsError
from fedlearn.link import wire
from fedlearn.link.control import FAULT_KEY, error_to_fault, summary_to_proto
from fedlearn.link.tls import Identity, Role
from fedlearn.proto import control_pb2 as pb

if TYPE_CHECKING:
    from fedlearn.link.control import ControlHandlers
    from fedlearn.link.limits import LinkLimits
    from fedlearn.link.server import Node

_OPERATOR: Final = frozenset({Role.OPERATOR})
_ANYBODY: Final = frozenset({Role.OPERATOR, Role.CLIENT})


def control_handler(
    handlers: ControlHandlers, nodes: Callable[[], tuple[Node, ...]], limits: LinkLimits
) -> grpc.GenericRpcHandler:
    """The Control service, to be added to a gRPC server."""
    service = _Control(handlers, nodes, limits)
    unary = {
        "SubmitRun": (service.submit, pb.SubmitRunRequest, _OPERATOR),
        "StopRun": (service.stop, pb.RunRequest, _OPERATOR),
        "ListRuns": (service.runs, pb.ListRunsRequest, _ANYBODY),
        "ShowRun": (service.show, pb.RunRequest, _ANYBODY),
        "ListNodes": (service.nodes, pb.ListNodesRequest, _OPERATOR),
    }
    streams = {
        "WatchRun": (service.watch, pb.WatchRunRequest, _ANYBODY),
        "GetModel": (service.model, pb.RunRequest, _ANYBODY),
    }
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            _unary(call, roles),
            request_deserializer=request.FromString,
            response_serializer=_serialize,
        )
        for name, (call, request, roles) in unary.items()
    } | {
        name: grpc.unary_stream_rpc_method_handler(
            _stream(call, roles),
            request_deserializer=request.FromString,
            response_serializer=_serialize,
        )
        for name, (call, request, roles) in streams.items()
    }
    return grpc.method_handlers_generic_handler(wire.CONTROL_SERVICE, methods)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _admit(context: Any, roles: frozenset[Role]) -> Identity:
    caller = wire.peer_identity(context.auth_context())
    if caller.role not in roles:
        allowed = " or ".join(sorted(role.value for role in roles))
        raise PolicyRefusedError(f"{caller.uri} may not do this", hint=f"it takes a certificate of the role {allowed}")
    return caller


async def _fail(context: Any, error: FedlearnError) -> None:
    code = (
        grpc.StatusCode.PERMISSION_DENIED
        if isinstance(error, PolicyRefusedError | TlsError)
        else grpc.StatusCode.ABORTED
    )
    await context.abort(code, error.kind, ((FAULT_KEY, error_to_fault(error)),))


def _unary(
    call: Callable[[Identity, Any], Awaitable[Any]], roles: frozenset[Role]
) -> Callable[[Any, Any], Awaitable[Any]]:
    async def handle(request: Any, context: Any) -> Any:
        try:
            return await call(_admit(context, roles), request)
        except FedlearnError as error:
            await _fail(context, error)

    return handle


def _stream(
    call: Callable[[Identity, Any], AsyncGenerator[Any, None]], roles: frozenset[Role]
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            # Closed here and now when the caller hangs up, not whenever memory is collected.
            async with contextlib.aclosing(call(_admit(context, roles), request)) as items:
                async for item in items:
                    yield item
        except FedlearnError as error:
            await _fail(context, error)

    return handle


class _Control:
    def __init__(self, handlers: ControlHandlers, nodes: Callable[[], tuple[Node, ...]], limits: LinkLimits) -> None:
        self._handlers = handlers
        self._nodes = nodes
        self._limits = limits

    async def submit(self, caller: Identity, request: Any) -> Any:
        size = len(request.study.encode()) + sum(len(o.encode()) for o in request.overrides)
        if size > self._limits.study_bytes:
            raise LimitExceededError(f"study: {size} bytes, limit study_bytes is {self._limits.study_bytes}")
        run_id = await self._handlers.submit(caller, request.study, tuple(request.overrides))
        return pb.SubmitRunResponse(run_id=run_id)

    async def stop(self, caller: Identity, request: Any) -> Any:
        return summary_to_proto(await self._handlers.stop(caller, request.run_id))

    async def runs(self, caller: Identity, _request: Any) -> Any:
        return pb.ListRunsResponse(runs=[summary_to_proto(run) for run in await self._handlers.runs(caller)])

    async def show(self, caller: Identity, request: Any) -> Any:
        detail = await self._handlers.show(caller, request.run_id)
        return pb.RunDetail(summary=summary_to_proto(detail.summary), detail_json=detail.detail_json)

    async def nodes(self, _caller: Identity, _request: Any) -> Any:
        return pb.ListNodesResponse(
            nodes=[
                pb.Node(node_id=n.node_id, client_id=n.client_id, connected=n.connected, facts=dict(n.facts))
                for n in self._nodes()
            ]
        )

    async def watch(self, caller: Identity, request: Any) -> AsyncGenerator[Any, None]:
        watched = self._handlers.watch(caller, request.run_id, request.start)
        try:
            async for index, event in watched:
                yield pb.RunEvent(index=index, event_json=event)
        finally:
            if isinstance(watched, AsyncGenerator):
                await watched.aclose()

    async def model(self, caller: Identity, request: Any) -> AsyncGenerator[Any, None]:
        model = await self._handlers.model(caller, request.run_id)
        size, sha256 = await asyncio.to_thread(_digest, model.path, self._limits.chunk_bytes)
        if size > self._limits.model_bytes:
            raise LimitExceededError(f"model: {size} bytes, limit model_bytes is {self._limits.model_bytes}")
        yield pb.ModelChunk(file_name=model.file_name, size_bytes=size, sha256=sha256)
        with model.path.open("rb") as file:  # in a thread a cancelled call would leave it open
            while data := await asyncio.to_thread(file.read, self._limits.chunk_bytes):
                yield pb.ModelChunk(data=data)


def _digest(path: Path, block_bytes: int) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(block_bytes):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()
