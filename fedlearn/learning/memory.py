"""A client's memory between rounds (SCAFFOLD's control variate, Ditto's personal model), and when it moves on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

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
            raise missing_base(base, self.base)
        return self.candidates[base]


class Memories(Protocol):
    """The memories of a simulation's clients. Calls for different clients may come from different threads."""

    def at(self, client: str, base: Base | None) -> Arrays:
        """As `ClientMemory.at`."""
        ...

    def peek(self, client: str, base: Base | None) -> Arrays:
        """As `ClientMemory.peek`."""
        ...

    def keep(self, client: str, made: Base, state: Arrays) -> None:
        """A candidate that was made in (round, attempt)."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class MemoriesInRam:
    """All of them in this process, gone with it."""

    def __init__(self) -> None:
        self._memories: dict[str, ClientMemory] = {}

    def at(self, client: str, base: Base | None) -> Arrays:
        return self._of(client).at(base)

    def peek(self, client: str, base: Base | None) -> Arrays:
        return self._of(client).peek(base)

    def keep(self, client: str, made: Base, state: Arrays) -> None:
        self._of(client).candidates[made] = state

    def close(self) -> None:
        self._memories.clear()

    def _of(self, client: str) -> ClientMemory:
        return self._memories.setdefault(client, ClientMemory())


def missing_base(wanted: Base | None, have: Base | None) -> StateError:
    """The error for a server that counts on a state which a client does not have."""
    return StateError(
        f"client memory: the server continues from {_named(wanted)}, this client has {_named(have)}",
        hint="the client lost its memory of this run, or the server resumed an older state",
    )


def _named(base: Base | None) -> str:
    return "no round" if base is None else f"round {base[0]} attempt {base[1]}"
