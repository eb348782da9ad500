"""Encoding: within a unit of the value, without bias, clipped, and never able to wrap."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import StudyError, UpdateError
from fedlearn.secagg.primitives import SeededDraw
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.ring import RING_BITS, from_ring

KEY = b"k" * 32


def test_every_value_is_within_a_unit():
    encoding = Encoding(5, 10, 2.0)
    update = np.array([0.0, 0.5, -0.5, 1e-9, -1.0])
    vector = from_ring(encoding.encode(update, 1, KEY), 32)
    assert np.abs(vector[:-1] - update * encoding.scale).max() < 1
    assert vector[0] == 0
    assert vector[-1] == 1


def test_rounding_has_no_bias():
    encoding = Encoding(1, 3, 1.0, ring_bits=16, value_bits=3)
    draw = SeededDraw(b"bias")
    update = np.array([0.3])  # 0.6 units
    mean = np.mean([from_ring(encoding.encode(update, 1, draw(32)), 16)[0] for _ in range(4000)])
    assert abs(mean - 0.6) < 5 * math.sqrt(0.24 / 4000)


def test_the_same_key_rounds_the_same_way():
    encoding = Encoding(1000, 3, 1.0)
    update = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    assert np.array_equal(encoding.encode(update, 1, KEY), encoding.encode(update, 1, KEY))
    assert not np.array_equal(encoding.encode(update, 1, KEY), encoding.encode(update, 1, b"o" * 32))


@pytest.mark.parametrize("norm", [0.5, 1.0, 1.5, 1e30])
def test_the_norm_is_clipped_jointly(norm):
    encoding = Encoding(1000, 3, 1.0)
    update = np.random.default_rng(2).normal(size=1000)
    update *= norm / np.linalg.norm(update)
    got = from_ring(encoding.encode(update, 1, KEY), 32)[:-1]
    assert np.linalg.norm(got) <= encoding.norm_bound
    assert np.allclose(got / encoding.scale, update * min(1, 1 / norm), atol=1 / encoding.scale)


def test_a_tighter_bound_on_coordinates_clamps_and_gives_finer_steps():
    coarse, fine = Encoding(3, 4, 1.0), Encoding(3, 4, 1.0, clip_max=0.01)
    assert fine.scale == 100 * coarse.scale
    got = from_ring(fine.encode(np.array([0.5, -0.5, 0.005]), 1, KEY), 32)[:-1] / fine.scale
    assert np.allclose(got, [0.01, -0.01, 0.005], atol=1 / fine.scale)


@given(st.sampled_from(RING_BITS), st.integers(3, 200), st.data())
def test_the_sum_of_extreme_updates_never_wraps(bits, clients, data):
    value_bits = data.draw(st.sampled_from([0, 3, 8]))
    encoding = Encoding(4, clients, 1.0, ring_bits=bits, value_bits=value_bits)
    update = np.array([1.0, -1.0, 0.0, 0.0]) * data.draw(st.sampled_from([1.0, 1e6]))
    vector = encoding.encode(update, 1, KEY)
    total = sum((vector for _ in range(clients)), np.zeros_like(vector))
    exact = clients * from_ring(vector, bits)
    assert np.array_equal(from_ring(total, bits), exact)
    assert encoding.decode(total).weight == clients


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 1000)), min_size=3, max_size=8))
def test_the_weighted_mean_comes_back(clients):
    encoding = Encoding(20, len(clients), 100.0, weight_cap=50)
    draw = SeededDraw(b"weights")
    total = np.zeros(21, dtype="<u4")
    updates = [np.random.default_rng(seed).normal(size=20) for _, seed in clients]
    for (weight, _), update in zip(clients, updates, strict=True):
        total += encoding.encode(update, weight, draw(32))
    decoded, weights = encoding.decode(total), [weight for weight, _ in clients]
    assert decoded.weight == sum(weights)
    if not sum(weights):
        with pytest.raises(UpdateError, match="total weight is 0"):
            decoded.mean()
    else:
        expected = np.average(updates, axis=0, weights=weights)
        unit = 50 / encoding.scale / sum(weights) * len(clients)
        assert np.abs(decoded.mean() - expected).max() <= unit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ring_bits": 31}, "expected one of"),
        ({"ring_bits": 16, "value_bits": 14}, "could wrap"),
        ({"ring_bits": 16, "clients": 20_000}, "could wrap"),
        ({"value_bits": 33}, "could wrap"),
        ({"value_bits": 2}, "could wrap"),
        ({"weight_cap": 2**31}, "weights up to"),
        ({"ring_bits": 16, "weight_cap": 4000}, "weights up to"),
        ({"noise_deviation": 2.0**30}, "could wrap"),
        ({"noise_deviation": math.nan}, "noise_deviation"),
        ({"length": 0}, "length"),
        ({"clients": 0}, "clients"),
        ({"clip_l2": 0.0}, "clip_l2"),
        ({"clip_l2": math.inf}, "clip_l2"),
        ({"clip_l2": 5e-324}, "too small"),
        ({"clip_max": -1.0}, "clip_max"),
    ],
)
def test_a_plan_that_cannot_hold_is_refused_when_it_is_read(changes, message):
    with pytest.raises(StudyError, match=message):
        Encoding(**{"length": 10, "clients": 10, "clip_l2": 1.0} | changes)


@pytest.mark.parametrize(
    ("update", "weight"),
    [
        (np.array([1.0, np.nan]), 1),
        (np.array([1.0, np.inf]), 1),
        (np.array([1e200, 1e200]), 1),
        (np.array([1.3e154, 1.3e154]), 1),
        (np.ones(3), 1),
        (np.ones(2, dtype=np.int64), 1),
        (np.ones((2, 1)), 1),
        (np.ones(2), 6),
        (np.ones(2), -1),
    ],
)
def test_an_update_that_cannot_be_encoded_is_refused(update, weight):
    with pytest.raises(UpdateError):
        Encoding(2, 10, 1.0, weight_cap=5).encode(update, weight, KEY)


def test_the_widest_values_that_fit_are_chosen():
    assert Encoding(1, 3, 1.0).value_bits == 30
    assert Encoding(1, 100, 1.0, ring_bits=24).value_bits == 17
    assert Encoding(1, 100, 1.0, ring_bits=24, noise_deviation=2.0**20).value_bits == 15


def test_bytes_on_the_wire():
    assert Encoding(999, 10, 1.0, ring_bits=24).upload_bytes == 3000
    assert Encoding(999, 10, 1.0).upload_bytes == 4000
