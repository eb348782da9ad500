"""The messages of secure aggregation as values, and their bytes: protobuf, one version, a limit on everything.

See protos/secagg.proto for who sends what when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from google.protobuf.message import DecodeError

from fedlearn.proto import secagg_pb2 as pb
from fedlearn.release.keys import NAME_LIMIT_BYTES
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import CLIENTS_LIMIT
from fedlearn.secagg.plan import DIGEST_BYTES, LEVELS_LIMIT, VERSION, CheckIn
from fedlearn.secagg.primitives import KEY_BYTES, TAG_BYTES
from fedlearn.secagg.shamir import SHARE_BYTES

SEALED_BYTES: Final = 2 * SHARE_BYTES + TAG_BYTES
"""Both shares for one neighbour, sealed; with surplus noise one more for each level."""
SIGNATURE_LIMIT_BYTES: Final = 72
KEY_LIMIT_BYTES: Final = 33
NONCE_BYTES: Final = 32
BITMAP_LIMIT_BYTES: Final = -(-CLIENTS_LIMIT // 8)
MESSAGE_LIMIT_BYTES: Final = 2 * 1024**3 - 1
"""protobuf's own limit; what is not a masked vector has to fit `SMALL_LIMIT_BYTES`."""
SMALL_LIMIT_BYTES: Final = 16 * 1024**2


@dataclass(frozen=True)
class Roster:
    """Server to all: everybody's check-ins, in the order of names."""

    members: tuple[CheckIn, ...]


@dataclass(frozen=True)
class Reveal:
    """Client: the nonce behind its commitment."""

    nonce: bytes


@dataclass(frozen=True)
class Reveals:
    """Server to all: a nonce for each member, b"" where it is withheld."""

    nonces: tuple[bytes, ...]


@dataclass(frozen=True)
class Shares:
    """Client: a commitment to its own mask's seed, one sealed pair of shares for each neighbour, and what its surplus noise's keys lead to."""

    seed_commitment: bytes
    sealed: tuple[bytes, ...] = field(repr=False)
    surplus_anchor: bytes = b""


@dataclass(frozen=True)
class Delivery:
    """Server to one client: who shared (as a set of bits), and what its neighbours among them sealed for it."""

    sharers: int
    sealed: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Masked:
    """Client: its masked update, packed, and a signature over whom it is masked with."""

    signature: bytes
    vector: bytes = field(repr=False)


@dataclass(frozen=True)
class Survivors:
    """Server to one client: whose vectors are in the sum, and what its neighbours among them signed."""

    survivors: int
    inclusions: tuple[bytes, ...]


@dataclass(frozen=True)
class Agreement:
    """Client, malicious profile: its signature under the survivors that it was told."""

    signature: bytes


@dataclass(frozen=True)
class Agreements:
    """Server to all, malicious profile: who signed the same survivors, and their signatures."""

    signers: int
    signatures: tuple[bytes, ...]


@dataclass(frozen=True)
class Opening:
    """Client: one share, of one kind, for each sharer whose secrets it holds shares of, and one of each survivor's surplus noise; signed."""

    shares: tuple[bytes, ...] = field(repr=False)
    signature: bytes
    surplus: tuple[bytes, ...] = field(default=(), repr=False)


FromClient = CheckIn | Reveal | Shares | Masked | Agreement | Opening
FromServer = Roster | Reveals | Delivery | Survivors | Agreements
Message = FromClient | FromServer

_NAMES: Final[dict[type, str]] = {
    CheckIn: "check_in",
    Roster: "roster",
    Reveal: "reveal",
    Reveals: "reveals",
    Shares: "shares",
    Delivery: "delivery",
    Masked: "masked",
    Survivors: "survivors",
    Agreement: "agreement",
    Agreements: "agreements",
    Opening: "opening",
}
_SETS: Final = frozenset({"sharers", "survivors", "signers"})
_JOINED: Final = frozenset({"shares", "surplus"})
_SIZES: Final = {
    "client": (1, NAME_LIMIT_BYTES),
    "mask_key": (32, KEY_LIMIT_BYTES),
    "transport_key": (32, KEY_LIMIT_BYTES),
    "commitment": (DIGEST_BYTES, DIGEST_BYTES),
    "seed_commitment": (DIGEST_BYTES, DIGEST_BYTES),
    "signature": (1, SIGNATURE_LIMIT_BYTES),
    "signatures": (1, SIGNATURE_LIMIT_BYTES),
    "inclusions": (1, SIGNATURE_LIMIT_BYTES),
    "nonce": (NONCE_BYTES, NONCE_BYTES),
    "nonces": (0, NONCE_BYTES),
    "sealed": (SEALED_BYTES, SEALED_BYTES + LEVELS_LIMIT * SHARE_BYTES),
    "surplus_anchor": (0, KEY_BYTES),
    "surplus": (0, SHARE_BYTES * CLIENTS_LIMIT),
    "sharers": (1, BITMAP_LIMIT_BYTES),
    "survivors": (1, BITMAP_LIMIT_BYTES),
    "signers": (1, BITMAP_LIMIT_BYTES),
    "vector": (2, MESSAGE_LIMIT_BYTES),
    "shares": (SHARE_BYTES, SHARE_BYTES * CLIENTS_LIMIT),
}
"""Fewest and most bytes of a field, of each of its elements where it is a list."""


def _key(number: int) -> bytes:
    """What stands before a field of bytes and its size in protobuf."""
    return bytes((number << 3 | 2,))


_MASKED: Final = pb.Envelope(version=VERSION).SerializeToString() + _key(pb.Envelope.MASKED_FIELD_NUMBER)
_SIGNATURE: Final = _key(pb.Masked.SIGNATURE_FIELD_NUMBER)
_VECTOR: Final = _key(pb.Masked.VECTOR_FIELD_NUMBER)


def to_bytes(message: Message) -> bytes:
    """One message as it travels."""
    if isinstance(message, Masked):
        return _masked_bytes(message)
    envelope = pb.Envelope(version=VERSION)
    fill(getattr(envelope, _NAMES[type(message)]), message)
    return bytes(envelope.SerializeToString(deterministic=True))


def _masked_bytes(message: Masked) -> bytes:
    """What protobuf would make of it, with one copy of the vector in place of three: it is as long as a model, and a client's only long message."""
    head = _SIGNATURE + _varint(len(message.signature)) + message.signature + _VECTOR + _varint(len(message.vector))
    return b"".join((_MASKED, _varint(len(head) + len(message.vector)), head, message.vector))


def _masked_from(data: bytes) -> Masked | None:
    """A masked vector in the form that `_masked_bytes` gives it; None for all else, which protobuf reads."""
    size, at = _number(data, _MASKED, 0)
    if at + size != len(data):
        return None
    size, at = _number(data, _SIGNATURE, at)
    signature, at = data[at : at + size], at + size
    size, at = _number(data, _VECTOR, at)
    if not signature or at + size != len(data):
        return None
    _sized("signature", signature)
    vector = data[at:]
    _sized("vector", vector)
    return Masked(signature, vector)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))


def _number(data: bytes, key: bytes, at: int) -> tuple[int, int]:
    """The number that follows a key, and where it ends; 0 and a place beyond the data where it is not there."""
    found, end = 0, at + len(key)
    if data.startswith(key, at):
        for shift in range(0, 35, 7):
            byte = data[end] if end < len(data) else 0
            found, end = found | (byte & 0x7F) << shift, end + 1
            if byte <= 0x7F:
                return found, end
    return 0, len(data) + 1


def fill(target: Any, message: Any) -> None:
    """Write a message's fields into its protobuf."""
    target.SetInParent()
    for name, value in ((f.name, getattr(message, f.name)) for f in fields(message)):
        if name == "members":
            for member in value:
                fill(target.members.add(), member)
        elif name in _SETS:
            setattr(target, name, value.to_bytes(-(-value.bit_length() // 8) or 1, "little"))
        elif isinstance(message, Opening) and name in _JOINED:
            setattr(target, name, b"".join(value))
        elif isinstance(value, tuple):
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)


def from_bytes(data: bytes) -> Message:
    """The inverse of `to_bytes`, for bytes from anybody.

    Raises:
        SecureAggregationError: MALFORMED or TOO_LARGE.
    """
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise SecureAggregationError(Breach.TOO_LARGE, f"got {len(data)} bytes, limit is {MESSAGE_LIMIT_BYTES}")
    if (masked := _masked_from(data)) is not None:
        return masked
    envelope = pb.Envelope()
    try:
        envelope.ParseFromString(data)
    except DecodeError:
        raise _malformed(f"{len(data)} bytes that are no message") from None
    if envelope.version != VERSION:
        raise _malformed(f"protocol version {envelope.version}, expected {VERSION}")
    name = envelope.WhichOneof("kind")
    kind = next((kind for kind, known in _NAMES.items() if known == name), None)
    if kind is None:
        raise _malformed("an empty message")
    if kind is not Masked and len(data) > SMALL_LIMIT_BYTES:
        raise SecureAggregationError(Breach.TOO_LARGE, f"got {len(data)} bytes of {name}, limit is {SMALL_LIMIT_BYTES}")
    message: Message = from_fields(kind, getattr(envelope, name))
    return message


def from_fields(kind: type, source: Any) -> Any:
    """A message from its protobuf's fields; raises as `from_bytes`."""
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(kind)):
        value = getattr(source, name)
        if name == "members":
            values[name] = tuple(from_fields(CheckIn, member) for member in _counted(name, value))
        elif kind is Opening and name in _JOINED:
            if len(value) % SHARE_BYTES:
                raise _malformed(f"{name} of {len(value)} bytes, expected a multiple of {SHARE_BYTES}")
            _sized(name, value)
            values[name] = tuple(value[i : i + SHARE_BYTES] for i in range(0, len(value), SHARE_BYTES))
        elif isinstance(value, bytes | str):
            _sized(name, value.encode() if isinstance(value, str) else value)
            values[name] = int.from_bytes(value, "little") if name in _SETS and isinstance(value, bytes) else value
        else:
            for one in _counted(name, value):
                _sized(name, one)
            values[name] = tuple(value)
    return kind(**values)


def _counted(name: str, values: Sequence[Any]) -> Sequence[Any]:
    if len(values) > CLIENTS_LIMIT:
        raise SecureAggregationError(Breach.TOO_LARGE, f"got {len(values)} {name}, limit is {CLIENTS_LIMIT}")
    return values


def _sized(name: str, value: bytes) -> None:
    least, most = _SIZES[name]
    if not least <= len(value) <= most:
        breach = Breach.TOO_LARGE if len(value) > most else Breach.MALFORMED
        raise SecureAggregationError(breach, f"got {name} of {len(value)} bytes, expected {least} to {most}")


def _malformed(got: str) -> SecureAggregationError:
    return SecureAggregationError(Breach.MALFORMED, f"got {got}")
