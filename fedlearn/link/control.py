"""What people ask of a coordinator: the values, the server side as a Protocol, and a synchronous client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from fedlearn.link.limits import LinkLimits

if TYPE_CHECKING:
    from fedlearn.link.server import Node
    from fedlearn.link.tls import Identity, TlsBundle


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
    """Synchronous calls to a coordinator. A context manager; safe to use from one thread."""

    def __init__(
        self, address: str, tls: TlsBundle, limits: LinkLimits | None = None, *, timeout_s: float = 30.0
    ) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""

    def submit(self, study: str, overrides: Sequence[str] = ()) -> str:
        """Submit a study (TOML text); return the run's id."""
        raise NotImplementedError

    def stop(self, run_id: str) -> RunSummary:
        """Stop a run."""
        raise NotImplementedError

    def runs(self) -> list[RunSummary]:
        """All runs that the caller may see, newest first."""
        raise NotImplementedError

    def show(self, run_id: str) -> RunDetail:
        """One run."""
        raise NotImplementedError

    def watch(self, run_id: str, start: int = 0) -> Iterator[tuple[int, str]]:
        """(index, event as JSON) from `start` on, live; ends with the run. A lost connection is dialled again."""
        raise NotImplementedError

    def model(self, run_id: str, out: Path) -> Path:
        """Fetch the model into folder `out`; its SHA-256 is checked before the file gets its name."""
        raise NotImplementedError

    def nodes(self) -> list[Node]:
        """The clients that the server knows."""
        raise NotImplementedError
