"""A client's memory follows the sums that were committed, and no others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import StateError
from fedlearn.learning.memory import ClientMemory


def state(value: int):
    return {"w": np.array(value)}


@given(st.lists(st.sampled_from(["commit", "void", "asked again"]), max_size=12))
def test_whatever_becomes_of_attempts_the_state_is_the_last_committed_one(fates):
    """A model of the protocol: each attempt trains from the committed state and adds one digit to it."""
    memory, base, committed, round_, attempt = ClientMemory(), None, 0, 1, 1
    for fate in fates:
        before = memory.at(base).get("w", np.array(0))
        assert before == committed
        trained = committed * 10 + round_
        memory.candidates[round_, attempt] = state(trained)
        assert memory.peek(base).get("w", np.array(0)) == committed
        if fate == "commit":
            base, committed = (round_, attempt), trained
            assert memory.peek(base)["w"] == committed
            round_, attempt = round_ + 1, 1
        elif fate == "void":
            attempt += 1
    assert memory.at(base).get("w", np.array(0)) == committed
    assert memory.candidates == {}


def test_a_base_that_is_not_here_is_refused_and_changes_nothing():
    memory = ClientMemory((2, 1), state(2), {(3, 1): state(3)})
    for base in ((3, 2), (1, 1), (4, 1), None):
        for read in (memory.at, memory.peek):
            with pytest.raises(StateError, match="this client has round 2 attempt 1"):
                read(base)
    assert memory.base == (2, 1)
    assert memory.peek((3, 1))["w"] == 3
    assert memory.at((2, 1))["w"] == 2


def test_a_client_that_never_took_part_has_no_state():
    assert ClientMemory().at(None) == {}
    with pytest.raises(StateError, match="continues from round 1 attempt 1, this client has no round"):
        ClientMemory().at((1, 1))
