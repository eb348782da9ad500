"""What the site's gate knows of one run, and what a server's word about earlier attempts means for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fedlearn.release.charge import Charge
from fedlearn.release.keys import UNMASK, AttemptId, ReleaseKey
from fedlearn.release.records import Refusal, Refused, Release, Status

Slot = tuple[AttemptId, str]
DROPPED: Final = (Status.MISSED, Status.VOID)
_BEFORE_ALL: Final = AttemptId(0, 0)


@dataclass(frozen=True)
class Hold:
    """A reservation: in memory only."""

    key: ReleaseKey
    request_sha256: str
    charge: Charge | None


@dataclass
class SiteRun:
    """What the gate knows of one run. `holds`, and of `latest` what was asked for and not committed, die with the process."""

    base: AttemptId | None = None
    state_at: AttemptId | None = None
    releases: dict[Slot, Release] = field(default_factory=dict)
    holds: dict[Slot, Hold] = field(default_factory=dict)
    latest: AttemptId = _BEFORE_ALL

    def statuses(self, at: AttemptId) -> set[Status]:
        """What became of an attempt's releases."""
        return {release.status for (when, _), release in self.releases.items() if when == at}

    def has_state(self, at: AttemptId) -> bool:
        """Whether the client's state was committed with one of an attempt's releases."""
        return any(release.has_state for (when, _), release in self.releases.items() if when == at)

    def voids(self) -> int:
        """Attempts that were given up after bytes could have left."""
        return len({at for (at, _), release in self.releases.items() if release.status is Status.VOID})

    def opened(self, before: AttemptId) -> AttemptId | None:
        """The first earlier attempt at the same round whose sum this site helped to open."""
        opened = (at for at, exchange in self.releases if exchange == UNMASK)
        return min((at for at in opened if at.round == before.round and at < before), default=None)

    def advance(self, at: AttemptId) -> None:
        """Go on to an attempt: reservations of earlier ones are dropped."""
        self.latest = max(self.latest, at)
        self.holds = {slot: hold for slot, hold in self.holds.items() if slot[0] >= self.latest}


def mismatch(run: SiteRun, key: ReleaseKey, asked: str) -> Refused | None:
    """Refuse an exchange that is already bound to another broadcast or another request."""
    bound = run.releases.get((key.at, key.exchange)) or run.holds.get((key.at, key.exchange))
    if bound is not None and bound.key.model_digest != key.model_digest:
        return Refused(Refusal.OTHER_MODEL, f"{key}: already answered for another model")
    if bound is not None and bound.request_sha256 != asked:
        return Refused(Refusal.OTHER_REQUEST, f"{key}: already answered for another request")
    return None


def check_base(known: SiteRun, run: str, base: AttemptId | None, upto: AttemptId | None) -> Refused | None:
    """Refuse a `base` that contradicts what the server said before, or what left this site; see `SiteGate.settle`."""
    if base == known.base:
        return None
    if base is None or (known.base is not None and base < known.base):
        return Refused(Refusal.CONTRADICTION, f"{run}: base is {base}, {known.base} was called committed before")
    if upto is not None and base > upto:
        return Refused(Refusal.CONTRADICTION, f"{run}: base is {base}, later than the {upto} that is asked for")
    statuses = known.statuses(base)
    if not statuses:
        return Refused(Refusal.UNKNOWN_BASE, f"{run}: base is {base}, this site has committed nothing in it")
    if statuses & set(DROPPED):
        return Refused(Refusal.CONTRADICTION, f"{run}: base is {base}, which was given up before")
    return None


def outcome(at: AttemptId, was: AttemptId | None, base: AttemptId | None, upto: AttemptId | None) -> Status | None:
    """What became of an attempt, or None while it is open."""
    if at in (was, base):
        return Status.COUNTED
    if upto is not None and at >= upto:
        return None
    superseded = any(later is not None and later.round == at.round and later > at for later in (base, upto))
    return Status.VOID if superseded else Status.MISSED
