from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.release import AttemptId, ReleaseKey
from fedlearn.release.keys import NAME_LIMIT_BYTES, NUMBER_LIMIT, record_key

KEY = ReleaseKey("run", 2, 1, "train", "ab12")
NAMES = st.text(min_size=1, max_size=20)
KEYS = st.builds(ReleaseKey, NAMES, st.integers(0, 30), st.integers(1, 30), NAMES, NAMES)


@given(KEYS, KEYS)
def test_canonical_bytes_tell_keys_apart(one: ReleaseKey, other: ReleaseKey) -> None:
    assert (one.canonical() == other.canonical()) == (one == other)
    assert (one.digest() == other.digest()) == (one == other)


def test_canonical_bytes_are_pinned() -> None:
    assert KEY.canonical() == (b"fedlearn/release-key/v1\0\0\0\3run\0\0\0\0012\0\0\0\0011\0\0\0\5train\0\0\0\4ab12")


def test_parts_do_not_run_into_each_other() -> None:
    assert replace(KEY, run="r", exchange="x1").canonical() != replace(KEY, run="rx", exchange="1").canonical()


def test_a_key_is_a_value() -> None:
    with pytest.raises(FrozenInstanceError):
        KEY.round = 3  # type: ignore[misc]
    assert KEY.at == AttemptId(2, 1) < AttemptId(2, 2) < AttemptId(3, 1)
    assert str(KEY) == "run round 2 attempt 1 train"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"run": ""}, "run of 0 bytes"),
        ({"run": "é" * NAME_LIMIT_BYTES}, f"run of {2 * NAME_LIMIT_BYTES} bytes"),
        ({"exchange": ""}, "exchange of 0"),
        ({"model_digest": ""}, "model_digest of 0"),
        ({"round": -1}, "round is -1"),
        ({"round": NUMBER_LIMIT + 1}, "round is"),
        ({"attempt": 0}, "attempt is 0"),
    ],
)
def test_a_bad_part_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(KEY, **change)


PATHS = st.lists(NAMES, min_size=1, max_size=4)


@given(PATHS, PATHS)
def test_no_name_reaches_another_place_of_the_tree(parts: list[str], others: list[str]) -> None:
    key = record_key(*parts)
    assert key.isascii()
    assert key.count("/") == len(parts) - 1
    assert (record_key(*others) == key) == (others == parts)


def test_records_sort_by_number() -> None:
    assert record_key("a", 9) < record_key("a", 10) < record_key("a", NUMBER_LIMIT)
