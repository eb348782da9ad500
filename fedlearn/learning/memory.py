"""A client's memory between rounds (SCAFFOLD's control variate, Ditto's personal model), and when it moves on."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlearn.arrays import Arrays
from fedlearn.errors import StateError
from fedlearn.learning.backend import Base


@dataclass
class ClientMemory:
    """One client's memory: what it was at its base, and the candidates since.

    A candidate becomes the base only when the server says that the update it came with entered a committed sum. So a void
    or rejected attempt leaves no trace.
    """

    base: Base | None = None
    state: Arrays = field(default_factory=dict, repr=False)
    candidates: dict[Base, Arrays] = field(default_factory=dict, repr=False)

    def at(self, base: Base | None) -> Arrays:
        """The state to continue from; candidates that were passed over are dropped.

        Raises:
            StateError: the server counts on a state that is not here; nothing has changed.
        """
        state = self.peek(base)
        self.base, self.state = base, state
        self.candidates.clear()
        return state

    def peek(self, base: Base | None) -> Arrays:
        """The state at a base, without a decision on the candidates.

        Raises:
            StateError: it is not here.
        """
        if base == self.base:
            return self.state
        if base is None or base not in self.candidates:
            raise StateError(
                f"client memory: the server continues from {_named(base)}, this client has {_named(self.base)}",
                hint="the client lost its memory of this run, or the server resumed an older state",
            )
        return self.candidates[base]


def _named(base: Base | None) -> str:
    return "no round" if base is None else f"round {base[0]} attempt {base[1]}"
