"""The values of the site's gate: what it keeps of a release, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any, Final

from fedlearn.errors import StateError
from fedlearn.release.charge import Charge, Weighing
from fedlearn.release.journal import damaged, pack, unpack
from fedlearn.release.keys import AttemptId, ReleaseKey


@unique
class Status(Enum):
    """What became of a release. The charge stands in every one of them."""

    COMMITTED = "committed"  # charge and bytes are durable; whoever asks with the same key gets the bytes
    ACKNOWLEDGED = "acknowledged"  # the coordinator needs the bytes no more; only this record remains
    COUNTED = "counted"  # its attempt was committed with this client in it
    MISSED = "missed"  # its round went on without this client
    VOID = "void"  # its attempt was given up after the bytes could have left


STATUS_TRANSITIONS: Final[Mapping[Status, frozenset[Status]]] = {
    Status.COMMITTED: frozenset({Status.ACKNOWLEDGED, Status.COUNTED, Status.MISSED, Status.VOID}),
    Status.ACKNOWLEDGED: frozenset({Status.COUNTED, Status.MISSED, Status.VOID}),
    Status.COUNTED: frozenset(),
    Status.MISSED: frozenset(),
    Status.VOID: frozenset(),
}


@dataclass(frozen=True)
class Release:
    """One line of the site's record: it stays when the bytes are gone.

    Args:
        key: its name.
        request_sha256: hex digest of the request that it answers, empty for a request without a body.
        charge: what it cost, or None in a run without a privacy plan.
        payload_sha256: hex digest of the bytes.
        size_bytes: their number.
        has_state: whether the client's new state was committed with it.
        status: what became of it.
    """

    key: ReleaseKey
    request_sha256: str
    charge: Charge | None
    payload_sha256: str
    size_bytes: int
    has_state: bool
    status: Status

    def moved_to(self, status: Status) -> Release:
        """The same release with another status.

        Raises:
            StateError: `STATUS_TRANSITIONS` does not have the step.
        """
        if status not in STATUS_TRANSITIONS[self.status]:
            raise StateError(f"release {self.key}: cannot go from {self.status.value} to {status.value}")
        return Release(**{**self.__dict__, "status": status})

    def to_record(self) -> bytes:
        """The journal's bytes."""
        fields = {**self.__dict__, "status": self.status.value, "key": self.key.__dict__}
        fields["charge"] = None if self.charge is None else self.charge.__dict__
        return pack(fields)

    @classmethod
    def from_record(cls, data: bytes, *, what: str) -> Release:
        """Read the journal's bytes.

        Raises:
            StateError: they are damaged.
        """
        fields: dict[str, Any] = unpack(data, what=what)
        try:
            fields["key"] = ReleaseKey(**fields["key"])
            fields["charge"] = None if fields["charge"] is None else Charge(**fields["charge"])
            fields["status"] = Status(fields["status"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(what, repr(error)) from None


@unique
class Refusal(Enum):
    """Why the gate refuses. The values travel."""

    BUDGET = "budget"  # the charge would exceed the site's budget
    VOID_CAP = "void-cap"  # too many attempts of this run were given up after bytes could have left
    OTHER_MODEL = "other-model"  # this exchange was already answered for another broadcast
    OTHER_REQUEST = "other-request"  # this exchange was already answered for another request
    STALE = "stale"  # a later attempt was already asked for
    VOID = "void"  # the attempt was given up
    GONE = "gone"  # the bytes were acknowledged and pruned
    UNKNOWN_BASE = "unknown-base"  # the server counts an attempt that this site has not committed
    CONTRADICTION = "contradiction"  # the server says two things that cannot both be true
    NOTHING_TO_UNMASK = "nothing-to-unmask"  # no update of this attempt was committed here
    OPENED = "opened"  # this site helped to open a sum of an earlier attempt at the round
    CLOSED = "closed"  # the run is over: what it did not use was given back
    TOO_LARGE = "too-large"  # a payload or state exceeds a named limit

    @property
    def permanent(self) -> bool:
        """Whether the gate would refuse whatever else the run asks as well.

        A budget only shrinks, a record that was lost stays lost, and all updates of a run are equally large; the others are about one attempt, or
        one round.
        """
        return self in _PERMANENT


_PERMANENT: Final = frozenset(
    {
        *(Refusal.BUDGET, Refusal.VOID_CAP, Refusal.CLOSED, Refusal.TOO_LARGE),
        *(Refusal.UNKNOWN_BASE, Refusal.CONTRADICTION),
    }
)


@dataclass(frozen=True)
class Refused:
    """No: nothing was charged and nothing may leave."""

    reason: Refusal
    message: str
    weighing: Weighing | None = None
    hint: str = ""


@dataclass(frozen=True)
class Reserved:
    """Yes: compute from `state`, then `commit`. `state` is the client's state before this attempt, None at first."""

    key: ReleaseKey
    state: bytes | None = field(repr=False)


@dataclass(frozen=True)
class InProgress:
    """The same release is being computed; whoever asked twice gets one answer."""

    key: ReleaseKey


@dataclass(frozen=True)
class Finished:
    """The bytes are committed and may leave, as often as they are asked for."""

    key: ReleaseKey
    payload: bytes = field(repr=False)


@dataclass(frozen=True)
class SitePolicy:
    """What the site allows in a run.

    Args:
        max_voids_per_run: attempts that may be given up after bytes could have left; the next one is refused.
        payload_limit_bytes: the largest payload that may leave.
        state_limit_bytes: the largest state that a client may keep.
        reopen: an update may leave for another attempt at a round of which this site has opened a sum; see `SiteGate`, rule 6.
    """

    max_voids_per_run: int = 3
    payload_limit_bytes: int = 2 * 1024**3 - 1
    state_limit_bytes: int = 2 * 1024**3 - 1
    reopen: bool = False


Resolution = Mapping[AttemptId, Status]
