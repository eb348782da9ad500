"""What people ask of a coordinator: the values, the server side as a Protocol, and a synchronous client."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import grpc

from fedlearn import errors
from fedlearn.errors import FedlearnError, LimitExceededError, LinkError, RemoteProtocolError, TlsError
from fedlearn.link import wire
from fedlearn.link.limits import LinkLimits
from fedlearn.proto import control_pb2 as pb

if TYPE_CHECKING:
    from fedlearn.link.server import Node
    from fedlearn.link.tls import Identity, TlsBundle

FAULT_KEY: Final = "fedlearn-fault-bin"


@dataclass(frozen=True)
class RunSummary:
    """One line of the list of runs. `submitted_at` is seconds since 1970-01-01 UTC."""

    run_id: str
    name: str
    status: str
    round: int
    rounds: int
    submitted_at: float


@dataclass(frozen=True)
class RunDetail:
    """One run; `detail_json` is a JSON object with whatever the coordinator records."""

    summary: RunSummary
    detail_json: str


@dataclass(frozen=True)
class ModelFile:
    """A model to be fetched: a file of the coordinator and the name that the receiver sees."""

    path: Path
    file_name: str


class ControlHandlers(Protocol):
    """The coordinator's side. A `FedlearnError` that a method raises reaches the caller as the same class.

    Roles are checked before a method is called (submit and stop: operators only; the rest: operators and clients).
    `runs`, `show`, `watch` and `model` must refuse a CLIENT the runs that it took no part in.
    """

    async def submit(self, caller: Identity, study: str, overrides: Sequence[str]) -> str:
        """Start a run of the study (TOML text); return its id."""
        ...

    async def stop(self, caller: Identity, run_id: str) -> RunSummary:
        """Stop a run."""
        ...

    async def runs(self, caller: Identity) -> Sequence[RunSummary]:
        """All runs, newest first."""
        ...

    async def show(self, caller: Identity, run_id: str) -> RunDetail:
        """One run."""
        ...

    def watch(self, caller: Identity, run_id: str, start: int) -> AsyncIterator[tuple[int, str]]:
        """(index, event as JSON) from index `start` on; ends with the run."""
        ...

    async def model(self, caller: Identity, run_id: str) -> ModelFile:
        """The run's model; the file may not change while it is sent."""
        ...


class ControlClient:
    """Synchronous calls to a coordinator. A context manager; safe to use from one thread.

    Every method raises `LinkError` when the server cannot be reached, `TlsError` when a certificate is refused, and
    whatever `FedlearnError` the coordinator answered with.

    Args:
        address: `host:port` of the coordinator.
        tls: a bundle of role OPERATOR, or CLIENT for what a client may see.
        limits: the named limits.
        timeout_s: for one call; a watch and a model's transfer have no end of their own.
    """

    def __init__(
        self,
        address: str,
        tls: TlsBundle,
        limits: LinkLimits | None = None,
        *,
        timeout_s: float = 30.0,
    ) -> None:
        wire.split_address(address)
        self.address = address
        self._tls = tls
        self._limits = limits or LinkLimits()
        self._timeout_s = timeout_s
        credentials = grpc.ssl_channel_credentials(tls.ca_pem, tls.key_pem, tls.cert_pem)
        self._channel: Any = grpc.secure_channel(address, credentials, wire.client_options(self._limits, address))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def submit(self, study: str, overrides: Sequence[str] = ()) -> str:
        """Submit a study (TOML text); return the run's id."""
        if len(study.encode()) > self._limits.study_bytes:
            raise LimitExceededError(
                f"study: {len(study.encode())} bytes, limit study_bytes is {self._limits.study_bytes}"
            )
        request = pb.SubmitRunRequest(study=study, overrides=list(overrides))
        return str(self._call("SubmitRun", request, pb.SubmitRunResponse).run_id)

    def stop(self, run_id: str) -> RunSummary:
        """Stop a run."""
        return summary_from_proto(self._call("StopRun", pb.RunRequest(run_id=run_id), pb.RunSummary))

    def runs(self) -> list[RunSummary]:
        """All runs that the caller may see, newest first."""
        reply = self._call("ListRuns", pb.ListRunsRequest(), pb.ListRunsResponse)
        return [summary_from_proto(run) for run in reply.runs]

    def show(self, run_id: str) -> RunDetail:
        """One run."""
        reply = self._call("ShowRun", pb.RunRequest(run_id=run_id), pb.RunDetail)
        return RunDetail(summary_from_proto(reply.summary), reply.detail_json)

    def watch(self, run_id: str, start: int = 0) -> Iterator[tuple[int, str]]:
        """(index, event as JSON) from `start` on, live; ends with the run.

        A lost connection raises `LinkError`; watch again from the index after the last one that came.
        """
        request = pb.WatchRunRequest(run_id=run_id, start=start)
        for event in self._stream("WatchRun", request, pb.RunEvent):
            yield event.index, event.event_json

    def model(self, run_id: str, out: Path) -> Path:
        """Fetch the model into folder `out`; it gets its name only after its SHA-256 was checked.

        Raises:
            RemoteProtocolError: size or digest differ from what was announced, or the name is not a plain file name.
        """
        chunks = self._stream("GetModel", pb.RunRequest(run_id=run_id), pb.ModelChunk)
        first = next(chunks, None)
        if first is None or not first.file_name or Path(first.file_name).name != first.file_name:
            raise RemoteProtocolError(
                f"model: got the file name {getattr(first, 'file_name', None)!r}, expected a plain one"
            )
        if first.size_bytes > self._limits.model_bytes:
            raise LimitExceededError(
                f"model: {first.size_bytes} bytes, limit model_bytes is {self._limits.model_bytes}"
            )
        out.mkdir(parents=True, exist_ok=True)
        target = out / str(first.file_name)
        part = target.with_name(target.name + ".part")
        digest, size = hashlib.sha256(), 0
        try:
            with part.open("wb") as file:
                for data in _datas(first, chunks):
                    size += len(data)
                    if size > first.size_bytes:
                        break
                    digest.update(data)
                    file.write(data)
            if (size, digest.hexdigest()) != (first.size_bytes, first.sha256):
                raise RemoteProtocolError(
                    f"model: got {size} bytes with SHA-256 {digest.hexdigest()[:12]},"
                    f" expected {first.size_bytes} with {first.sha256[:12]}",
                    hint="fetch it again",
                )
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def nodes(self) -> list[Node]:
        """The clients that the server knows."""
        from fedlearn.link.server import Node

        reply = self._call("ListNodes", pb.ListNodesRequest(), pb.ListNodesResponse)
        return [Node(n.node_id, n.client_id, n.connected, dict(n.facts)) for n in reply.nodes]

    def _call(self, method: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            f"/{wire.CONTROL_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            return call(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error) from None

    def _stream(self, method: str, request: Any, response: Any) -> Iterator[Any]:
        call = self._channel.unary_stream(
            f"/{wire.CONTROL_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )(request)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._explained(error) from None
        finally:
            call.cancel()

    def _explained(self, error: Any) -> FedlearnError:
        fault = next((value for key, value in error.trailing_metadata() or () if key == FAULT_KEY), None)
        if fault is not None:
            return fault_to_error(fault)
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE:
            try:
                wire.probe(self.address, self._tls)
            except TlsError as refusal:
                return refusal
            return LinkError(f"{self.address}: cannot be reached", hint="is the server running, and the address right?")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return LinkError(f"{self.address}: no answer within {self._timeout_s:g} s")
        return LinkError(f"{self.address}: {code.name.lower()}: {error.details()}")


def _datas(first: Any, chunks: Iterator[Any]) -> Iterator[bytes]:
    yield first.data
    for chunk in chunks:
        yield chunk.data


def summary_from_proto(proto: Any) -> RunSummary:
    """A run's line from the wire."""
    return RunSummary(proto.run_id, proto.name, proto.status, proto.round, proto.rounds, proto.submitted_at)


def summary_to_proto(summary: RunSummary) -> Any:
    """A run's line for the wire."""
    return pb.RunSummary(**vars(summary))


def error_to_fault(error: FedlearnError) -> bytes:
    """An error for the trailing metadata."""
    # Metadata is small by nature, so long texts are cut.
    fault: bytes = pb.ControlFault(
        kind=error.kind, message=error.message[:2_000], hint=error.hint[:1_000]
    ).SerializeToString()
    return fault


def fault_to_error(fault: bytes) -> FedlearnError:
    """The inverse of `error_to_fault`; a kind that this version does not know becomes a `FedlearnError`."""
    proto = pb.ControlFault.FromString(fault)
    return _kinds().get(proto.kind, FedlearnError)(proto.message, hint=proto.hint)


def _kinds() -> dict[str, Callable[..., FedlearnError]]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FedlearnError)]
    # Of a family that shares a kind, the class that says it stands for all.
    return {c.kind: c for c in reversed(classes)}
