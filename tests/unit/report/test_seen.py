"""What is shown of masked vectors."""

from __future__ import annotations

import numpy as np

import fedlearn
from fedlearn import events
from fedlearn.events import SumOpened
from fedlearn.report import seen
from server.redaction import UNTOLD, event_for_site
from tests.support.tiny_task import CLIENTS, tiny_study

OPENED = SumOpened("r", 3, "ada", 32, (7, 2**32 - 1), (0.25, -0.5))


def test_lines_and_a_picture(tmp_path):
    text = "\n".join(seen.lines(OPENED, 4))
    assert "4294967295" in text
    assert "-0.5000" in text
    seen.plot(OPENED, 4, tmp_path / "seen.png")
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_sites_are_not_told_whose_vector_it_was():
    assert event_for_site(OPENED) is None


def test_sites_are_not_told_who_refused_or_why_a_run_failed():
    assert event_for_site(events.ClientRefused("r", "ada", "budget: spent")) is None
    assert event_for_site(events.RunWaiting("r", 1, 3, 60.0)) is None
    failed = event_for_site(events.RunFailed("r", "1 of 2 clients are left", "start ada"))
    assert isinstance(failed, events.RunFailed)
    assert (failed.reason, failed.hint) == (UNTOLD, "")


def test_a_masked_run_shows_a_sample_of_each_round_and_a_plain_one_none():
    found: list[SumOpened] = []
    masked = tiny_study("secure_aggregation.enabled=true", "secure_aggregation.max_examples=20", "rounds=2")

    def heard(event):
        if isinstance(event, events.SumOpened):
            found.append(event)

    result = fedlearn.simulate(masked, emit=heard)
    assert [event.round for event in found] == [1, 2]
    assert all(event.client in CLIENTS for event in found)
    assert all(0 <= element < 2**event.ring_bits for event in found for element in event.masked)
    first = np.concatenate([np.ravel(a) for a in result.weights.values()])
    assert len(found[0].mean) == len(first)
    assert found[0].masked != found[1].masked, "fresh keys every round"
    found.clear()
    fedlearn.simulate(tiny_study("rounds=1"), emit=heard)
    assert found == []
