"""Where the time goes: parts add up to the whole."""

from __future__ import annotations

import json
import threading
import time

import pytest

import fedlearn
from fedlearn import meter
from fedlearn.simulation.profile import PARTS
from tests.support.tiny_task import tiny_study


def test_time_in_an_inner_part_is_its_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    def fail(seconds):
        spend(seconds)
        raise ZeroDivisionError

    with meter.measuring() as one:
        spend(1)
        with meter.span("a"):
            spend(2)
            with meter.span("b"):
                spend(4)
            spend(8)
        with pytest.raises(ZeroDivisionError), meter.span("a"), meter.span("b"):
            fail(16)
        for item in meter.spanned("c", map(spend, (32, 64))):
            assert item is None
            spend(128)
        assert one.seconds() == {"other": 257.0, "a": 10.0, "b": 20.0, "c": 96.0}
    with meter.span("a"):
        spend(100)
    assert one.seconds()["a"] == 10.0


def test_what_other_threads_do_is_taken_from_the_part_that_waits_for_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work():
        with meter.span("data"):
            now[0] += 3

    with meter.measuring() as one, meter.span("training"):
        for _ in range(2):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        now[0] += 4
        found = one.seconds()
    threads = len(one._threads)
    assert found["data"] == pytest.approx(6 / threads)
    assert found["training"] == pytest.approx(10 - 6 / threads)


def test_a_profile_adds_up_and_is_in_the_run_folder(tmp_path):
    started = time.perf_counter()
    result = fedlearn.simulate(tiny_study(), out=tmp_path, profile=True)
    spent = time.perf_counter() - started
    profile = result.profile
    assert tuple(profile.seconds) == PARTS
    assert 0.5 * spent < profile.total_s <= spent
    assert all(profile.seconds[part] > 0 for part in PARTS)
    assert profile.clients == 12
    stored = json.loads((tmp_path / "profile.json").read_text())
    assert stored["clients"] == 12
    assert sum(stored["percent"][part] for part in PARTS) == pytest.approx(100, abs=0.1)
    assert fedlearn.simulate(tiny_study(), rounds=1).profile is None
    assert meter._active is None
