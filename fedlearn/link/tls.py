"""Who is who on the link: a development authority, certificates with a role, and the bundle that an end loads.

A certificate carries one URI, `fedlearn://ROLE/NAME`, as its subject alternative name (RFC 5280, section 4.2.1.6). It is
the peer's only identity: nothing that a peer says about itself is. Keys are P-256, readable by their owner alone.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedlearn.errors import TlsError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_FILE: Final = "ca.pem"
CA_KEY_FILE: Final = "ca.key"
CERT_FILE: Final = "cert.pem"
KEY_FILE: Final = "key.pem"
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "::1")

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_URI = re.compile(r"fedlearn://(server|client|operator)/(.+)")
_BACKDATE = dt.timedelta(minutes=5)
_CA_DAYS: Final = 3650
_LEAF_DAYS: Final = 365


class Role(Enum):
    """What a certificate's holder may do."""

    SERVER = "server"
    CLIENT = "client"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Identity:
    """Who a certificate says its holder is."""

    role: Role
    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TlsError(
                f"identity: got the name {self.name!r}, expected 1 to 64 of a-z, 0-9, dot, dash and underscore,"
                " with a letter or digit first and last"
            )

    @property
    def uri(self) -> str:
        """`fedlearn://ROLE/NAME`."""
        return f"fedlearn://{self.role.value}/{self.name}"

    @classmethod
    def from_uris(cls, uris: Sequence[str]) -> Identity:
        """The one identity among a certificate's subject alternative names.

        Raises:
            TlsError: there is none, or more than one.
        """
        found = [match for uri in uris if (match := _URI.fullmatch(uri))]
        if len(found) != 1:
            raise TlsError(
                f"certificate: got {len(found)} fedlearn:// names, expected exactly one",
                hint="issue the certificate with `issue()`; one made by other means needs a URI such as fedlearn://client/NAME",
            )
        return cls(Role(found[0][1]), found[0][2])


@dataclass(frozen=True)
class TlsBundle:
    """One end's certificate, key and authority, checked when loaded.

    Attributes:
        identity: who the certificate says this end is.
        ca_pem: the authority that peers must be signed by.
        cert_pem: this end's certificate.
        key_pem: this end's private key; in no repr.
        directory: where the three files lie.
    """

    identity: Identity
    ca_pem: bytes = field(repr=False)
    cert_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    directory: Path

    @classmethod
    def load(cls, directory: Path | str, *, now: dt.datetime | None = None) -> TlsBundle:
        """Read `ca.pem`, `cert.pem` and `key.pem` from `directory`.

        Args:
            directory: the folder that `issue` wrote.
            now: the time to check validity at; the present without it.

        Raises:
            TlsError: a file is missing or unreadable, the certificate is not valid now, is not signed by that
                authority, does not fit the key, or carries no identity.
        """
        folder = Path(directory)
        ca_pem, cert_pem, key_pem = (_read(folder / name) for name in (CA_FILE, CERT_FILE, KEY_FILE))
        ca, cert = _certificate(ca_pem, folder / CA_FILE), _certificate(cert_pem, folder / CERT_FILE)
        key = _private_key(key_pem, folder / KEY_FILE)
        _check_dates(ca, folder / CA_FILE, now)
        _check_dates(cert, folder / CERT_FILE, now)
        _check_signed(cert, ca, folder)
        if key.public_key() != cert.public_key():
            raise TlsError(
                f"{folder / KEY_FILE}: the key does not belong to {CERT_FILE}",
                hint="the two files come from different `issue` runs; issue the certificate again",
            )
        return cls(Identity.from_uris(certificate_uris(cert)), ca_pem, cert_pem, key_pem, folder)


def create_authority(directory: Path | str, *, name: str = "fedlearn development CA", days: int = _CA_DAYS) -> Path:
    """Create a development authority: `ca.pem` and `ca.key` in `directory`, which may not hold one yet.

    Returns:
        The folder, to be passed to `issue`.

    Raises:
        TlsError: there is an authority already, or the folder cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = Path(directory)
    if (folder / CA_KEY_FILE).exists():
        raise TlsError(
            f"{folder / CA_KEY_FILE} exists",
            hint="an authority is never overwritten: every certificate that it signed would stop working",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    cert = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder, CA_KEY_FILE, _key_pem(key), 0o600)
    _write(folder, CA_FILE, _cert_pem(cert), 0o644)
    return folder


def issue(
    authority: Path | str,
    name: str,
    role: Role,
    out: Path | str,
    *,
    hosts: Sequence[str] = LOCAL_HOSTS,
    days: float = _LEAF_DAYS,
    not_before: dt.datetime | None = None,
) -> Path:
    """Issue a certificate and write `ca.pem`, `cert.pem` and `key.pem` into `out`.

    Args:
        authority: the folder of `create_authority`.
        name: the holder's name, such as `cleveland`.
        role: what the holder may do; it also decides the key's usage, so a client's certificate cannot serve.
        out: the folder to write; created where missing.
        hosts: DNS names and IP addresses that clients dial; used for servers only.
        days: validity.
        not_before: start of validity; five minutes ago without it, so that clocks may differ a little.

    Raises:
        TlsError: the authority is missing or unreadable, the name is not allowed, or `out` cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    identity = Identity(role, name)
    ca_folder, folder = Path(authority), Path(out)
    ca_pem = _read(ca_folder / CA_FILE)
    ca = _certificate(ca_pem, ca_folder / CA_FILE)
    ca_key = _private_key(_read(ca_folder / CA_KEY_FILE), ca_folder / CA_KEY_FILE)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    if role is Role.SERVER:
        names += [_host(host) for host in hosts]
        purpose = ExtendedKeyUsageOID.SERVER_AUTH
    else:
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    cert = (
        _builder(subject, ca.subject, key.public_key(), days, not_before)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(folder, KEY_FILE, _key_pem(key), 0o600)
    _write(folder, CERT_FILE, _cert_pem(cert), 0o644)
    _write(folder, CA_FILE, ca_pem, 0o644)
    return folder


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    days: float,
    not_before: dt.datetime | None = None,
) -> x509.CertificateBuilder:
    from cryptography import x509

    start = not_before or dt.datetime.now(dt.UTC) - _BACKDATE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _BACKDATE + dt.timedelta(days=days))
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not sign,
        crl_sign=not sign,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as ser

    return key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())


def _cert_pem(cert: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization as ser

    return cert.public_bytes(ser.Encoding.PEM)


def _write(folder: Path, name: str, data: bytes, mode: int) -> None:
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Created with its mode, so that a key is never readable by others, not even for a moment.
        path.unlink(missing_ok=True)
        path.touch(mode=mode, exist_ok=False)
        path.write_bytes(data)
    except OSError as error:
        raise TlsError(f"{path}: cannot be written: {error.strerror}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise TlsError(f"{path}: no such file", hint="the folder must hold ca.pem, cert.pem and key.pem") from None
    except OSError as error:
        raise TlsError(f"{path}: cannot be read: {error.strerror}") from None


def _certificate(pem: bytes, path: Path) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise TlsError(f"{path}: not a PEM certificate") from None


def _private_key(pem: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise TlsError(f"{path}: not an unencrypted PEM private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TlsError(f"{path}: got another kind of key, expected an elliptic-curve key")
    return key


def _check_dates(cert: x509.Certificate, path: Path, now: dt.datetime | None) -> None:
    at = now or dt.datetime.now(dt.UTC)
    if at > cert.not_valid_after_utc:
        raise TlsError(f"{path}: expired on {cert.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", hint="issue it again")
    if at < cert.not_valid_before_utc:
        raise TlsError(
            f"{path}: not valid before {cert.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            hint="check this machine's clock",
        )


def _check_signed(cert: x509.Certificate, ca: x509.Certificate, folder: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    try:
        cert.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        raise TlsError(
            f"{folder / CERT_FILE}: not signed by {CA_FILE} beside it",
            hint="both files must come from the same authority; issue the certificate again",
        ) from None


def certificate_uris(cert: x509.Certificate) -> list[str]:
    """The URIs among a certificate's subject alternative names."""
    from cryptography import x509

    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return list(names.get_values_for_type(x509.UniformResourceIdentifier))
