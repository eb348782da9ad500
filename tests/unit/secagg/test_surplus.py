"""Surplus noise: parts that add up, keys that open downwards only, shares that false ones cannot spoil."""

import numpy as np
import pytest

from fedlearn.errors import StudyError
from fedlearn.secagg.noise import Noise, add_noise
from fedlearn.secagg.primitives import SeededDraw, derive
from fedlearn.secagg.surplus import Surplus

SURPLUS = Surplus.over(1000.0, 5, {8: 6, 10: 8})
BASE, TOP = b"b" * 32, b"t" * 32


def test_whatever_survives_leaves_the_variance_that_is_needed():
    assert SURPLUS.added == pytest.approx(1000 / 5)
    for survivors, honest in ((7, 5), (8, 6), (9, 6), (10, 8)):
        assert SURPLUS.left(survivors) * honest == pytest.approx(1000.0)


def test_without_levels_nothing_goes():
    plain = Surplus.over(1000.0, 5, {})
    vector = np.zeros(100, dtype="<u4")
    plain.remove(vector, 10, [])
    assert plain.added == plain.left(10) == 200
    assert not vector.any()


@pytest.mark.parametrize(("survivors", "level"), [(7, 0), (8, 1), (9, 1), (10, 2)])
def test_the_server_takes_off_exactly_the_parts_of_the_levels_reached(survivors, level):
    vector = np.zeros(5000, dtype="<u4")
    SURPLUS.add(vector, BASE, TOP)
    assert SURPLUS.reached(survivors) == level
    SURPLUS.remove(vector, survivors, [SURPLUS.keys(TOP, 2)[level - 1]] if level else [])
    keys = [BASE, *SURPLUS.keys(TOP, 2)]
    for part in [0, *range(level + 1, 3)]:
        add_noise(vector, Noise.SKELLAM, SURPLUS.variances[part], derive(keys[part], b"surplus part"), sign=-1)
    assert not vector.any()


def test_a_level_opens_those_below_it_and_not_those_above():
    low, high = SURPLUS.keys(TOP, 2)
    assert high == TOP
    assert SURPLUS.keys(low, 1) == [low]
    assert SURPLUS.anchor(low, 1) == SURPLUS.anchor(high, 2)
    assert high not in SURPLUS.keys(low, 1)


def test_keys_come_back_from_shares_and_false_ones_are_passed_over():
    shares = SURPLUS.share(TOP, 4, 7, SeededDraw(b"shares"))
    anchor = SURPLUS.anchor(TOP, 2)
    for level, key in enumerate(SURPLUS.keys(TOP, 2), start=1):
        came = {x: holder[level - 1] for x, holder in enumerate(shares, start=1)}
        assert SURPLUS.opened(came, 4, level, anchor) == key
        came[1] = came[2]
        assert SURPLUS.opened(came, 4, level, anchor) == key
        assert SURPLUS.opened({x: came[x] for x in (2, 3, 4)}, 4, level, anchor) is None
        assert SURPLUS.opened({x: came[x] for x in (1, 3, 4, 5)}, 4, level, anchor) is None


@pytest.mark.parametrize("levels", [{8: 5}, {8: 4}, {8: 6, 10: 6}])
def test_a_level_that_removes_nothing_is_refused(levels):
    with pytest.raises(StudyError, match="rising levels"):
        Surplus.over(1000.0, 5, levels)
