"""Our own pinned vectors: what the protocol says today, byte for byte, it says tomorrow."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from fedlearn.secagg.breach import SecureAggregationError
from fedlearn.secagg.plan import Profile
from fedlearn.secagg.primitives import SeededDraw, Suite, key_of_secret, key_stream, unseal, verified
from fedlearn.secagg.ring import from_ring, unpack
from fedlearn.secagg.shamir import check_share, combine
from tests.vectors.secagg import generate

PINNED = {
    name: json.loads((generate.FOLDER / f"{name}.json").read_text()) for name in ("primitives", "noise", "transcripts")
}
FIXED = PINNED["primitives"]


def test_nothing_has_changed():
    assert json.loads(json.dumps(generate.primitives())) == FIXED


def test_no_noise_has_changed():
    assert json.loads(json.dumps(generate.noise())) == PINNED["noise"]


@pytest.mark.parametrize("row", PINNED["transcripts"], ids=lambda r: r["suite"])
def test_no_message_of_an_attempt_has_changed(row):
    made = generate.transcript(Suite[row["suite"]], Profile[row["profile"]], row["ring_bits"])
    assert json.loads(json.dumps(made)) == row


@pytest.mark.parametrize("suite", Suite, ids=lambda s: s.name)
def test_the_pinned_keys_and_streams_are_read_back(suite):
    row = {name: bytes.fromhex(value) for name, value in FIXED["keys"][suite.name].items()}
    assert key_of_secret(suite, row["secret"]).public == row["public"]
    assert verified(suite, row["identity"], row["signature_of_message"], b"message")
    for at in (0, 1024):
        assert key_stream(suite, bytes(range(32)), at).update(bytes(32)) == row[f"stream_at_{at}"]


def test_the_pinned_shares_and_ciphertext_are_read_back():
    row = FIXED["shamir"]
    shares = {x: bytes.fromhex(share) for x, share in enumerate(row["shares"], start=1)}
    for points in itertools.combinations(shares, row["threshold"]):
        assert combine({x: shares[x] for x in points}).hex() == row["secret"]
    for bad in row["bad"].values():
        with pytest.raises(SecureAggregationError):
            check_share(bytes.fromhex(bad))
    sealed = {name: bytes.fromhex(value) for name, value in FIXED["seal"].items()}
    assert unseal(sealed["key"], sealed["sealed"], sealed["data"]) == sealed["plain"]


def test_the_pinned_vectors_are_read_back():
    for bits, packed in FIXED["packing"].items():
        data, width = bytes.fromhex(packed), int(bits)
        assert from_ring(unpack(data, 4, width), width).tolist() == [-3, 0, 1, 2 ** (width - 1) - 1]
    assert np.frombuffer(bytes.fromhex(FIXED["encoding"]["packed"])[-3:], dtype=np.uint8).tolist() == [7, 0, 0]


def test_the_vectors_are_where_the_generator_writes_them():
    assert Path(__file__).parents[2] / "vectors" / "secagg" == generate.FOLDER
    assert SeededDraw(b"vectors")(4).hex() != SeededDraw(b"other")(4).hex()
