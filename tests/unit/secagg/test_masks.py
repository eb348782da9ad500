"""Masks: the same for every thread count, undone by themselves, uniform."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.secagg.masks import BLOCK_BYTES, apply_masks
from fedlearn.secagg.primitives import SeededDraw, Suite, key_stream
from fedlearn.secagg.ring import RING_BITS, dtype_of, from_ring

PER_BLOCK = BLOCK_BYTES // 4


def keys(count, seed=b"keys"):
    draw = SeededDraw(seed)
    return [draw(32) for _ in range(count)]


@pytest.mark.parametrize("suite", Suite)
@pytest.mark.parametrize("bits", RING_BITS)
def test_masks_are_the_ciphers_stream_added_and_taken_away(suite, bits):
    dtype = dtype_of(bits)
    one, other = keys(2)
    vector = np.arange(1000, dtype=dtype)
    expected = vector.copy()
    expected += np.frombuffer(key_stream(suite, one).update(bytes(vector.nbytes)), dtype=dtype)
    expected -= np.frombuffer(key_stream(suite, other).update(bytes(vector.nbytes)), dtype=dtype)
    apply_masks(vector, [one], [other], suite=suite)
    assert np.array_equal(vector, expected)


@given(
    st.sampled_from(list(Suite)),
    st.sampled_from([1, 15, 16, 17, PER_BLOCK - 1, PER_BLOCK, PER_BLOCK + 1, 3 * PER_BLOCK + 5]),
    st.integers(2, 5),
)
def test_threads_change_nothing_and_masks_undo_themselves(suite, length, threads):
    plus, minus = keys(2), keys(3, b"minus")
    one, many = (np.arange(length, dtype="<u4") for _ in range(2))
    apply_masks(one, plus, minus, suite=suite)
    apply_masks(many, plus, minus, suite=suite, threads=threads)
    assert np.array_equal(one, many)
    apply_masks(many, minus, plus, suite=suite, threads=threads)
    assert np.array_equal(many, np.arange(length))


def test_more_keys_than_contexts_are_open_at_once():
    many = keys(2100)
    vector = np.zeros(16, dtype="<u4")
    apply_masks(vector, many, many[:-1], suite=Suite.X25519_AES256)
    alone = np.zeros(16, dtype="<u4")
    apply_masks(alone, many[-1:], [], suite=Suite.X25519_AES256)
    assert np.array_equal(vector, alone)


@pytest.mark.parametrize("suite", [Suite.X25519_AES256, Suite.X25519_CHACHA20])
@pytest.mark.parametrize("bits", RING_BITS)
def test_a_masked_vector_is_uniform(suite, bits):
    vector = np.zeros(400_000, dtype=dtype_of(bits))
    apply_masks(vector, keys(1), keys(1, b"other"), suite=suite)
    values = from_ring(vector, bits) & (2**bits - 1)
    for shift in (0, bits - 8):  # the lowest and the highest byte: 255 degrees, 99.99th percentile 347
        counts = np.bincount((values >> shift) & 255, minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 347
    every_bit = [(values >> bit & 1).mean() for bit in range(bits)]
    assert max(abs(share - 0.5) for share in every_bit) < 5 * 0.5 / 400_000**0.5
