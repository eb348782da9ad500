"""Named arrays: their bytes, their digests, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.arrays import (
    DTYPES,
    ArrayLimits,
    Spec,
    check_finite,
    check_same,
    digest,
    from_bytes,
    size_bytes,
    specs_of,
    to_bytes,
)
from fedlearn.errors import FedlearnError, LimitExceededError, UpdateError

VECTORS = Path(__file__).parents[1] / "vectors" / "arrays"
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
ARRAYS = st.dictionaries(
    NAMES,
    hnp.arrays(
        st.sampled_from(sorted(DTYPES)).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    ),
    max_size=5,
)


def same(a, b) -> bool:
    return (
        set(a) == set(b)
        and specs_of(a) == {name: Spec(b[name].shape, str(b[name].dtype)) for name in a}
        and all(a[name].tobytes() == b[name].tobytes() for name in a)
    )


@given(ARRAYS)
@settings(deadline=None)
def test_bytes_come_back_as_they_were(arrays):
    data = to_bytes(arrays)
    back = from_bytes(data)
    assert same(arrays, back)
    assert list(back) == sorted(arrays)
    assert to_bytes(back) == data
    assert digest(back) == digest(arrays)
    assert same(from_bytes(memoryview(data)), arrays)


@given(ARRAYS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_and_layout_change_neither_bytes_nor_digest(arrays, random):
    names = list(arrays)
    random.shuffle(names)
    other = {name: np.asfortranarray(arrays[name]) if arrays[name].ndim else arrays[name] for name in names}
    assert digest(other) == digest(arrays)
    assert to_bytes(other) == to_bytes(arrays)


@given(ARRAYS, ARRAYS)
@settings(deadline=None)
def test_digests_are_equal_for_equal_arrays_only(a, b):
    assert (digest(a) == digest(b)) == same(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"ab": np.zeros(1), "c": np.zeros(1)}, {"a": np.zeros(1), "bc": np.zeros(1)}),
        ({"a": np.zeros(2)}, {"a": np.zeros((1, 2))}),
        ({"a": np.zeros(())}, {"a": np.zeros(1)}),
        ({"a": np.zeros(2, np.float32)}, {"a": np.zeros(2, np.int32)}),
        ({"a": np.zeros(0)}, {}),
        ({"a": np.array([0.0])}, {"a": np.array([-0.0])}),
    ],
)
def test_arrays_that_look_alike_have_other_digests(a, b):
    assert digest(a) != digest(b)


def test_digest_is_pinned():
    """Recorded models stay recognisable: this value may not change."""
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    by_hand = hashlib.sha256(b"1:b:int64:();" + b"\x07" + bytes(7) + b"1:w:float32:(2, 3);" + w.tobytes()).hexdigest()
    assert digest({"w": w, "b": np.array(7)}) == by_hand
    assert by_hand == "a37e82b34312b69accfd359a576422c6931bc3998592235e6cd729a3eb4e00c7"


def test_no_view_of_the_senders_buffer_is_kept():
    data = bytearray(to_bytes({"a": np.ones(3)}))
    back = from_bytes(memoryview(data))
    data[-8:] = bytes(8)
    assert back["a"].tolist() == [1, 1, 1]


def good_vectors():
    return sorted(path.stem for path in VECTORS.glob("good_*.safetensors"))


@pytest.mark.parametrize("name", good_vectors())
def test_good_vectors(name):
    arrays = from_bytes((VECTORS / f"{name}.safetensors").read_bytes())
    expected = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    assert set(arrays) == set(expected)
    for key, value in expected.items():
        assert str(arrays[key].dtype) == value["dtype"]
        assert np.array_equal(arrays[key], np.array(value["values"], dtype=value["dtype"]).reshape(arrays[key].shape))


BAD = json.loads((VECTORS / "bad.json").read_text())


@pytest.mark.parametrize("name", BAD)
def test_bad_vectors(name):
    with pytest.raises(FedlearnError) as caught:
        from_bytes((VECTORS / f"{name}.safetensors").read_bytes())
    assert caught.value.kind == BAD[name]


def test_the_vectors_are_their_generators():
    spec = importlib.util.spec_from_file_location("generate", VECTORS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {name: data for name, (data, _) in (module.GOOD | module.BAD).items()}
    stored = {path.stem: path.read_bytes() for path in VECTORS.glob("*.safetensors")}
    assert stored == made


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    try:
        from_bytes(data)
    except FedlearnError:
        return


@given(ARRAYS.filter(bool), st.data())
@settings(deadline=None)
def test_damaged_bytes_are_read_or_refused(arrays, data):
    intact = bytearray(to_bytes(arrays))
    place = data.draw(st.integers(0, len(intact) - 1))
    intact[place] ^= data.draw(st.integers(1, 255))
    try:
        from_bytes(bytes(intact))
    except FedlearnError:
        return


LIMITED = {"a": np.zeros((2, 3), np.float32), "bc": np.zeros(1)}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (ArrayLimits(tensors=1), "got 2 tensors, limit tensors is 1"),
        (ArrayLimits(name_bytes=1), "a name of 2 bytes, limit name_bytes is 1"),
        (ArrayLimits(dimensions=1), "2 dimensions, limit dimensions is 1"),
        (ArrayLimits(total_bytes=8, header_bytes=0), "limit total_bytes is 8"),
        (ArrayLimits(header_bytes=16), "limit header_bytes is 16"),
    ],
)
def test_every_limit(limits, message):
    with pytest.raises(LimitExceededError, match=message):
        from_bytes(to_bytes(LIMITED), limits)


def test_at_its_limits_it_is_taken():
    data = to_bytes(LIMITED)
    header = int.from_bytes(data[:8], "little")
    limits = ArrayLimits(2, 2, 2, total_bytes=size_bytes(LIMITED) + 8, header_bytes=header)
    assert same(from_bytes(data, limits), LIMITED)


@pytest.mark.parametrize("dtype", ["complex64", "<U3", ">f4", "uint16", "uint64", "datetime64[s]", "object"])
def test_what_is_not_sent_is_not_encoded(dtype):
    with pytest.raises(UpdateError, match="array 'x': got dtype"):
        to_bytes({"x": np.zeros(2, dtype=dtype)})


def test_other_arrays_are_named():
    expected = specs_of(LIMITED)
    check_same(LIMITED, expected)
    check_same(dict(reversed(LIMITED.items())), expected)
    with pytest.raises(UpdateError, match=r"missing arrays \['bc'\], unexpected arrays \['x'\]"):
        check_same({"a": LIMITED["a"], "x": LIMITED["bc"]}, expected)
    with pytest.raises(UpdateError, match=r"'a' is float32\[3, 2\], expected float32\[2, 3\]"):
        check_same({**LIMITED, "a": LIMITED["a"].T}, expected)
    with pytest.raises(UpdateError, match=r"'bc' is float32\[1\], expected float64\[1\]"):
        check_same({**LIMITED, "bc": np.zeros(1, np.float32)}, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_counted(value, dtype):
    with pytest.raises(UpdateError, match=r"array 'b' holds 2 value\(s\) that are not finite"):
        check_finite({"a": np.zeros(2), "b": np.array([0, value, 1, value], dtype)})


def test_integers_and_empty_arrays_are_finite():
    check_finite({"a": np.array([2**62]), "b": np.array([True]), "c": np.zeros(0), "d": np.array(1e300)})
