"""What of a round is written down: what each reply claims, and the rows of the history."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from fedlearn import events
from fedlearn.learning.backend import Failed, Fitted, Said, Summed


def claims_of(reply: Fitted | Summed | Said | Failed) -> Iterator[tuple[str, Mapping[str, float], int]]:
    """Each client of a reply, with its facts and training examples."""
    match reply:
        case Fitted(client, update):
            yield client, update.facts, update.examples
        case Said(client):
            yield client, {}, 0
        case Summed(partial, facts):
            yield from ((client, facts[client], examples) for client, examples in partial.examples.items())
        case Failed(client):
            yield client, {}, 0


def row_of(event: events.RoundFinished | events.Evaluated) -> bytes:
    """A round's record, or its evaluation's: the event without what its place says already."""
    row = events.to_dict(event, 0.0)
    for key in ("event", "at", "run", "round"):
        row.pop(key)
    row.update(row.pop("environment", {}))
    if isinstance(event, events.Evaluated):
        row = {"metrics": row["mean"], "clients_metrics": row["clients"]}
    return json.dumps(row, sort_keys=True).encode()
