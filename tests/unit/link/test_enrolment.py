"""Certificates as claims about identity keys: each party believes its own authority, and nobody's word."""

from __future__ import annotations

import datetime as dt
from random import Random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedlearn.link.enrolment import CertificateEnrolment, identity_of
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.primitives import Suite, sign, verified


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return create_authority(tmp_path_factory.mktemp("ca"))


def bundle(authority, name, role=Role.CLIENT, **more):
    return TlsBundle.load(issue(authority, name, role, authority.parent / f"{name}-{role.value}", **more))


def refused(enrolment, client, claim):
    with pytest.raises(SecureAggregationError) as caught:
        enrolment.identity(client, claim)
    assert caught.value.breach is Breach.NOT_ENROLLED
    assert caught.value.culprits == (client,)
    return caught.value.message


def test_a_clients_certificate_proves_the_key_that_it_signs_with(authority):
    ada = bundle(authority, "ada")
    identity, claim = identity_of(ada)
    assert identity.name == "ada"
    assert identity.key.secret not in repr((identity, ada)).encode()
    key = CertificateEnrolment(ada.ca_pem).identity("ada", claim)
    assert key == identity.key.public
    assert verified(Suite.P256_AES256, key, sign(Suite.P256_AES256, identity.key.secret, b"x"), b"x")


def test_another_name_role_authority_or_time_is_refused(authority, tmp_path):
    ada = bundle(authority, "ada")
    enrolment = CertificateEnrolment(ada.ca_pem)
    _, claim = identity_of(ada)
    assert "it is for fedlearn://client/ada" in refused(enrolment, "bob", claim)
    for role in (Role.SERVER, Role.OPERATOR):
        _, other = identity_of(bundle(authority, "eve", role))
        assert f"fedlearn://{role.value}/eve" in refused(enrolment, "eve", other) or role is Role.SERVER
    stranger = create_authority(tmp_path / "stranger")
    _, forged = identity_of(bundle(stranger, "ada"))
    assert "authority" in refused(enrolment, "ada", forged)
    late = CertificateEnrolment(ada.ca_pem, lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=400))
    assert "it is valid from" in refused(late, "ada", claim)


@pytest.mark.parametrize("claim", [b"", b"no certificate", bytes(33)])
def test_what_is_no_certificate_is_refused(authority, claim):
    assert "authority" in refused(CertificateEnrolment((authority / "ca.pem").read_bytes()), "ada", claim)


def test_an_altered_certificate_is_refused(authority):
    _, claim = identity_of(bundle(authority, "ada"))
    der = bytearray(claim)
    at = bytes(der).index(b"fedlearn://client/ada")
    der[at : at + 21] = b"fedlearn://client/eve"
    enrolment = CertificateEnrolment((authority / "ca.pem").read_bytes())
    assert "authority" in refused(enrolment, "eve", bytes(der))


def test_the_authoritys_own_certificate_is_no_clients(authority):
    ca_pem = (authority / "ca.pem").read_bytes()
    der = x509.load_pem_x509_certificate(ca_pem).public_bytes(Encoding.DER)
    refused(CertificateEnrolment(ca_pem), "ada", der)


def test_whatever_bytes_a_client_sends_are_refused_by_name(authority):
    """One that ended in another error would end the coordinator's run, not that client's part in it."""
    _, claim = identity_of(bundle(authority, "ada"))
    enrolment, random = CertificateEnrolment((authority / "ca.pem").read_bytes()), Random(5)
    version = claim.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09", 1)
    assert version != claim
    refused(enrolment, "ada", version)
    for _ in range(2_000):
        altered = bytearray(claim)
        altered[random.randrange(len(altered))] ^= random.randrange(1, 256)
        refused(enrolment, "ada", bytes(altered))
        refused(enrolment, "ada", claim[: random.randrange(len(claim))])
