"""How long the exchanges of a masked round are waited for."""

from __future__ import annotations

import pytest

from fedlearn.learning import masked
from fedlearn.learning.backend import Exchange
from tests.unit.simulation.test_masked import Sim, study_of


@pytest.mark.parametrize("deadline_s", [600.0, 61.0])
def test_shares_are_given_time_for_the_model_and_never_more_than_the_round(monkeypatch, deadline_s):
    monkeypatch.setattr(masked, "SLOW_BYTES_PER_S", 10.0)
    asked = {}

    def note(exchange, work, replies):
        asked[exchange] = work.deadline_s, sum(array.nbytes for array in work.model.values())
        yield from replies

    Sim(study_of("rounds=1", f"runtime.deadline_s={deadline_s}"), spoil=note).run()
    size = asked[Exchange.SHARE][1]
    assert size > 10
    assert asked[Exchange.CHECK_IN][0] == asked[Exchange.UNMASK][0] == masked.KEYS_S
    assert asked[Exchange.SHARE][0] == min(deadline_s, masked.KEYS_S + size / 10.0)
    assert asked[Exchange.TRAIN][0] == deadline_s
