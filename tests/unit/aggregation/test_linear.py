"""The integer accumulator: exact in any order, and refusing before it changes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.aggregation.linear import (
    BLOCK,
    FINE_QUANTUM_BITS,
    HEADROOM,
    QUANTUM_BITS,
    IntegerSum,
    quantum_bits_for,
)
from fedlearn.arrays import Spec
from fedlearn.errors import UpdateError

SPECS = {"w": Spec((2, 3), "float32"), "b": Spec((), "float64"), "none": Spec((0, 4), "float32")}

values = st.floats(-1000, 1000, width=32)
weights = st.integers(0, 1000)


@st.composite
def terms(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], int]:
    return _term([draw(values) for _ in range(7)]), draw(weights)


def _term(numbers: list[float]) -> dict[str, np.ndarray]:
    return {
        "w": np.array(numbers[:6], dtype=np.float32).reshape(2, 3),
        "b": np.array(numbers[6], dtype=np.float64),
        "none": np.zeros((0, 4), dtype=np.float32),
    }


def _total(pairs: list[tuple[dict[str, np.ndarray], int]]) -> IntegerSum:
    total = IntegerSum(SPECS)
    for term, weight in pairs:
        total.add(term, weight)
    return total


def _state(total: IntegerSum) -> tuple[object, ...]:
    return (
        total.weight,
        total.terms,
        total._bound,
        {name: a.tolist() for name, a in total.integers().items()},
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(terms(), min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(0, 8))
def test_no_order_and_no_split_changes_a_bit(pairs, random, cut) -> None:
    whole = _total(pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    left, right = _total(shuffled[:cut]), _total(shuffled[cut:])
    left.merge(right)
    assert _state(left) == _state(whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(terms(), min_size=1, max_size=6))
def test_it_is_the_sum_of_the_rounded_values(pairs) -> None:
    exact = sum(weight * round(Fraction(float(term["b"])) * 2**QUANTUM_BITS) for term, weight in pairs)
    assert int(_total(pairs).integers()["b"]) == exact


@settings(max_examples=60, deadline=None)
@given(st.lists(terms().filter(lambda pair: pair[1] > 0), min_size=1, max_size=6))
def test_the_mean_is_within_half_a_quantum(pairs) -> None:
    mean = _total(pairs).mean()
    weight = sum(w for _, w in pairs)
    exact = np.array(
        [[math.fsum(w * float(t["w"][i, j]) for t, w in pairs) / weight for j in range(3)] for i in (0, 1)]
    )
    assert mean["w"].dtype == np.float64
    assert np.abs(mean["w"] - exact).max() <= 2.0**-QUANTUM_BITS / 2 + 1000 * 2.0**-52


def test_values_of_many_blocks_and_any_layout() -> None:
    rng = np.random.default_rng(5)
    wide = rng.normal(size=(2, BLOCK + 17)).astype(np.float32)
    total = IntegerSum({"w": Spec((BLOCK + 17, 2), "float32")})
    total.add({"w": wide.T}, 3)
    assert np.array_equal(total.integers()["w"], 3 * np.rint(wide.T.astype(np.float64) * 2.0**32).astype(np.int64))


def test_the_last_unit_of_headroom_can_be_used_and_no_more() -> None:
    total = IntegerSum({"w": Spec((1,), "float64")}, quantum_bits=0)
    top = np.array([2.0**62])
    total.add({"w": top}, 1)
    total.add({"w": np.array([2.0**53 - 1])}, 511)
    room = HEADROOM - 2**62 - 511 * (2**53 - 1)
    total.add({"w": np.array([1.0])}, room)
    assert int(total.integers()["w"][0]) == HEADROOM
    before = _state(total)
    with pytest.raises(UpdateError, match="headroom"):
        total.add({"w": np.array([1.0])}, 1)
    assert _state(total) == before
    total.add({"w": np.array([0.0])}, HEADROOM)  # a zero needs no headroom, whatever its weight


@pytest.mark.parametrize(
    ("numbers", "weight", "message"),
    [
        ([math.nan, 0, 0, 0, 0, 0, 0], 1, "not finite"),
        ([0, 0, 0, 0, 0, 0, -math.inf], 1, "not finite"),
        ([0, 0, 0, 0, 0, 0, 2.0**31], 1, "headroom"),
        ([0, 0, 0, 0, 0, 0, 1e300], 0, "headroom"),
        ([1, 0, 0, 0, 0, 0, 0], 2**31, "headroom"),
        ([1, 0, 0, 0, 0, 0, 0], np.int64(2**40), "headroom"),
        ([1, 0, 0, 0, 0, 0, 0], -1, "weight -1"),
        ([0, 0, 0, 0, 0, 0, 0], 2**63, "weight 9223372036854775808"),
        ([1, 0, 0, 0, 0, 0, 0], 1.5, "weight 1.5"),
        ([1, 0, 0, 0, 0, 0, 0], True, "weight True"),
    ],
)
def test_a_refused_term_leaves_nothing_changed(numbers, weight, message) -> None:
    total = _total([(_term([1, 2, 3, 4, 5, 6, 7]), 2)])
    before = _state(total)
    with pytest.raises(UpdateError, match=message):
        total.add(_term(numbers), weight)
    assert _state(total) == before


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "surplus"])
def test_another_models_update_is_refused(change) -> None:
    total, term = IntegerSum(SPECS), _term([0.0] * 7)
    if change == "shape":
        term["w"] = term["w"].reshape(3, 2)
    elif change == "dtype":
        term["w"] = term["w"].astype(np.float64)
    elif change == "missing":
        del term["b"]
    else:
        term["c"] = np.zeros(1)
    before = _state(total)
    with pytest.raises(UpdateError):
        total.add(term, 1)
    assert _state(total) == before


def test_a_term_of_weight_zero_is_counted_and_adds_nothing() -> None:
    total = _total([(_term([1, 2, 3, 4, 5, 6, 7]), 0)])
    assert (total.weight, total.terms) == (0, 1)
    assert not total.integers()["w"].any()
    with pytest.raises(UpdateError, match="total weight is 0"):
        total.mean()


@pytest.mark.parametrize(
    "other",
    [
        IntegerSum(SPECS, quantum_bits=31),
        IntegerSum({**SPECS, "w": Spec((3, 2), "float32")}),
    ],
)
def test_partial_sums_of_another_kind_are_refused(other) -> None:
    total = _total([(_term([1, 2, 3, 4, 5, 6, 7]), 2)])
    before = _state(total)
    with pytest.raises(UpdateError, match="partial sum"):
        total.merge(other)
    assert _state(total) == before


def test_merging_never_exceeds_the_headroom() -> None:
    full = _total([(_term([0, 0, 0, 0, 0, 0, 1.0]), 2**31 - 1)])
    with pytest.raises(UpdateError, match="headroom"):
        full.merge(_total([(_term([0, 0, 0, 0, 0, 0, 1.0]), 1), (_term([0, 0, 0, 0, 0, 0, 1.0]), 1)]))
    assert full.terms == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-(2.0**20), 2.0**20), st.integers(0, 4000)), max_size=40))
def test_the_bound_covers_every_coordinate(pairs) -> None:
    total = IntegerSum({"w": Spec((1,), "float64")})
    exact = 0
    for value, weight in pairs:
        rounded = round(Fraction(value) * 2**QUANTUM_BITS) * weight
        try:
            total.add({"w": np.array([value])}, weight)
        except UpdateError:
            continue
        exact += rounded
    assert int(total.integers()["w"][0]) == exact
    assert abs(exact) <= total._bound <= HEADROOM


def test_a_sum_taken_in_floats_is_rounded_once():
    specs = {"w": Spec((3,), "float32")}
    total = IntegerSum(specs)
    total.add_sum({"w": np.array([0.5, -1.25, 2.0**-34])}, weight=7, terms=3)
    assert total.integers()["w"].tolist() == [2**31, -5 * 2**30, 0]
    assert (total.weight, total.terms) == (7, 3)


@pytest.mark.parametrize(
    ("value", "weight"), [(np.nan, 1), (np.inf, 1), (2.0**31, 1), (1.0, -1), (1.0, 2**63), (1.0, 1.5)]
)
def test_a_sum_that_cannot_be_held_changes_nothing(value, weight):
    total = IntegerSum({"w": Spec((2,), "float32")})
    with pytest.raises(UpdateError):
        total.add_sum({"w": np.array([0.0, value])}, weight=weight, terms=1)
    with pytest.raises(UpdateError, match="expected float64"):
        total.add_sum({"w": np.zeros(2, np.float32)}, weight=1, terms=1)
    assert (total.weight, total.terms, total.integers()["w"].tolist()) == (0, 0, [0, 0])


def test_float64_is_held_in_finer_units():
    assert quantum_bits_for({"w": Spec((2,), "float32")}) == QUANTUM_BITS
    assert quantum_bits_for({"w": Spec((2,), "float64")}) == FINE_QUANTUM_BITS
