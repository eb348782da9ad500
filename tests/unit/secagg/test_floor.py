"""The floor of honest clients: formulas, and an adversary that tells everybody something else."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import StudyError
from fedlearn.secagg.floor import colluding, honest_floor
from fedlearn.secagg.graph import PPM, Graph, parameters
from fedlearn.secagg.plan import Profile
from tests.support.secagg_world import learnable

AGREED, EACH = Profile.MALICIOUS, Profile.SEMI_MALICIOUS


def test_with_agreement_it_is_the_minimum_less_the_colluders():
    assert honest_floor(100, 80, 0.1, 0.1, AGREED) == 70
    assert honest_floor(100, 80, 0.1, 0.1, AGREED, survivors=100) == 90
    assert honest_floor(1000, 800, 0.1, 0.1, EACH) == 700  # above 200 clients they always agree


def test_the_threshold_is_a_minimum_too():
    assert honest_floor(100, 100, 0.1, 0.1, AGREED) == 90
    assert honest_floor(100, 3, 0.1, 0.1, AGREED) == min(
        parameters(n, 100_000, 100_000).threshold - colluding(n, 0.1) for n in range(3, 101)
    )


def test_four_hospitals():
    assert honest_floor(4, 3, 0.1, 0.1, EACH) == 2
    assert honest_floor(4, 4, 0.1, 0.1, EACH) == 3
    assert honest_floor(4, 3, 0.1, 0.1, EACH, survivors=4) == 3


def test_without_agreement_lies_lower_it():
    assert honest_floor(100, 80, 0.1, 0.1, EACH) < honest_floor(100, 80, 0.1, 0.1, AGREED)
    assert honest_floor(100, 100, 0.1, 0.1, EACH) == honest_floor(100, 100, 0.1, 0.1, AGREED)


def test_nobody_honest_for_sure_is_refused():
    with pytest.raises(StudyError, match="no honest one"):
        honest_floor(1000, 90, 0.1, 0.1, EACH)


@given(st.integers(4, 12), st.data())
@settings(max_examples=300, deadline=None)
def test_no_told_survivors_open_a_sum_below_it(n, data):
    """Every honest client is told some set of at least the minimum; what falls is counted, not derived."""
    found = parameters(n, PPM // 10, PPM // 10)
    minimum = data.draw(st.integers(found.threshold, n))
    corrupt_count = colluding(n, 0.1)
    corrupt = (1 << corrupt_count) - 1
    graph = Graph(found)
    # An adversary that tries: two stories, of which each client is told one, and now and then any other set.
    stories = [set(data.draw(st.permutations(range(n)))[: data.draw(st.integers(minimum, n))]) for _ in range(3)]
    told, level_told = {}, data.draw(st.integers(minimum, n))
    for client in range(corrupt_count, n):
        story = stories[data.draw(st.integers(0, 2))] | {client}
        told[client] = sum(1 << i for i in story)
    sums = learnable(graph, (1 << n) - 1, told, corrupt)
    reached = sum(told[c].bit_count() >= level_told for c in told) + corrupt_count >= found.threshold
    exact_floor = _floor_of(n, minimum, found.threshold, corrupt_count, level_told if reached else 0)
    for one in sums:
        assert len(one) >= exact_floor


@pytest.mark.parametrize(("n", "minimum"), [(4, 3), (4, 4), (5, 4), (5, 5)])
def test_every_lie_that_there_is_to_few_clients(n, minimum):
    """All sets of survivors that the honest clients can be told, together: the formula is met, and by some lie exactly."""
    found = parameters(n, PPM // 10, PPM // 10)
    honest = range(1, n)
    stories = [[s for s in range(1 << n) if s >> c & 1 and s.bit_count() >= minimum] for c in honest]
    smallest = dict.fromkeys(range(minimum, n + 1), n)
    for told in itertools.product(*stories):
        for one in learnable(Graph(found), (1 << n) - 1, dict(zip(honest, told, strict=True)), 1):
            for level in smallest:  # a level's keys are opened by a threshold, the colluder among them
                if level == minimum or sum(s.bit_count() >= level for s in told) + 1 >= found.threshold:
                    smallest[level] = min(smallest[level], len(one))
    assert smallest == {level: _floor_of(n, minimum, found.threshold, 1, level) for level in smallest}


def _floor_of(n: int, minimum: int, threshold: int, against: int, survivors: int) -> int:
    told = max(minimum, threshold)
    least = max(told, survivors) - against - (n - threshold) * (n - told) / (threshold - against)
    return max(0, math.ceil(least))


def test_the_formula_in_the_test_is_the_one_in_the_code():
    for n, minimum in ((10, 9), (12, 11), (20, 18), (50, 48)):
        expected = min(
            _floor_of(m, minimum, parameters(m, 100_000, 100_000).threshold, colluding(m, 0.1), 0)
            for m in range(minimum, n + 1)
        )
        assert honest_floor(n, minimum, 0.1, 0.1, EACH) == expected
