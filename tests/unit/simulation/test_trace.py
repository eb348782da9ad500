"""A recorded availability: read within limits, followed by those it names and by everybody else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.environment import AvailabilityTable, EnvironmentTable
from fedlearn.errors import DataError
from fedlearn.learning.rows import ListedIds
from fedlearn.release.keys import AttemptId
from fedlearn.simulation import trace as traces
from fedlearn.simulation.environment import Environment
from fedlearn.simulation.trace import read_trace

HEADER = "client,from_s,until_s\n"


@pytest.fixture
def write(tmp_path):
    def of(text):
        path = tmp_path / "trace.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return of


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=10, unique=True).map(sorted), min_size=1, max_size=5),
    st.lists(st.integers(0, 120), min_size=1, max_size=20),
)
def test_presence_is_what_the_intervals_say(tmp_path_factory, edges, times):
    intervals = {f"d{i}": list(zip(e[::2], e[1::2], strict=False)) for i, e in enumerate(edges)}
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    lines = [f"{name},{a},{b}\n" for name, spans in intervals.items() for a, b in spans]
    path.write_text(HEADER + "".join(reversed(lines)), encoding="utf-8")
    trace = read_trace(path)
    period = max(b for spans in intervals.values() for _, b in spans)
    assert (list(trace.ids), trace.period_s) == (sorted(intervals), period)
    for time_s in times:
        expected = [any(a <= time_s % period < b for a, b in intervals[name]) for name in trace.ids]
        assert trace.present(np.arange(len(trace.ids)), float(time_s)).tolist() == expected


def test_a_client_follows_its_own_record_and_others_one_that_is_drawn(write):
    path = write(HEADER + "ada,0,10\nbob,10,20\n")
    names = ("ada", "bob", *(f"x{i:03d}" for i in range(200)))
    table = EnvironmentTable(availability=AvailabilityTable(kind="trace", trace=str(path)))
    world = Environment(table, 1, ListedIds(names))
    early, late = (world.available(np.arange(202), AttemptId(1, 1), 0, t) for t in (5.0, 15.0))
    assert early[:2].tolist() == [True, False]
    assert (early == ~late).all()
    assert 60 < early[2:].sum() < 140
    assert np.array_equal(early, world.available(np.arange(202), AttemptId(7, 2), 3, 25.0)), "the trace begins again"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'client'"),
        ("client,from_s\na,1\n", "no column 'until_s'"),
        (HEADER, "no intervals"),
        (HEADER + "a,0,1\na,x,2\n", "trace.csv:3: from_s and until_s are not both numbers"),
        (HEADER + "a,0\n", "not both numbers"),
        (HEADER + "a,2,1\n", "got 'a' from 2 to 1"),
        (HEADER + "a,-1,1\n", "expected a client, 0 <= from_s"),
        (HEADER + "a,0,inf\n", "expected a client"),
        (HEADER + "a,nan,1\n", "expected a client"),
        (HEADER + ",0,1\n", "expected a client"),
        (HEADER + "a,0,5\nb,0,9\na,4,6\n", "two intervals of client 'a' overlap at 4 s"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(write, text, words):
    with pytest.raises(DataError) as caught:
        read_trace(write(text))
    assert words in str(caught.value)


def test_limits(write, tmp_path, monkeypatch):
    path = write(HEADER + "a,0,1\nb,0,1\n")
    monkeypatch.setattr(traces, "MAX_INTERVALS", 1)
    with pytest.raises(DataError, match="MAX_INTERVALS"):
        read_trace(path)
    monkeypatch.setattr(traces, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="MAX_BYTES"):
        read_trace(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(path)
