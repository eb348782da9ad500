"""Ring elements and their bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.ring import RING_BITS, dtype_of, from_ring, pack, packed_bytes, to_ring, unpack


@given(st.sampled_from(RING_BITS), st.data())
def test_signed_integers_survive_the_ring_and_the_wire(bits, data):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = data.draw(st.lists(st.integers(low, high), max_size=40))
    array = np.array(values, dtype=np.int64)
    vector = to_ring(array, bits)
    packed = pack(vector, bits)
    assert len(packed) == packed_bytes(len(values), bits)
    assert from_ring(unpack(packed, len(values), bits), bits).tolist() == values
    assert from_ring(vector, bits).tolist() == values


@pytest.mark.parametrize(("bits", "expected"), [(16, "feff0100"), (24, "feffff010000"), (32, "feffffff01000000")])
def test_the_bytes_are_little_endian(bits, expected):
    assert pack(to_ring(np.array([-2, 1]), bits), bits).hex() == expected


@given(st.sampled_from(RING_BITS), st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=10))
def test_addition_is_modulo_two_to_the_b(bits, values):
    total = np.zeros(1, dtype=dtype_of(bits))
    for value in values:
        total += np.array([value], dtype=np.uint64).astype(dtype_of(bits))
    modulus = 2**bits
    assert int(from_ring(total, bits)[0]) % modulus == sum(values) % modulus


@pytest.mark.parametrize("bits", RING_BITS)
@pytest.mark.parametrize("size", [0, 1, 7, 13])
def test_a_vector_of_another_length_is_refused(bits, size):
    with pytest.raises(SecureAggregationError) as caught:
        unpack(bytes(size), 3, bits)
    assert caught.value.breach is Breach.BAD_VECTOR


def test_other_rings_are_refused():
    with pytest.raises(ValueError, match="16, 24, 32"):
        dtype_of(31)
