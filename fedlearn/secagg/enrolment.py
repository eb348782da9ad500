"""Who vouches for an identity key: check-ins travel with a claim about it, and each side verifies the claims that it is sent.

The coordinator's word is none. On our link the claim is the client's certificate, and every client verifies it against its own copy of the
consortium's authority (`fedlearn.link.enrolment`). In a rehearsal the claim is the key itself, which proves nothing: `Declared`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from fedlearn.proto import secagg_pb2 as pb
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import CLIENTS_LIMIT
from fedlearn.secagg.messages import fill, from_fields
from fedlearn.secagg.plan import CheckIn

CLAIM_LIMIT_BYTES: Final = 8 * 1024
ENTRIES_LIMIT_BYTES: Final = 32 * 1024**2


class Enrolment(Protocol):
    """Verifies claims."""

    def identity(self, client: str, claim: bytes) -> bytes:
        """The identity key that the claim proves to be this client's: a public key of the suite.

        Raises:
            SecureAggregationError: NOT_ENROLLED: it proves no such thing.
        """
        ...


class Declared:
    """Takes a key for its owner's because it says so: for rehearsals, where one machine or one coordinator has everything anyway."""

    def identity(self, client: str, claim: bytes) -> bytes:  # noqa: ARG002  # nothing is proved
        return claim


@dataclass(frozen=True)
class Entry:
    """A check-in with the claim about its sender's identity key."""

    check_in: CheckIn
    claim: bytes = field(repr=False)


def entries_to_bytes(entries: Iterable[Entry]) -> bytes:
    """Entries as they travel, in their order."""
    message = pb.Entries()
    for entry in entries:
        fill(message.entries.add(claim=entry.claim).check_in, entry.check_in)
    return bytes(message.SerializeToString(deterministic=True))


def entries_from_bytes(data: bytes) -> tuple[Entry, ...]:
    """The inverse, for bytes from anybody.

    Raises:
        SecureAggregationError: MALFORMED or TOO_LARGE.
    """
    if len(data) > ENTRIES_LIMIT_BYTES:
        raise SecureAggregationError(Breach.TOO_LARGE, f"got {len(data)} bytes, limit is {ENTRIES_LIMIT_BYTES}")
    message = pb.Entries()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise SecureAggregationError(Breach.MALFORMED, f"got {len(data)} bytes that are no roster") from None
    if len(message.entries) > CLIENTS_LIMIT:
        raise SecureAggregationError(Breach.TOO_LARGE, f"got {len(message.entries)} entries, limit is {CLIENTS_LIMIT}")
    if any(len(entry.claim) > CLAIM_LIMIT_BYTES for entry in message.entries):
        raise SecureAggregationError(Breach.TOO_LARGE, f"got a claim above the limit of {CLAIM_LIMIT_BYTES} bytes")
    return tuple(Entry(from_fields(CheckIn, entry.check_in), entry.claim) for entry in message.entries)


def identities_of(enrolment: Enrolment, entries: Sequence[Entry]) -> dict[str, bytes]:
    """Identity keys by name.

    Raises:
        SecureAggregationError: NOT_ENROLLED: a claim does not prove what it should.
    """
    return {entry.check_in.client: enrolment.identity(entry.check_in.client, entry.claim) for entry in entries}
