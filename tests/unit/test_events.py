"""Events: each comes back from its line, and a damaged line is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn import events
from fedlearn.errors import StateError
from fedlearn.events import Event, from_json, to_json

KINDS = sorted((k for k in Event.KINDS.values() if k.__module__ == "fedlearn.events"), key=lambda kind: kind.__name__)
WALL = st.floats(0, 4e9).map(lambda t: round(t, 3))
TEXT = st.text(max_size=12)
METRICS = st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3)


def values(name: str, kind: object) -> st.SearchStrategy:
    if kind is str:
        return TEXT
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 10**12)
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if "tuple" in str(kind):
        return st.lists(TEXT, max_size=3).map(tuple)
    return st.dictionaries(TEXT, METRICS, max_size=3) if name == "clients" else METRICS


def some(kind: type[Event]) -> st.SearchStrategy[Event]:
    return st.builds(
        kind, **{name: values(name, hint) for name, hint in get_type_hints(kind).items() if name != "KINDS"}
    )


EVENTS = st.sampled_from(KINDS).flatmap(some)


@given(EVENTS, WALL)
def test_events_come_back_from_their_line(event, wall_s):
    line = to_json(event, wall_s)
    assert "\n" not in line
    assert from_json(line) == (event, wall_s)
    assert json.loads(line)["event"] == type(event).__name__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_events_are_frozen_and_documented(kind):
    assert dataclasses.fields(kind)
    assert kind.__dataclass_params__.frozen
    assert kind.__doc__


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_back_as_nan(value):
    event = events.ClientFinished("r", 1, "c", {"loss": value})
    line = to_json(event, 0.0)
    assert '"loss":null' in line
    back, _ = from_json(line)
    assert isinstance(back, events.ClientFinished)
    assert math.isnan(back.facts["loss"])


def test_a_newer_events_extra_field_is_left_out():
    tree = json.loads(to_json(events.RunStopped("r", 3), 1.0)) | {"later": 1}
    assert from_json(json.dumps(tree)) == (events.RunStopped("r", 3), 1.0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "3",
        '"x"',
        "null",
        "[]",
        "{}",
        '{"event":"RunStopped"}',
        '{"event":"NoSuch","at":1}',
        '{"event":[],"at":1}',
        '{"event":"RunStopped","at":"x","run":"r","rounds_done":1}',
        '{"event":"RunStopped","at":1,"run":"r"}',
        "[" * 100_000,
    ],
    ids=lambda line: line[:20],
)
def test_damaged_lines_are_refused(line):
    with pytest.raises(StateError, match="event: cannot be read back"):
        from_json(line)


@given(st.text(max_size=80))
def test_any_line_is_read_or_refused(line):
    with pytest.raises(StateError):
        from_json(line)
