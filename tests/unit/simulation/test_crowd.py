"""A run of a large population: what is looked at, named and kept depends on its cohort."""

from __future__ import annotations

import tracemalloc

import fedlearn
from fedlearn import events
from fedlearn.learning import population as populations
from fedlearn.learning.federation import EVALUATED_AT_MOST
from tests.support.tiny_task import tiny_study

CROWD = (
    "data.partition=bootstrap",
    "data.clients=1000000",
    "data.options.examples_per_client=8",
    "cohort.size=20",
    "cohort.wait_for=1",
)


def test_a_million_clients_are_a_number(monkeypatch):
    monkeypatch.setattr(populations, "CACHE_BYTES", 10**6)
    seen: list[events.Event] = []
    tracemalloc.start()
    result = fedlearn.simulate(tiny_study(*CROWD, "rounds=2"), emit=seen.append)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, "a hundred bytes a client would be more"
    (started,) = (event for event in seen if isinstance(event, events.RunStarted))
    assert (started.population, len(started.clients)) == (1_000_000, events.MOST_NAMED)
    assert [len(event.clients) for event in seen if isinstance(event, events.Evaluated)] == [EVALUATED_AT_MOST] * 2
    assert result.history.clients == (), "two thousand clients have no column each"
    assert [row["clients"] for row in result.history] == [20, 20]


def test_everybody_is_named_and_evaluated_where_they_are_few():
    seen: list[events.Event] = []
    fedlearn.simulate(tiny_study(), rounds=1, emit=seen.append)
    (started,) = (event for event in seen if isinstance(event, events.RunStarted))
    assert (started.population, started.clients) == (4, ("ada", "bob", "cyd", "dee"))
    assert events.RunStarted("r", "s", 1, 0, ("a", "b"), 1, "auc").population == 2, "a record without the field"
