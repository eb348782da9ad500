"""Records that cannot be changed without it showing: each names its predecessor's hash, and is signed by the site.

A line of the file is canonical JSON: {"record": {body, kind, prev, seq, time}, "sha256": of the record's text, "signature": of that hash}.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from fedlearn.errors import StateError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import Certificate

    SiteKey = Ed25519PrivateKey | EllipticCurvePrivateKey

MAX_RECORD_BYTES: Final = 64 * 1024
"""The longest line of a ledger."""
MAX_RECORDS: Final = 10_000_000
"""The most lines of a ledger."""
START: Final = "0" * 64
"""What the first record names as its predecessor."""
_RECORD_DOMAIN: Final = b"fedlearn/ledger-record/v1\n"
_HEAD_DOMAIN: Final = b"fedlearn/ledger-head/v1\n"
_CLOSED_DOMAIN: Final = b"fedlearn/closed-run/v1\n"


class Kind(Enum):
    """What a record says."""

    OPEN = "open"  # whose ledger this is, and the key that signs it; the first record
    KEY = "key"  # another key signs from here on
    BUDGETS = "budgets"  # the site's policy now names these budgets
    CHARGE = "charge"
    REFUSAL = "refusal"
    VOID = "void"  # a charged release was given up; the charge stands
    CLOSED = "closed"  # a run that was charged whole on admission ended earlier, by the coordinator's signed word
    OVERRIDE = "override"  # a person at the site decided something, and why
    REPAIR = "repair"  # a torn last record was set aside


_KINDS: Final = {kind.value: kind for kind in Kind}


@dataclass(frozen=True)
class Record:
    """One record. `sha256` is of its text, and what the next one names as `prev`."""

    seq: int
    prev: str
    time: float
    kind: Kind
    body: Mapping[str, Any]
    sha256: str
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class SignedHead:
    """How far a ledger had come, in the site's own hand: a server that shows it later cannot have made it up.

    Args:
        site: whose ledger.
        data_set: of which data.
        seq: of the last record.
        sha256: of the last record.
        signature: by the site's key.
    """

    site: str
    data_set: str
    seq: int
    sha256: str
    signature: bytes = field(repr=False)

    def message(self) -> bytes:
        """What is signed."""
        return _HEAD_DOMAIN + _canonical([self.site, self.data_set, self.seq, self.sha256]).encode()

    def to_text(self) -> str:
        """Canonical JSON, for whoever remembers it."""
        return _canonical({**self.__dict__, "signature": _encode(self.signature)})

    @classmethod
    def from_text(cls, text: str) -> SignedHead:
        """Read what `to_text` wrote.

        Raises:
            StateError: it is something else.
        """
        try:
            tree = json.loads(text)
            head = cls(**{**tree, "signature": _decode(tree["signature"])})
            if type(head.seq) is int and all(isinstance(x, str) for x in (head.site, head.data_set, head.sha256)):
                return head
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise StateError(f"ledger head: got {text[:200]!r}, expected a signed head")


@dataclass(frozen=True)
class ClosedRun:
    """The coordinator's word that a run is over, in its own hand.

    Args:
        run: the run's name.
        rounds: how many took place, void attempts among them.
        signature: by the coordinator's key.
    """

    run: str
    rounds: int
    signature: bytes = field(repr=False)

    def message(self) -> bytes:
        """What is signed."""
        return _CLOSED_DOMAIN + _canonical([self.run, self.rounds]).encode()

    @classmethod
    def signed(cls, run: str, rounds: int, key: SiteKey) -> ClosedRun:
        """The coordinator signs."""
        return cls(run, rounds, sign(key, cls(run, rounds, b"").message()))


class BadRecordError(ValueError):
    """A line is not the record that the chain expects here; the message says why."""


def signed_head(site: str, data_set: str, last: Record, key: SiteKey) -> SignedHead:
    """The head after `last`."""
    unsigned = SignedHead(site, data_set, last.seq, last.sha256, b"")
    return SignedHead(site, data_set, last.seq, last.sha256, sign(key, unsigned.message()))


def make_line(seq: int, prev: str, time: float, kind: Kind, body: Mapping[str, Any], key: SiteKey) -> bytes:
    """A signed line, its newline included.

    Raises:
        StateError: it is longer than `MAX_RECORD_BYTES`.
    """
    record = {"seq": seq, "prev": prev, "time": time, "kind": kind.value, "body": body}
    digest = _digest(record)
    signature = sign(key, _RECORD_DOMAIN + digest.encode())
    line = _canonical({"record": record, "sha256": digest, "signature": _encode(signature)}).encode() + b"\n"
    if len(line) > MAX_RECORD_BYTES:
        raise StateError(f"ledger: a record of {len(line)} bytes, limit MAX_RECORD_BYTES is {MAX_RECORD_BYTES}")
    return line


def read_line(line: bytes, seq: int, prev: str) -> Record:
    """The record of a line, which must continue the chain. Its signature is `check_signature`'s matter.

    Args:
        line: without its newline.
        seq: the number that it must have.
        prev: the hash that it must name.

    Raises:
        BadRecordError: it does not continue the chain.
        StateError: it does, and is of a kind that only a newer version knows.
    """
    if len(line) > MAX_RECORD_BYTES:
        raise BadRecordError(f"{len(line)} bytes, limit MAX_RECORD_BYTES is {MAX_RECORD_BYTES}")
    try:
        tree = json.loads(line)
        record = tree["record"]
        whole = set(tree) == {"record", "sha256", "signature"} and set(record) == {
            "seq",
            "prev",
            "time",
            "kind",
            "body",
        }
        signature, body, time = _decode(tree["signature"]), dict(record["body"]), float(record["time"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRecordError(f"not a record: {type(error).__name__}") from None
    if not whole or _digest(record) != tree["sha256"]:
        raise BadRecordError("its hash is not that of its text")
    if record["seq"] != seq or record["prev"] != prev:
        raise BadRecordError(
            f"it is number {record['seq']} after {str(record['prev'])[:12]}, expected {seq} after {prev[:12]}"
        )
    if record["kind"] not in _KINDS:  # whole, and in its place: no damage, and nothing to cut off
        raise StateError(
            f"ledger: record {seq} is of kind {record['kind']!r}, which this version does not know",
            hint="a newer fedlearn has written to this ledger: use that one",
        )
    return Record(seq, prev, time, _KINDS[record["kind"]], body, tree["sha256"], signature)


def check_signature(record: Record, public_key: str) -> bool:
    """Whether the record was signed with a key."""
    return verify(public_key, _RECORD_DOMAIN + record.sha256.encode(), record.signature)


def sign(key: SiteKey, message: bytes) -> bytes:
    """A signature: Ed25519, or ECDSA with SHA-256 where the site's key is an elliptic curve's."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashes.SHA256()))
    return key.sign(message)


def verify(public_key: str, message: bytes, signature: bytes) -> bool:
    """Whether a signature is right; False for a key that cannot be read."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        key = serialization.load_der_public_key(_decode(public_key))
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            return False
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def public_text(key: SiteKey | Certificate) -> str:
    """The public half, or the key of a certificate: base64 of SubjectPublicKeyInfo."""
    from cryptography.hazmat.primitives import serialization as ser

    return _encode(key.public_key().public_bytes(ser.Encoding.DER, ser.PublicFormat.SubjectPublicKeyInfo))


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(record).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
