"""Clients' memories in a journal or beyond what memory holds, and rounds that reach the disk together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import StateError
from fedlearn.learning.memory import MemoriesInRam
from fedlearn.release.journal import DictJournal
from fedlearn.release.sqlite import SqliteJournal
from fedlearn.simulation.journal import GroupedJournal
from fedlearn.simulation.states import ClientStates

CLIENTS = ("ada", "bob", "cyd/../x", "d" * 200)


def state(value: int):
    return {"w": np.full(100, value), "b": np.array(float(value))}


def rounds(memories, numbers, base, committed):
    """Each attempt trains from the committed state and adds a digit; odd attempts are void."""
    for number in numbers:
        for client in CLIENTS:
            before = memories.at(client, base.get(client))
            assert (int(before["b"]) if before else 0) == committed.get(client, 0)
            memories.keep(client, (number, 1), state(committed.get(client, 0) * 10 + number))
            if number % 2 == 0:
                base[client], committed[client] = (number, 1), committed.get(client, 0) * 10 + number
            seen = memories.peek(client, base.get(client))
            assert (int(seen["b"]) if seen else 0) == committed.get(client, 0)


@pytest.mark.parametrize("memory_bytes", [0, 2000, 10**9])
@pytest.mark.parametrize("durable", [False, True])
def test_states_are_the_committed_ones_however_little_memory_there_is(memory_bytes, durable):
    memories = ClientStates(DictJournal() if durable else None, memory_bytes=memory_bytes)
    rounds(memories, range(1, 9), {}, {})
    memories.close()


def test_another_process_goes_on_from_the_committed_states(tmp_path):
    base, committed = {}, {}
    journal = SqliteJournal(tmp_path)
    rounds(ClientStates(journal), range(1, 4), base, committed)  # round 3 was not committed
    journal.close()
    journal = SqliteJournal(tmp_path)
    rounds(ClientStates(journal), range(3, 6), base, committed)
    with pytest.raises(StateError, match="continues from round 1 attempt 1"):
        ClientStates(journal).peek("ada", (1, 1))
    journal.close()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["commit", "void", "crash"])), max_size=25))
def test_a_crash_leaves_what_was_committed(fates):
    """Against the oracle, with a new object on the same journal after each crash."""
    journal, base = DictJournal(), {}
    tested, oracle = ClientStates(journal, memory_bytes=1000), MemoriesInRam()
    for number, (client, fate) in enumerate(fates, start=1):
        for memories in (tested, oracle):
            before = memories.at(client, base.get(client))
            value = int(before["b"]) if before else 0
            memories.keep(client, (number, 1), state((value * 7 + number) % 1000))
        if fate == "commit":
            base[client] = number, 1
        elif fate == "crash":
            tested = ClientStates(journal, memory_bytes=1000)
        for one in "abc":
            got, expected = (m.peek(one, base.get(one)) for m in (tested, oracle))
            assert got.keys() == expected.keys()
            assert all(np.array_equal(got[k], expected[k]) for k in got)


def test_a_temporary_folder_is_gone_when_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memories = ClientStates(memory_bytes=0)
    memories.keep("ada", (1, 1), state(1))
    memories.keep("bob", (1, 1), state(2))
    assert list(tmp_path.iterdir())
    assert memories.peek("ada", (1, 1))["b"] == 1.0
    memories.close()
    assert not list(tmp_path.iterdir())


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now

    def wall(self):
        return self.now


def test_writes_reach_the_disk_together_when_they_are_old_or_many_enough():
    inner, clock = DictJournal(), Clock()
    journal = GroupedJournal(inner, clock=clock, every_s=1.0, limit_bytes=100)
    journal.write({"a": b"1", "b": b"2"})
    assert inner.get("a") is None
    assert journal.get("a") == b"1"
    clock.now = 1.0
    journal.write({"a": None})
    assert (journal.get("a"), inner.get("b")) == (None, b"2")
    journal.write({"c": b"x" * 101})
    assert inner.get("c") == b"x" * 101
    journal.write({"d": b"1"})
    assert list(journal.scan("")) == [("b", b"2"), ("c", b"x" * 101), ("d", b"1")]
    journal.write({"e": b"1"})
    journal.close()
    assert inner.get("e") == b"1"


class Full(DictJournal):
    full = False

    def write(self, changes):
        if self.full:
            raise StateError("no space left")
        super().write(changes)


def test_what_a_full_disk_refused_is_written_when_there_is_space():
    inner = Full()
    journal = GroupedJournal(inner, clock=Clock(), every_s=0.0)
    journal.write({"a": b"1"})
    inner.full = True
    with pytest.raises(StateError):
        journal.write({"a": b"2"})
    assert inner.get("a") == b"1"
    inner.full = False
    journal.flush()
    assert inner.get("a") == b"2"
