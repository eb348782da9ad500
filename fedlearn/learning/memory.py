"""A client's memory between rounds (SCAFFOLD's control variate, Ditto's personal model), and when it moves on."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlearn.arrays import Arrays
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
        """The state to continue from; candidates that were passed over are dropped."""
        if base is not None and base in self.candidates:
            self.base, self.state = base, self.candidates[base]
        self.candidates.clear()
        return self.state

    def peek(self, base: Base | None) -> Arrays:
        """The state at a base, without a decision on the candidates."""
        return self.candidates.get(base, self.state) if base is not None else self.state
