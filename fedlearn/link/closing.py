"""A coordinator's word that a run is over, as a site can keep it: signed with the key of the server's certificate, which goes with it.

A site that was charged for a whole run gets back what did not take place (`fedlearn.privacy.ledger.Ledger.close`), and lets nothing more of the run leave.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Final

from fedlearn.errors import LimitExceededError, RemoteProtocolError, TlsError
from fedlearn.link.tls import Identity, Role, certificate_uris
from fedlearn.privacy.chain import ClosedRun, public_text

if TYPE_CHECKING:
    from fedlearn.link.tls import TlsBundle

MAX_CLOSING_BYTES: Final = 32 * 1024
"""The longest word; a certificate is most of it."""


def closing(bundle: TlsBundle, run: str, rounds: int) -> bytes:
    """The coordinator's word.

    Args:
        bundle: of the server.
        run: the run's name.
        rounds: attempts at rounds that took place, void ones among them.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(bundle.key_pem, password=None)
    closed = ClosedRun.signed(run, rounds, key)  # type: ignore[arg-type]  # a bundle's is an elliptic curve's
    word = {"rounds": rounds, "signature": closed.signature.hex(), "certificate": bundle.cert_pem.decode()}
    return json.dumps(word, sort_keys=True).encode()


def read_closing(word: bytes, run: str, ca_pem: bytes, now: dt.datetime | None = None) -> tuple[ClosedRun, str]:
    """What the coordinator says, and the key that it is signed with, as `chain.public_text` has it. The signature is the ledger's to check.

    Args:
        word: what came.
        run: the run that it came for.
        ca_pem: the authority that servers must be certified by.
        now: the time to check validity at; the present without it.

    Raises:
        LimitExceededError: it is too long.
        RemoteProtocolError: it cannot be read, or its certificate is not a server's of this authority.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    if len(word) > MAX_CLOSING_BYTES:
        raise LimitExceededError(f"end of run {run}: {len(word)} bytes, limit MAX_CLOSING_BYTES is {MAX_CLOSING_BYTES}")
    try:
        tree = json.loads(word)
        if type(tree["rounds"]) is not int:
            raise TypeError  # noqa: TRY301  # one way out for all that is not as it must be
        closed = ClosedRun(run, tree["rounds"], bytes.fromhex(tree["signature"]))
        cert = x509.load_pem_x509_certificate(tree["certificate"].encode())
        cert.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem))
        role = Identity.from_uris(certificate_uris(cert)).role
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidSignature, TlsError) as error:
        raise RemoteProtocolError(f"end of run {run}: it cannot be taken: {error or type(error).__name__}") from None
    at = now or dt.datetime.now(dt.UTC)
    if role is not Role.SERVER or not cert.not_valid_before_utc <= at <= cert.not_valid_after_utc:
        raise RemoteProtocolError(f"end of run {run}: its certificate is of the role {role.value}, or not valid now")
    return closed, public_text(cert)
