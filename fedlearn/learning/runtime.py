"""What a coordinator lends to a ServerApp that can use it: checkpoints, a journal, an event sink, and the wish to stop.

The coordinator sets it as the attribute `runtime` of the grid that it passes; on stock Flower, and for apps that know
nothing of it, the attribute is absent: `getattr(grid, "runtime", None)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlearn.events import Emit
from fedlearn.release.journal import Journal


@dataclass(frozen=True)
class Checkpoint:
    """The state after a committed round.

    Args:
        round: rounds committed so far.
        attempt: the attempt that committed it.
        arrays: safetensors bytes of the server's state.
        facts: JSON object: history and whatever else the loop needs to go on.
    """

    round: int
    attempt: int
    arrays: bytes = field(repr=False)
    facts: Mapping[str, Any]


class Checkpoints(Protocol):
    """Checkpoints of one run. What `save` returned from survives a kill -9 and a loss of power."""

    def load(self) -> Checkpoint | None:
        """The newest checkpoint; None before the first."""
        ...

    def save(self, round_: int, attempt: int, arrays: bytes, facts: Mapping[str, Any]) -> None:
        """Commit a round: its record and its checkpoint in one transaction.

        Args:
            round_: rounds committed so far, this one included; 0 for the state before the first.
            attempt: the attempt that made it, from 1.
            arrays: safetensors bytes.
            facts: a JSON object.

        Raises:
            StateError: the round is not after the newest checkpoint's, or the disk refused.
        """
        ...

    def finish(self, model: bytes, facts: Mapping[str, Any]) -> None:
        """Keep the final model (safetensors bytes, weights alone), to be fetched by the run's clients and operators."""
        ...


@dataclass(frozen=True)
class RunRuntime:
    """One run's place at the coordinator.

    Args:
        run_id: the run's id as people see it.
        study_text: the submitted study, TOML.
        overrides: `key=value`, applied in order.
        checkpoints: where committed rounds go.
        emit: takes events; never blocks.
        journal: durable records of the release path for this run alone.
        should_stop: True when somebody asked the run to stop; asked between rounds.
        client_name: node id to the name in that client's certificate.
    """

    run_id: str
    study_text: str
    overrides: tuple[str, ...]
    checkpoints: Checkpoints
    emit: Emit
    journal: Journal
    should_stop: Callable[[], bool]
    client_name: Callable[[int], str]
