"""What the other side can do wrong in secure aggregation, by name. Each ends in one error that carries the name."""

from __future__ import annotations

from enum import Enum, unique
from typing import Final

from fedlearn.errors import RemoteProtocolError


@unique
class Breach(Enum):
    """Why a message of the other side is refused. Nothing of a refused message is used."""

    MALFORMED = "malformed"  # cannot be read: truncated, of another version, a field is missing
    TOO_LARGE = "too-large"  # exceeds a named limit
    UNEXPECTED = "unexpected"  # not the message that this state waits for
    EQUIVOCATION = "equivocation"  # another content than before for the same step
    REPLAY = "replay"  # a round or attempt that is not later than the last one
    ROSTER_ORDER = "roster-order"  # names not sorted, or a name twice
    ROSTER_SIZE = "roster-size"  # fewer clients than the minimum, more than the plan has room for
    NOT_ENROLLED = "not-enrolled"  # a name without an enrolled identity
    BAD_SIGNATURE = "bad-signature"  # a signature does not verify
    BAD_KEY = "bad-key"  # not a point of the curve, or of low order
    REPEATED_KEY = "repeated-key"  # the same public key twice on one roster
    SELF_MISSING = "self-missing"  # this client is not where it must be
    SELF_CHANGED = "self-changed"  # this client's own keys are not what it sent
    UNSAFE_GRAPH = "unsafe-graph"  # no degree and threshold are safe for so many clients
    BAD_NONCE = "bad-nonce"  # a nonce is not what its owner committed to, or too many are withheld
    BAD_SHARE = "bad-share"  # a share does not decrypt, or is out of range
    WRONG_SET = "wrong-set"  # clients in a set in which they cannot be
    BELOW_THRESHOLD = "below-threshold"  # too few clients for the sum to be safe, or to be opened
    BAD_VECTOR = "bad-vector"  # a masked vector of another length
    BAD_RECONSTRUCTION = "bad-reconstruction"  # what the shares give does not fit what was promised


class SecureAggregationError(RemoteProtocolError):
    """The other side broke the protocol of secure aggregation. The round is over for who raises it.

    Args:
        breach: what it did.
        message: what was got and what was expected.
        culprits: the clients whose contributions show it, where that can be known.
        hint: what the reader can do about it.
    """

    kind = "secure-aggregation"

    def __init__(self, breach: Breach, message: str, *, culprits: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(f"secure aggregation: {message}", hint=hint or _HINTS.get(breach, ""))
        self.breach: Final = breach
        self.culprits: Final = culprits


_HINTS: Final = {
    Breach.NOT_ENROLLED: "pin the client's identity key at every site, or leave the client out of the cohort",
    Breach.BAD_SIGNATURE: "it is forged, or its signer holds another plan, run, round, attempt or identity key",
    Breach.EQUIVOCATION: "the coordinator says different things to different clients, or was restarted: ask its operator",
    Breach.BELOW_THRESHOLD: "too many clients are missing; the round is void and nothing was opened",
    Breach.UNSAFE_GRAPH: "raise the number of clients, or lower the rates of adversarial clients or dropouts that the plan assumes",
}
