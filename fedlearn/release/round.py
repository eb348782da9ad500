"""The values of the coordinator's round machine: its states and transitions, what it answers, what plugs into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final, Protocol, TypeVar

from fedlearn.release.journal import damaged, pack, unpack
from fedlearn.release.keys import AttemptId, ReleaseKey


@unique
class RoundState(Enum):
    """Where an attempt at a round stands."""

    IDLE = "idle"  # nothing was begun
    OPEN = "open"  # the roster is durable; payloads enter the sum
    REFILL = "refill"  # a crash lost the sum after the survivors were durable: exactly theirs must come again
    UNMASKING = "unmasking"  # the survivors are durable; masks are taken off the sum
    SUMMED = "summed"  # the sum of exactly the survivors' payloads can be read
    COMMITTED = "committed"  # the round's record is durable; the next round may begin
    VOID = "void"  # the attempt was given up; the next attempt may begin
    FAILED = "failed"  # the run is over without a model


ROUND_TRANSITIONS: Final[Mapping[RoundState, frozenset[RoundState]]] = {
    RoundState.IDLE: frozenset({RoundState.OPEN, RoundState.FAILED}),
    RoundState.OPEN: frozenset({RoundState.UNMASKING, RoundState.SUMMED, RoundState.VOID, RoundState.FAILED}),
    RoundState.REFILL: frozenset({RoundState.UNMASKING, RoundState.SUMMED, RoundState.VOID, RoundState.FAILED}),
    RoundState.UNMASKING: frozenset({RoundState.SUMMED, RoundState.VOID, RoundState.FAILED}),
    RoundState.SUMMED: frozenset({RoundState.COMMITTED, RoundState.VOID, RoundState.FAILED}),
    RoundState.COMMITTED: frozenset({RoundState.OPEN, RoundState.FAILED}),
    RoundState.VOID: frozenset({RoundState.OPEN, RoundState.FAILED}),
    RoundState.FAILED: frozenset(),
}


@unique
class Rejection(Enum):
    """Why a payload does not enter the sum. The round goes on without it."""

    UNKNOWN_CLIENT = "unknown-client"  # not on the attempt's roster
    WRONG_KEY = "wrong-key"  # another run, round, attempt, exchange or model
    CLOSED = "closed"  # the survivors stand, or the attempt is over
    NOT_SURVIVOR = "not-survivor"  # the survivors stand, without this client
    CHANGED = "changed"  # not the bytes that this client sent before under the same key
    INVALID = "invalid"  # not finite, out of range, of another shape
    TOO_LARGE = "too-large"  # exceeds the named limit


@dataclass(frozen=True)
class Attempt:
    """What is durable of one attempt.

    Args:
        key: its name.
        roster: the clients that were asked, sorted.
        survivors: by client, sorted, the checksum of the payload that is in the sum; None while the attempt is open.
        state: OPEN, COMMITTED or VOID; the states between are in memory.
        reason: why it is void.
    """

    key: ReleaseKey
    roster: tuple[str, ...]
    survivors: Mapping[str, str] | None
    state: RoundState
    reason: str = ""

    def to_record(self) -> bytes:
        """The journal's bytes."""
        return pack({**self.__dict__, "key": self.key.__dict__, "state": self.state.value})

    @classmethod
    def from_record(cls, data: bytes, *, what: str) -> Attempt:
        """Read the journal's bytes.

        Raises:
            StateError: they are damaged.
        """
        fields = unpack(data, what=what)
        try:
            fields["key"] = ReleaseKey(**fields["key"])
            fields["roster"] = tuple(fields["roster"])
            fields["state"] = RoundState(fields["state"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(what, repr(error)) from None


@dataclass(frozen=True)
class Accepted:
    """The payload is in the sum."""


@dataclass(frozen=True)
class Duplicate:
    """The same payload is in the sum already; it was not added again."""


@dataclass(frozen=True)
class Rejected:
    """Not in the sum; nothing else is touched."""

    reason: Rejection
    message: str


@dataclass(frozen=True)
class Begin:
    """Call `begin` for this attempt."""

    at: AttemptId


@dataclass(frozen=True)
class Resume:
    """An attempt is under way: ask every client in `waiting` again, with the same key; it resends the same bytes.

    Args:
        key: the attempt's key.
        roster: the clients that were asked, sorted.
        survivors: those whose payloads make the sum, sorted; None while it is open.
    """

    key: ReleaseKey
    roster: tuple[str, ...]
    survivors: tuple[str, ...] | None


@dataclass(frozen=True)
class Failed:
    """The run is over without a model."""

    reason: str


@dataclass(frozen=True)
class RoundPolicy:
    """What the coordinator allows.

    Args:
        min_survivors: fewer payloads than this make an attempt void. 0: an empty sum is one too, and nobody need be asked.
        max_attempts: attempts at one round; when the last is void the run has failed.
        payload_limit_bytes: the largest payload, or answer to an unmask request, of one client.
        roster_limit: the most clients of one attempt.
    """

    min_survivors: int = 1
    max_attempts: int = 3
    payload_limit_bytes: int = 2 * 1024**3 - 1
    roster_limit: int = 1_000_000


P_contra = TypeVar("P_contra", contravariant=True)
A_contra = TypeVar("A_contra", contravariant=True)


class Accumulator(Protocol[P_contra]):
    """A running sum of one attempt. A new one is made for every attempt and after every crash."""

    def add(self, client: str, payload: P_contra, /) -> None:
        """Add one client's payload, or raise and be as before.

        Raises:
            UpdateError: not finite, out of range, or of another shape.
        """
        ...


class Masking(Protocol[A_contra]):
    """Takes masks off a sum. One object for every attempt and after every crash; secure aggregation plugs in here."""

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:
        """What to ask of whom before the sum can be read; empty when there are no masks.

        A pure function of its arguments and of what was durable before: after a crash the same requests are sent again.

        Raises:
            UpdateError, RemoteProtocolError: these survivors' sum cannot be opened; the attempt is void.
        """
        ...

    def answer(self, client: str, answer: bytes) -> None:
        """One client's answer.

        Raises:
            RemoteProtocolError: it cannot be used; nothing changed.
        """
        ...

    def ready(self) -> bool:
        """True when the answers suffice."""
        ...

    def unmask(self, total: A_contra, /) -> None:
        """Take the masks off the sum.

        Raises:
            UpdateError, RemoteProtocolError: the answers do not open it; the attempt is void.
        """
        ...


class NoMasking:
    """Sums are plain: nothing is asked."""

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:  # noqa: ARG002  # protocol
        return {}

    def answer(self, client: str, answer: bytes) -> None:
        """Never called: nobody is asked."""

    def ready(self) -> bool:
        return True

    def unmask(self, total: object, /) -> None:
        """Nothing to take off."""
