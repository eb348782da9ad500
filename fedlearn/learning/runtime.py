"""What a coordinator lends to a ServerApp that can use it: a journal, a place for the model, an event sink, and the wish to stop.

The coordinator sets it as the attribute `runtime` of the grid that it passes; on stock Flower, and for apps that know
nothing of it, the attribute is absent: `getattr(grid, "runtime", None)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedlearn.events import Emit
from fedlearn.learning.heads import HeadMemory
from fedlearn.release.journal import Journal


class ModelSink(Protocol):
    """Where a run's final model goes. Rounds and their checkpoints are in the journal."""

    def finish(self, model: bytes, facts: Mapping[str, Any]) -> None:
        """Keep the final model, to be fetched by the run's clients and operators.

        Args:
            model: safetensors bytes, weights alone.
            facts: a JSON object about it.

        Raises:
            StateError: the disk refused.
        """
        ...


@dataclass(frozen=True)
class RunRuntime:
    """One run's place at the coordinator.

    Args:
        run_id: the run's id as people see it.
        study_text: the submitted study, TOML.
        overrides: `key=value`, applied in order.
        checkpoints: where the final model goes.
        emit: takes events; never blocks.
        journal: durable records of this run alone: every round, its checkpoint, and what the release path keeps.
        should_stop: True when somebody asked the run to stop; asked between rounds.
        client_name: node id to the name in that client's certificate.
        heads: of the sites' ledgers, over all runs; None where nobody remembers any.
        authority_pem: the certificate of who certifies clients; empty where nobody does.
        closing: number of attempts to this end's signed word that the run is over after so many; None where nobody signs.
    """

    run_id: str
    study_text: str
    overrides: tuple[str, ...]
    checkpoints: ModelSink
    emit: Emit
    journal: Journal
    should_stop: Callable[[], bool]
    client_name: Callable[[int], str]
    heads: HeadMemory | None = None
    authority_pem: bytes = field(default=b"", repr=False)
    closing: Callable[[int], bytes] | None = None
