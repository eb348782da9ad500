"""The cryptography of secure aggregation, in one place: signatures, key agreement, key derivation, sealing, key streams.

A suite fixes all of it. Every function takes its keys and randomness as arguments, and keys are plain bytes: 32-byte secrets, so that any of
them can be shared by `shamir`. A key that is derived here is used for one message or one mask, which is why nonces and counters may be 0.

Sources: RFC 7748 (X25519), RFC 8032 (Ed25519), RFC 5869 (HKDF), SP 800-38A (CTR), SP 800-38D (GCM), FIPS 186-5 and RFC 6979 (ECDSA).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, unique
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedlearn.secagg.breach import Breach, SecureAggregationError

Draw = Callable[[int], bytes]
"""Random bytes: `os.urandom` in earnest, a `SeededDraw` in tests and vectors."""

SECRET_BYTES: Final = 32
KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
POINTS: Final = 1024
"""Public keys that are kept as points: three for each client of a round of 200, and identities for more."""
SALT: Final = b"fedlearn/secagg/v1"
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_P25519: Final = 2**255 - 19
_LOW_ORDER: Final = frozenset(
    {
        0,
        1,
        _P25519 - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)
"""The u-coordinates of Curve25519's points of order 1, 2, 4 and 8, reduced mod p."""


@unique
class Suite(Enum):
    """Which primitives a round uses. The value is the number that travels and enters the transcript."""

    X25519_AES256 = 1
    """Ed25519, X25519, AES-256-CTR masks, AES-256-GCM. The default."""
    X25519_CHACHA20 = 2
    """As above with ChaCha20 masks, for processors without AES instructions."""
    P256_AES256 = 3
    """ECDSA and ECDH over P-256, AES-256-CTR masks, AES-256-GCM: for sites that must use NIST curves."""

    @property
    def public_bytes(self) -> int:
        """Length of a public key on the wire."""
        return 33 if self is Suite.P256_AES256 else 32


@dataclass(frozen=True)
class KeyPair:
    """A key of one round. The secret is in no repr.

    Args:
        public: as it travels: 32 bytes, or a compressed point of 33 bytes for P-256.
        secret: 32 bytes.
    """

    public: bytes
    secret: bytes = field(repr=False)


class SeededDraw:
    """Bytes that follow from a seed: AES-256-CTR under a hash of it. For tests, vectors and rehearsals only; never private."""

    def __init__(self, seed: bytes) -> None:
        key = hashlib.sha256(b"fedlearn/secagg/seeded-draw/v1" + seed).digest()
        self._stream = key_stream(Suite.X25519_AES256, key)

    def __call__(self, size: int) -> bytes:
        return self._stream.update(bytes(size))


def new_key(suite: Suite, draw: Draw) -> KeyPair:
    """A fresh key pair for agreement or, for P-256, also for signing."""
    if suite is not Suite.P256_AES256:
        return key_of_secret(suite, draw(SECRET_BYTES))
    scalar = int.from_bytes(draw(48), "big") % (_P256_ORDER - 1) + 1  # 128 bits more than needed: no bias that shows
    return key_of_secret(suite, scalar.to_bytes(SECRET_BYTES, "big"))


def key_of_secret(suite: Suite, secret: bytes) -> KeyPair:
    """The pair that a secret belongs to: how a server checks a key that it has reconstructed.

    Raises:
        SecureAggregationError: BAD_KEY: it is no secret key of this suite.
    """
    try:
        if suite is Suite.P256_AES256:
            point = ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP256R1()).public_key()
            return KeyPair(point.public_bytes(Encoding.X962, PublicFormat.CompressedPoint), secret)
        return KeyPair(X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), secret)
    except ValueError:
        raise SecureAggregationError(
            Breach.BAD_KEY, f"got {len(secret)} bytes that are no secret key of {suite.name}"
        ) from None


def check_public(suite: Suite, public: bytes) -> None:
    """Refuse what is not a point of the curve, or has a small order.

    Raises:
        SecureAggregationError: BAD_KEY.
    """
    if len(public) != suite.public_bytes:
        raise SecureAggregationError(
            Breach.BAD_KEY, f"got a public key of {len(public)} bytes, expected {suite.public_bytes} for {suite.name}"
        )
    if suite is Suite.P256_AES256:
        _p256_point(public)
    elif (int.from_bytes(public, "little") & (2**255 - 1)) % _P25519 in _LOW_ORDER:
        raise SecureAggregationError(Breach.BAD_KEY, "got a public key of low order")


def agree(suite: Suite, secret: bytes, public: bytes) -> bytes:
    """The Diffie-Hellman secret of two keys, 32 bytes; not yet a key: see `derive`.

    Raises:
        SecureAggregationError: BAD_KEY: not a point, or of low order.
    """
    return agreement(suite, secret)(public)


class Agreement:
    """One X25519 secret against many public keys; parsing the secret costs as much as one agreement."""

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)

    def with_public(self, public: bytes) -> bytes:
        """The shared secret, 32 bytes.

        Raises:
            SecureAggregationError: BAD_KEY: the point is of low order, so the secret would be 0.
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise SecureAggregationError(Breach.BAD_KEY, "got a public key of low order, or none at all") from None


def agreement(suite: Suite, secret: bytes) -> Callable[[bytes], bytes]:
    """`agree` with the secret parsed once."""
    if suite is Suite.P256_AES256:
        own = ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP256R1())
        return lambda public: own.exchange(ec.ECDH(), _p256_point(public))
    return Agreement(secret).with_public


@lru_cache(maxsize=POINTS)
def _p256_point(public: bytes) -> ec.EllipticCurvePublicKey:
    """A point from its compressed form, whose other half is a square root: it costs as much as an agreement, and each is needed two or three times a round."""
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public)
    except ValueError:
        raise SecureAggregationError(Breach.BAD_KEY, "got bytes that are no point of P-256") from None


def derive(secret: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 with the protocol's salt: 32 bytes for one purpose, named by `info`."""
    return HKDF(hashes.SHA256(), KEY_BYTES, SALT, info).derive(secret)


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """AES-256-GCM with nonce 0: the key must be used for this one message only. 16 bytes longer than the plaintext."""
    return AESGCM(key).encrypt(bytes(12), plaintext, associated)


def unseal(key: bytes, ciphertext: bytes, associated: bytes) -> bytes:
    """The inverse of `seal`.

    Raises:
        SecureAggregationError: BAD_SHARE: altered, or sealed for another transcript, sender or receiver.
    """
    try:
        return AESGCM(key).decrypt(bytes(12), ciphertext, associated)
    except (InvalidTag, ValueError):
        raise SecureAggregationError(
            Breach.BAD_SHARE, f"a ciphertext of {len(ciphertext)} bytes does not decrypt"
        ) from None


def key_stream(suite: Suite, key: bytes, offset_bytes: int = 0) -> CipherContext:
    """The mask's cipher: what it makes of zeros is the key stream from `offset_bytes` (a multiple of 64) on.

    The counter starts at 0 and every key is used for one stream. A stream is shorter than 2**36 bytes.
    """
    if suite is Suite.X25519_CHACHA20:
        # cryptography's nonce is RFC 8439's counter (4 bytes, little endian) and nonce (12 bytes).
        start = (offset_bytes // 64).to_bytes(4, "little") + bytes(12)
        return Cipher(algorithms.ChaCha20(key, start), None).encryptor()
    return Cipher(algorithms.AES256(key), modes.CTR((offset_bytes // 16).to_bytes(16, "big"))).encryptor()


def new_identity(suite: Suite, draw: Draw) -> KeyPair:
    """A signing key: Ed25519, or P-256. Long-lived: it is what a site enrols."""
    if suite is Suite.P256_AES256:
        return new_key(suite, draw)
    secret = draw(SECRET_BYTES)
    return KeyPair(Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), secret)


def sign(suite: Suite, secret: bytes, message: bytes) -> bytes:
    """Ed25519 (64 bytes), or deterministic ECDSA over P-256 with SHA-256 (DER, at most 72 bytes)."""
    if suite is Suite.P256_AES256:
        own = ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP256R1())
        return own.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return Ed25519PrivateKey.from_private_bytes(secret).sign(message)


def verified(suite: Suite, public: bytes, signature: bytes, message: bytes) -> bool:
    """True when the signature is good. False for a bad signature and for a public key that is none."""
    try:
        if suite is Suite.P256_AES256:
            _p256_point(public).verify(signature, message, ec.ECDSA(hashes.SHA256()))
        else:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError, SecureAggregationError):
        return False
    return True
