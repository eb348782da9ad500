"""What one release is called: the key under which a charge and finished bytes are committed together."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote

from fedlearn.errors import StateError

if TYPE_CHECKING:
    from fedlearn.release.charge import Charge

TRAIN: Final = "train"
"""The exchange that carries a client's update."""

AGREE: Final = "agree"
"""The exchange in which a client signs whose updates are in the sum; answered for one request only."""

UNMASK: Final = "unmask"
"""The exchange in which a client helps to open the sum; answered for one request only."""

EVALUATE: Final = "evaluate"
"""The exchange that carries a charged evaluation of the model that an attempt made."""

ADMISSION: Final = "admission"
"""Not an exchange: the key under which a whole run's charge stands in a ledger."""

NAME_LIMIT_BYTES: Final = 200
NUMBER_LIMIT: Final = 2**31 - 1
_DOMAIN: Final = b"fedlearn/release-key/v1"


class AttemptId(NamedTuple):
    """One attempt at one round. Ordered: a later round, or a later attempt at the same round, is greater."""

    round: int
    attempt: int

    def __str__(self) -> str:
        return f"round {self.round} attempt {self.attempt}"

    @classmethod
    def from_pair(cls, pair: object, *, what: str) -> AttemptId:
        """Read [round, attempt] from the journal.

        Raises:
            StateError: it is something else.
        """
        match pair:
            case [int(number), int(attempt)]:
                return cls(number, attempt)
        raise StateError(f"journal: record {what!r} is damaged: got {pair!r}, expected a round and an attempt")


@dataclass(frozen=True)
class ReleaseKey:
    """The name of one release of one client.

    Args:
        run: the run's name, unique at the coordinator; 1 to `NAME_LIMIT_BYTES` bytes of UTF-8.
        round: the round's number, 0 to `NUMBER_LIMIT`.
        attempt: 1 for the first attempt at the round; a retry after a void is the next one.
        exchange: what is exchanged: `TRAIN`, `UNMASK`, or a strategy's own name.
        model_digest: hex digest of the broadcast that the release answers.

    Raises:
        ValueError: a part is empty, too long or out of range.
    """

    run: str
    round: int
    attempt: int
    exchange: str
    model_digest: str

    def __post_init__(self) -> None:
        for name, text in (("run", self.run), ("exchange", self.exchange), ("model_digest", self.model_digest)):
            size = len(text.encode())
            if not 1 <= size <= NAME_LIMIT_BYTES:
                raise ValueError(f"release key: {name} of {size} bytes, expected 1 to {NAME_LIMIT_BYTES}")
        for name, number, least in (("round", self.round, 0), ("attempt", self.attempt, 1)):
            if not least <= number <= NUMBER_LIMIT:
                raise ValueError(f"release key: {name} is {number}, expected {least} to {NUMBER_LIMIT}")

    @property
    def at(self) -> AttemptId:
        """The attempt that this release belongs to."""
        return AttemptId(self.round, self.attempt)

    @property
    def work(self) -> str:
        """What this is a release of, for people who know the run."""
        if self.exchange == ADMISSION:
            return "this run"
        return f"{'an evaluation after ' if self.exchange == EVALUATE else ''}round {self.round}"

    def canonical(self) -> bytes:
        """The key as bytes: equal keys give equal bytes, different keys different ones (every part carries its length)."""
        parts = (self.run, str(self.round), str(self.attempt), self.exchange, self.model_digest)
        return _DOMAIN + b"".join(len(p.encode()).to_bytes(4, "big") + p.encode() for p in parts)

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, as hex."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def __str__(self) -> str:
        """For people: without the digest."""
        return f"{self.run}, the whole run" if self.exchange == ADMISSION else f"{self.run} {self.at} {self.exchange}"


_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+", re.ASCII)
"""Names that percent-encoding leaves as they are."""


def admission_key(run: str, charge: Charge) -> ReleaseKey:
    """The key under which a whole run's charge stands: one for each run and charge."""
    digest = hashlib.sha256(f"{charge.account}\n{charge.cost}".encode()).hexdigest()
    return ReleaseKey(run, 0, 1, ADMISSION, digest)


def record_key(*parts: str | int) -> str:
    """The journal's key for a place in the tree, ASCII, in an order that follows the numbers.

    Names are percent-encoded, so that a slash in a run's name cannot reach another run's records.
    """
    return "/".join(f"{part:010d}" if isinstance(part, int) else _quoted(part) for part in parts)


def _quoted(name: str) -> str:
    # Quoting takes its time even where there is nothing to quote, and a round names each of its clients.
    return name if _PLAIN.fullmatch(name) else quote(name, safe="")
