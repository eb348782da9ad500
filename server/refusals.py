"""Which clients do not take part in a run, and why: said once each, and counted before anybody is made to train for nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedlearn import events
from fedlearn.learning.backend import Failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedlearn.events import Emit

REASON_LIMIT: Final = 1_000
"""Characters of a client's reason that are kept; it is shown to people."""
FIRST_NOTE_S: Final = 10.0
LAST_NOTE_S: Final = 600.0
"""While clients are missing this is said at once, when it changes, after so long, and then in intervals that double up to this."""


def reason_of(text: str | None) -> str:
    """A client's own words as they may be shown: no longer than `REASON_LIMIT`, without what a terminal would obey."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in (text or "")[:REASON_LIMIT])
    return shown.strip() or "an error without a reason"


@dataclass
class Refusals:
    """Of one run, in this process. A coordinator that was restarted asks once more, which costs nobody anything.

    Args:
        run: the run's name.
        emit: is told of each refusal once; None tells nobody.
    """

    run: str
    emit: Emit | None = None
    nodes: dict[int, Failed] = field(default_factory=dict)
    """Connected nodes that would not say who they are, or not take part; by node id."""
    gone: dict[str, Failed] = field(default_factory=dict)
    """Clients that took part and will not any more, by name: also when they connect anew."""
    part: set[str] = field(default_factory=set)
    """Clients that took part at any time."""
    _leaving: dict[str, Failed] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)
    _waiting: tuple[int, int, int] | None = None
    _interval_s: float = FIRST_NOTE_S
    _next_note_s: float = 0.0

    def refuse(self, node: int, failed: Failed) -> None:
        """A node does not take part."""
        self.nodes[node] = failed
        self._say(failed)

    def leave(self, failed: Failed) -> None:
        """A client said in a round that it will answer nothing more; that round's record says so too."""
        self.gone[failed.client] = failed
        self._told[failed.client] = failed.reason

    def leave_after(self, failed: Failed) -> None:
        """A client's update was its last: it is still asked for what belongs to that attempt."""
        self._leaving[failed.client] = failed

    def settle(self) -> None:
        """An attempt is over: those whose last update it was are gone."""
        for _, failed in sorted(self._leaving.items()):
            self.gone.setdefault(failed.client, failed)
            self._say(failed)
        self._leaving.clear()

    @property
    def all(self) -> Sequence[Failed]:
        """Those that are here or were here, and do not take part."""
        found = {failed.client: failed for failed in self.nodes.values()} | self.gone
        return [found[client] for client in sorted(found)]

    @property
    def could_come(self) -> int | None:
        """How many of those who took part still may, here or away; None while nobody has refused for good."""
        out = self.gone.keys() | self._leaving.keys()
        return len(self.part - out) if out else None

    def waits(self, here: int, needed: int, left_s: float, now_s: float) -> float:
        """Clients are missing: say so if it is time to; seconds until it is time again."""
        if self.emit is None:
            return left_s
        seen = (here, needed, len(self.all))
        if seen != self._waiting:
            self._waiting, self._interval_s, self._next_note_s = seen, FIRST_NOTE_S, now_s
        if now_s >= self._next_note_s:
            self.emit(events.RunWaiting(self.run, here, needed, left_s))
            self._next_note_s = now_s + self._interval_s
            self._interval_s = min(2 * self._interval_s, LAST_NOTE_S)
        return self._next_note_s - now_s

    def _say(self, failed: Failed) -> None:
        if self.emit is not None and self._told.get(failed.client) != failed.reason:
            self.emit(events.ClientRefused(self.run, failed.client, failed.reason, failed.permanent))
        self._told[failed.client] = failed.reason
