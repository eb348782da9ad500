"""The primitives against Wycheproof's vectors, good and bad, and the protocol's own rules on top of them."""

import json
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.primitives import (
    KeyPair,
    SeededDraw,
    Suite,
    agree,
    check_public,
    derive,
    key_of_secret,
    key_stream,
    new_identity,
    new_key,
    seal,
    sign,
    unseal,
    verified,
)

FOLDER = Path(__file__).parents[2] / "vectors" / "secagg" / "wycheproof"


def vectors(name):
    rows = json.loads((FOLDER / f"{name}_test.json").read_text())
    assert len(rows) >= 20
    return rows


def hexed(row, *names):
    return [bytes.fromhex(row[name]) for name in names]


@pytest.mark.parametrize("row", vectors("x25519"), ids=lambda r: r["tcId"])
def test_x25519(row):
    public, private, shared = hexed(row, "public", "private", "shared")
    if not any(shared):
        with pytest.raises(SecureAggregationError) as caught:
            agree(Suite.X25519_AES256, private, public)
        assert caught.value.breach is Breach.BAD_KEY
        with pytest.raises(SecureAggregationError):
            check_public(Suite.X25519_AES256, public)
    else:
        assert agree(Suite.X25519_AES256, private, public) == shared
        check_public(Suite.X25519_AES256, public)


def test_the_x25519_vectors_hold_points_of_low_order():
    assert sum(not any(bytes.fromhex(row["shared"])) for row in vectors("x25519")) > 20


@pytest.mark.parametrize("row", vectors("hkdf_sha256"), ids=lambda r: r["tcId"])
def test_hkdf(row):
    ikm, salt, info, okm = hexed(row, "ikm", "salt", "info", "okm")
    if row["result"] == "invalid":
        with pytest.raises(ValueError, match="large"):
            HKDF(hashes.SHA256(), row["size"], salt, info)
    else:
        assert HKDF(hashes.SHA256(), row["size"], salt, info).derive(ikm) == okm


@pytest.mark.parametrize("row", vectors("aes_gcm"), ids=lambda r: r["tcId"])
def test_aes_256_gcm(row):
    key, iv, aad, msg, ct, tag = hexed(row, "key", "iv", "aad", "msg", "ct", "tag")
    if row["result"] == "invalid":
        with pytest.raises(InvalidTag):
            AESGCM(key).decrypt(iv, ct + tag, aad)
    else:
        assert AESGCM(key).encrypt(iv, msg, aad) == ct + tag
        assert AESGCM(key).decrypt(iv, ct + tag, aad) == msg


@pytest.mark.parametrize("row", [r for r in vectors("ed25519") if r["result"] != "acceptable"], ids=lambda r: r["tcId"])
def test_ed25519(row):
    public, message, signature = hexed(row, "pk", "msg", "sig")
    assert verified(Suite.X25519_AES256, public, signature, message) is (row["result"] == "valid")


@pytest.mark.parametrize("row", vectors("ecdsa_secp256r1_sha256"), ids=lambda r: r["tcId"])
def test_ecdsa_p256(row):
    public, message, signature = hexed(row, "pk", "msg", "sig")
    assert verified(Suite.P256_AES256, public, signature, message) is (row["result"] == "valid")


@pytest.mark.parametrize("row", vectors("ecdh_secp256r1_ecpoint"), ids=lambda r: r["tcId"])
def test_ecdh_p256(row):
    public, private, shared = hexed(row, "public", "private", "shared")
    private = private[-32:].rjust(32, b"\0")
    if row["result"] == "invalid":
        with pytest.raises(SecureAggregationError):
            agree(Suite.P256_AES256, private, public)
    else:
        assert agree(Suite.P256_AES256, private, public) == shared


def test_derive_is_hkdf_with_the_protocols_salt():
    expected = HKDF(hashes.SHA256(), 32, b"fedlearn/secagg/v1", b"use").derive(bytes(32))
    assert derive(bytes(32), b"use") == expected
    assert derive(bytes(32), b"other use") != expected


@pytest.mark.parametrize("suite", Suite)
def test_two_sides_agree_and_a_key_follows_from_its_secret(suite):
    draw = SeededDraw(b"two sides")
    one, other = new_key(suite, draw), new_key(suite, draw)
    assert agree(suite, one.secret, other.public) == agree(suite, other.secret, one.public)
    assert key_of_secret(suite, one.secret) == one
    check_public(suite, one.public)
    assert len(one.public) == suite.public_bytes


@pytest.mark.parametrize("suite", Suite)
def test_signatures(suite):
    draw = SeededDraw(b"signatures")
    one, other = new_identity(suite, draw), new_identity(suite, draw)
    signature = sign(suite, one.secret, b"message")
    assert verified(suite, one.public, signature, b"message")
    assert sign(suite, one.secret, b"message") == signature, "no nonce may be drawn for it"
    for public, given, message in (
        (one.public, signature, b"messagf"),
        (other.public, signature, b"message"),
        (one.public, signature[:-1], b"message"),
        (one.public, b"", b"message"),
        (b"", signature, b"message"),
        (one.public[:-1], signature, b"message"),
    ):
        assert not verified(suite, public, given, message)


@pytest.mark.parametrize("suite", Suite)
def test_a_key_stream_can_be_entered_anywhere(suite):
    whole = key_stream(suite, b"k" * 32).update(bytes(1024))
    assert len(set(whole)) > 200
    for offset in (0, 64, 640):
        assert key_stream(suite, b"k" * 32, offset).update(bytes(1024 - offset)) == whole[offset:]


def test_the_suites_differ_in_their_streams():
    aes, chacha, p256 = (key_stream(suite, bytes(32)).update(bytes(64)) for suite in Suite)
    assert aes == p256 != chacha
    # RFC 8439, appendix A.1, vector 1: key, nonce and counter all zero; SP 800-38A's cipher under a zero key, from NIST's KAT.
    assert chacha.hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert aes.hex().startswith("dc95c078a2408989ad48a21492842087")


@pytest.mark.parametrize("change", ["key", "ciphertext", "associated"])
def test_what_was_sealed_opens_only_as_it_was(change):
    sealed = seal(b"k" * 32, b"two shares", b"from 1 to 2")
    assert unseal(b"k" * 32, sealed, b"from 1 to 2") == b"two shares"
    key = b"K" * 32 if change == "key" else b"k" * 32
    ciphertext = bytes([sealed[0] ^ 1]) + sealed[1:] if change == "ciphertext" else sealed
    associated = b"from 2 to 1" if change == "associated" else b"from 1 to 2"
    with pytest.raises(SecureAggregationError) as caught:
        unseal(key, ciphertext, associated)
    assert caught.value.breach is Breach.BAD_SHARE


@pytest.mark.parametrize("suite", Suite)
@pytest.mark.parametrize(
    "public", [b"", bytes(32), bytes(33), b"\x02" + b"\xff" * 32, b"\xff" * 31, b"\x04" + bytes(64)]
)
def test_bytes_that_are_no_good_point_are_refused(suite, public):
    with pytest.raises(SecureAggregationError) as caught:
        check_public(suite, public)
    assert caught.value.breach is Breach.BAD_KEY


def test_a_seeded_draw_repeats_and_never_repeats_itself():
    one, other = SeededDraw(b"seed"), SeededDraw(b"seed")
    first = one(32)
    assert first == other(32)
    assert one(32) != first
    assert SeededDraw(b"seee")(32) != first


def test_a_key_pair_does_not_show_its_secret():
    pair = KeyPair(b"public", b"secret-secret")
    assert "secret-secret" not in repr(pair)
