"""What a site is not told of a run that protects clients: who was drawn, and how many.

The epsilon that is claimed against other sites holds while a cohort's members and size stay hidden (`fedlearn.privacy.claims.HIDDEN_COHORT`), so a
site sees what the model's reader sees and no more. An operator, who runs the coordinator, sees everything in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from fedlearn import events
from fedlearn.privacy.plan import Unit

_COLUMNS: Final = ("clients", "dropped", "seconds")
"""Of a round. Its seconds grow with its cohort."""
UNTOLD: Final = "the coordinator's operator sees why"
"""In place of a reason, which may name who was drawn."""


def hides_cohorts(statement: Mapping[str, Any] | None) -> bool:
    """Whether a run with this statement of its privacy protects clients."""
    return statement is not None and statement["unit"] == Unit.CLIENT.value


def event_for_site(event: events.Event) -> events.Event | None:
    """What a site may see of an event; None for nothing at all."""
    match event:
        case events.RoundStarted() | events.ClientFinished() | events.ClientDropped() | events.SumOpened():
            return None
        case events.ClientRefused() | events.RunWaiting():
            return None
        case events.RunStarted():
            return replace(event, clients=(), population=0)
        case events.RoundFinished():
            return replace(event, clients=0, dropped=0, seconds=0.0)
        case events.RoundVoid():
            return replace(event, reason="")
        case events.RunFailed():
            return replace(event, reason=UNTOLD, hint="")
    return event


def row_for_site(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a site may see of a round's record."""
    return {key: value for key, value in row.items() if key not in _COLUMNS}
