"""What a simulation may imagine around a round: who can be asked, and what the round would have cost. A real federation has a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedlearn.release.keys import AttemptId


class Conditions(Protocol):
    """Pure but for what `resume` is told: asked again, it says the same."""

    def resume(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Go on after these committed rounds; none in a new run."""
        ...

    def cohort(self, at: AttemptId) -> tuple[str, ...]:
        """Who is asked in this attempt, sorted.

        Raises:
            RunFailedError: too few clients can be.
        """
        ...

    def facts(self, at: AttemptId) -> Mapping[str, float]:
        """Columns of the history for the round that ended with this attempt."""
        ...
