"""The stack on disk reads back as the dense matrix, whatever the order of arrival and the size of a block."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.aggregation.stack import UpdateStack
from fedlearn.arrays import Spec
from fedlearn.errors import LimitExceededError, StateError, UpdateError

SPECS = {"w": Spec((2, 3), "float32"), "b": Spec((), "float64"), "none": Spec((0,), "float32")}


def _term(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "w": rng.normal(size=(2, 3)).astype(np.float32),
        "b": np.array(rng.normal()),
        "none": np.zeros(0, np.float32),
    }


def _dense(clients: list[str], numbers: dict[str, int]) -> np.ndarray:
    """Rows by client, columns by array name: b, none, w."""
    terms = [_term(numbers[c]) for c in sorted(clients)]
    return np.stack([np.concatenate([[t["b"]], t["w"].reshape(-1).astype(np.float64)]) for t in terms])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("abéZ0\0", max_size=4), min_size=1, max_size=9, unique=True), st.integers(8, 400))
def test_blocks_are_the_dense_matrix(clients, block_bytes) -> None:
    numbers = {client: i for i, client in enumerate(clients)}
    with UpdateStack(SPECS, block_bytes=block_bytes) as stack:
        for client in clients:
            stack.add(client, _term(numbers[client]), numbers[client] + 1)
        dense = _dense(clients, numbers)
        got = np.full_like(dense, np.nan)
        for columns, block in stack.blocks():
            assert block.nbytes <= max(block_bytes, 8 * len(clients))
            assert isinstance(block, np.ndarray)
            got[:, columns] = block
            block[:] = 0  # a copy: the file is not written through it
        assert np.array_equal(got, dense)
        assert all(np.array_equal(stack.row(i), dense[i]) for i in range(len(clients)))
        assert stack.clients == tuple(sorted(clients))
        assert stack.examples == sum(range(1, len(clients) + 1))


def test_a_model_in_another_order_gives_the_same_columns() -> None:
    with UpdateStack(SPECS) as one, UpdateStack(dict(reversed(SPECS.items()))) as other:
        one.add("a", _term(1), 1)
        other.add("a", dict(reversed(_term(1).items())), 1)
        assert np.array_equal(one.row(0), other.row(0))


def test_unflatten_undoes_flattening() -> None:
    with UpdateStack(SPECS) as stack:
        stack.add("a", _term(3), 1)
        back = stack.unflatten(stack.row(0))
    assert {name: Spec(a.shape, SPECS[name].dtype) for name, a in back.items()} == SPECS
    assert all(np.array_equal(back[name], array) for name, array in _term(3).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refused_update_leaves_nothing_behind(bad) -> None:
    with UpdateStack(SPECS) as stack:
        stack.add("a", _term(1), 5)
        with pytest.raises(UpdateError, match="not finite"):
            stack.add("b", {**_term(2), "b": np.array(bad)}, 5)
        with pytest.raises(UpdateError, match="float64"):
            stack.add("b", {**_term(2), "b": np.zeros(2)}, 5)
        with pytest.raises(UpdateError, match="second one"):
            stack.add("a", _term(2), 5)
        assert (len(stack), stack.examples, stack.clients) == (1, 5, ("a",))
        stack.add("b", _term(2), 5)
        assert np.array_equal(stack.row(1), _dense(["b"], {"b": 2})[0])


def test_what_a_broken_write_left_is_overwritten() -> None:
    with UpdateStack(SPECS) as stack:
        stack.add("a", _term(1), 1)
        with stack._path.open("ab") as file:
            file.write(b"half a row")
        stack.add("b", _term(2), 1)
        blocks = np.concatenate([block for _, block in stack.blocks()], axis=1)
    assert np.array_equal(blocks, _dense(["a", "b"], {"a": 1, "b": 2}))


def test_a_disk_that_refuses_is_named() -> None:
    with UpdateStack(SPECS) as stack:
        stack._path.unlink()
        with pytest.raises(StateError, match="cannot write row 0"):
            stack.add("a", _term(1), 1)
        assert len(stack) == 0


def test_the_disk_limit_holds() -> None:
    with UpdateStack(SPECS, limit_bytes=2 * 7 * 8) as stack:
        stack.add("a", _term(1), 1)
        stack.add("b", _term(2), 1)
        with pytest.raises(LimitExceededError, match="112 bytes"):
            stack.add("c", _term(3), 1)
        assert len(stack) == 2


def test_no_update_and_no_coordinate() -> None:
    with UpdateStack(SPECS) as stack, pytest.raises(UpdateError, match="none arrived"):
        list(stack.blocks())
    with UpdateStack({"none": Spec((0, 3), "float32")}) as stack:
        stack.add("a", {"none": np.zeros((0, 3), np.float32)}, 1)
        assert list(stack.blocks()) == []
        assert stack.row(0).shape == (0,)


def test_the_file_goes_with_the_stack() -> None:
    stack = UpdateStack(SPECS)
    stack.add("a", _term(1), 1)
    path = Path(stack._path)
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    stack.close()
    assert not path.exists()
