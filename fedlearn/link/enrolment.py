"""A client's certificate as the claim about its identity key in secure aggregation: verified by every other client against its own authority file.

The key of the certificate is the identity: P-256, in the suite of `fedlearn.learning.vectors.SUITE`. Whoever holds the authority's key can invent
clients, so it belongs to the consortium and not to the coordinator's operator alone; docs/secure-aggregation.md says so.
"""

from __future__ import annotations

import datetime as dt
from functools import lru_cache
from typing import TYPE_CHECKING

from fedlearn.errors import TlsError
from fedlearn.link.tls import Identity as Named
from fedlearn.link.tls import Role, TlsBundle, certificate_uris
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import Identity
from fedlearn.secagg.primitives import KeyPair, Suite, key_of_secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography import x509


class CertificateEnrolment:
    """Takes who an authority has certified as a client.

    Args:
        ca_pem: the authority's certificate, this party's own copy.
        now: the time to check validity at.
    """

    def __init__(self, ca_pem: bytes, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)) -> None:
        self._ca_pem, self._now = ca_pem, now

    def identity(self, client: str, claim: bytes) -> bytes:
        """The key of the client's certificate.

        Raises:
            SecureAggregationError: NOT_ENROLLED: it is no certificate of this client, not valid now, or not of this authority.
        """
        found = _verified(self._ca_pem, claim)
        if found.reason:
            raise _refused(client, found.reason)
        assert found.name is not None
        if found.name != Named(Role.CLIENT, client):
            raise _refused(client, f"it is for {found.name.uri}")
        if not found.begins <= self._now() <= found.ends:
            raise _refused(client, f"it is valid from {found.begins:%Y-%m-%d %H:%M} to {found.ends:%Y-%m-%d %H:%M} UTC")
        return found.key


def identity_of(bundle: TlsBundle) -> tuple[Identity, bytes]:
    """Who this site is in secure aggregation, and the claim that proves it.

    Raises:
        TlsError: its key is on another curve than P-256.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key(bundle.key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TlsError(
            f"{bundle.directory}: secure aggregation needs a key on the curve P-256",
            hint="issue the certificate again: fedlearn certs issue NAME --role client",
        )
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    pair: KeyPair = key_of_secret(Suite.P256_AES256, secret)
    der = x509.load_pem_x509_certificate(bundle.cert_pem).public_bytes(serialization.Encoding.DER)
    return Identity(bundle.identity.name, pair), der


class _Verified:
    """What a certificate says, once its signature was checked; the reason why it is refused, else."""

    reason = ""
    name: Named | None = None
    key = b""
    begins = ends = dt.datetime.min.replace(tzinfo=dt.UTC)


@lru_cache(maxsize=4096)
def _verified(ca_pem: bytes, der: bytes) -> _Verified:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    found = _Verified()
    try:
        ca, cert = x509.load_pem_x509_certificate(ca_pem), x509.load_der_x509_certificate(der)
        cert.verify_directly_issued_by(ca)
        found.name = Named.from_uris(certificate_uris(cert))
        key = cert.public_key()
    except TlsError as error:
        found.reason = error.message
        return found
    except Exception:  # the bytes are anybody's, and what a parser of certificates raises is its own business
        found.reason = "it is no certificate of this site's authority"
        return found
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        found.reason = "its key is not on the curve P-256"
    elif not _may_sign(cert):
        found.reason = "it is not a client's: its key may not be used to authenticate one"
    else:
        found.key = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        found.begins, found.ends = cert.not_valid_before_utc, cert.not_valid_after_utc
    return found


def _may_sign(cert: x509.Certificate) -> bool:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage


def _refused(client: str, why: str) -> SecureAggregationError:
    return SecureAggregationError(
        Breach.NOT_ENROLLED, f"the certificate of {client!r} is refused: {why}", culprits=(client,)
    )
