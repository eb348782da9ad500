"""The simulated world: distributions are those that were asked for, and a round ends when it should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn import seeds
from fedlearn.environment import AvailabilityTable, DeviceTable, EnvironmentTable
from fedlearn.learning.cohort import pick_cohort
from fedlearn.learning.rows import ListedIds, NumberedIds
from fedlearn.release.keys import AttemptId
from fedlearn.simulation.environment import LOOK_S, MAX_LOOKS, Course, Environment, Loads
from fedlearn.simulation.order import SMALL, RandomOrder

FIRST = AttemptId(1, 1)
EVERYBODY = np.arange(20_000)


def world(ids=None, seed=1, availability=None, **fields) -> Environment:
    table = EnvironmentTable(availability=AvailabilityTable(**(availability or {})), **fields)
    return Environment(table, seed, NumberedIds(20_000) if ids is None else ids)


def loads(count, down=0, examples=0, up=0) -> Loads:
    return Loads(*(np.full(count, value, dtype=np.int64) for value in (down, examples, up)))


# Draws.


def test_hashed_draws_are_uniform_and_independent():
    values = seeds.hashed_uniform(7, EVERYBODY, 4, "x")
    assert values.shape == (20_000, 4)
    assert ((values >= 0) & (values < 1)).all()
    counts = np.histogram(values, 100, (0, 1))[0]
    # Chi-square with 99 degrees of freedom.
    assert abs(((counts - 800) ** 2 / 800).sum() - 99) < 5 * (2 * 99) ** 0.5
    together = np.corrcoef(np.vstack([values.T, [*values[1:, 0].tolist(), 0.5]]))
    assert abs(together - np.eye(5)).max() < 5 / 20_000**0.5
    assert np.array_equal(seeds.hashed_uniform(7, np.array([5, 19_999]), 4, "x"), values[[5, 19_999]])
    for other in (seeds.hashed_uniform(8, EVERYBODY, 4, "x"), seeds.hashed_uniform(7, EVERYBODY, 4, "y")):
        assert not (other == values).any()


@pytest.mark.parametrize("count", [1, 2, 7, SMALL, SMALL + 1, 3 * SMALL, 2**18])
def test_an_order_holds_each_number_once_and_any_part_of_it_can_be_had(count):
    order = RandomOrder(count, 3, "a", 1)
    whole = order.take(0, count)
    assert np.array_equal(np.sort(whole), np.arange(count))
    assert np.array_equal(order.take(count // 3, count // 2), whole[count // 3 : count // 2])
    if count > 7:
        assert not np.array_equal(whole, RandomOrder(count, 3, "a", 2).take(0, count))
        # Neither the places nor the steps between them follow the numbers.
        assert abs(np.corrcoef(whole, np.arange(count))[0, 1]) < 5 / count**0.5
        assert len(np.unique(np.diff(whole))) > 0.3 * count


def test_the_beginning_of_a_large_order_is_any_number_equally_often():
    count = SMALL * 2
    heads = np.concatenate([RandomOrder(count, 3, "round", r).take(0, 64) for r in range(400)])
    counts = np.histogram(heads, 64, (0, count))[0]
    assert abs(((counts - 400) ** 2 / 400).sum() - 63) < 5 * (2 * 63) ** 0.5


# Availability.


def test_where_all_are_there_the_cohort_is_the_studys_own():
    ids = NumberedIds(300)
    for size in (None, 10, 299):
        drawn = world(ids).draw(AttemptId(4, 2), size, 1, 1e6)
        assert drawn.clients == pick_cohort(ids, size, 1, "train", 4)
        assert (drawn.unavailable, drawn.waited_s) == (0, 0.0)


@given(st.integers(1, 3000), st.integers(1, 60), st.floats(0.05, 1.0), st.integers(1, 5), st.integers(0, 99))
def test_a_cohort_is_of_those_who_are_there(count, size, chance, round_, seed):
    ids = NumberedIds(count)
    one = world(ids, seed, {"kind": "bernoulli", "chance": chance})
    at = AttemptId(round_, 1)
    drawn = one.draw(at, size, 1, 0.0)
    look = round(drawn.waited_s / LOOK_S)
    assert list(drawn.clients) == sorted(set(drawn.clients)) == [ids.at(n) for n in drawn.numbers]
    there = one.available(np.arange(count), at, look, drawn.waited_s)
    assert there[drawn.numbers].all()
    assert len(drawn.clients) == min(size, there.sum())
    assert drawn.unavailable <= count - there.sum()
    everybody = one.draw(at, None, 1, 0.0)
    assert np.array_equal(everybody.numbers, np.flatnonzero(one.available(np.arange(count), at, look, 0.0)))


def test_everybody_there_is_drawn_equally_often():
    ids = ListedIds(tuple("abcdefgh"))
    one = world(ids, availability={"kind": "bernoulli", "chance": 0.5})
    counts = dict.fromkeys(ids, 0)
    for number in range(1, 2001):
        for client in one.draw(AttemptId(number, 1), 2, 2, 0.0).clients:
            counts[client] += 1
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values()), counts


@pytest.mark.parametrize("chance", [0.03, 0.5, 1.0])
def test_bernoulli_is_the_chance_anew_each_round_and_look(chance):
    one = world(availability={"kind": "bernoulli", "chance": chance})
    seen = [
        one.available(EVERYBODY, AttemptId(r, a), k, 0.0) for r, a, k in [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)]
    ]
    for there in seen:
        assert abs(there.mean() - chance) <= 5 * (chance * (1 - chance) / 20_000) ** 0.5
    if chance < 1:
        both = [(a & b).mean() for a in seen for b in seen if a is not b]
        assert max(both) < chance**2 + 5 * (chance**2 / 20_000) ** 0.5


def test_by_day_and_night():
    one = world(availability={"kind": "diurnal", "lowest": 0.1, "highest": 0.9, "peak_hour": 2.0, "time_zones": 1})

    def share(hour):
        return one.available(EVERYBODY, FIRST, 0, hour * 3600).mean()

    assert [round(share(h), 1) for h in (2, 8, 14, 20, 26)] == [0.9, 0.5, 0.1, 0.5, 0.9]
    later = world(availability={"kind": "diurnal", "lowest": 0.1, "highest": 0.9, "time_zones": 1}, start_hour=14.0)
    assert round(later.available(EVERYBODY, FIRST, 0, 0.0).mean(), 1) == 0.1
    around = world(availability={"kind": "diurnal", "lowest": 0.0, "highest": 1.0, "time_zones": 24})
    assert all(abs(around.available(EVERYBODY, FIRST, 0, h * 3600).mean() - 0.5) < 0.03 for h in (0, 7, 13))


def test_the_coordinator_waits_until_enough_are_there_but_not_for_ever():
    night = {"kind": "diurnal", "lowest": 0.0, "highest": 0.5, "peak_hour": 12.0, "time_zones": 1}
    drawn = world(availability=night).draw(FIRST, 100, 50, 0.0)
    assert len(drawn.clients) >= 50
    assert 0 < drawn.waited_s < 12 * 3600
    assert drawn.waited_s % LOOK_S == 0
    never = world(ListedIds(("a", "b")), availability={"kind": "bernoulli", "chance": 1e-9})
    drawn = never.draw(FIRST, None, 1, 0.0)
    assert (drawn.clients, drawn.waited_s) == ((), (MAX_LOOKS - 1) * LOOK_S)


def test_over_selection_asks_more():
    one = world(over_selection=1.31)
    assert len(one.draw(FIRST, 10, 1, 0.0).clients) == 14
    assert len(world(NumberedIds(12), over_selection=1.31).draw(FIRST, 10, 1, 0.0).clients) == 12


# Devices.


def test_a_client_takes_the_time_of_its_device():
    device = DeviceTable(examples_per_s=10.0, download_mbit_s=8.0, upload_mbit_s=2.0, latency_s=0.25)
    course = world(devices={"phone": device}).course(np.arange(3), FIRST, loads(3, 4_000_000, 50, 1_000_000))
    assert np.allclose(course.download_s.T, [0.25, 4.25])
    assert np.allclose(course.upload_s.T, [4.25 + 5 + 0.25, 13.5])
    assert np.isinf(course.vanishes_s).all()


def test_classes_have_their_shares_and_spreads_are_lognormal():
    fast = DeviceTable(share=3.0, examples_per_s=1e6, compute_spread=0.5, latency_s=0)
    slow = DeviceTable(share=1.0, examples_per_s=1e3, compute_spread=0.5, latency_s=0)
    one = world(devices={"fast": fast, "slow": slow})
    times = np.log10(one.course(EVERYBODY, FIRST, loads(20_000, examples=10**6)).upload_s[1])
    is_slow = times > 1.5
    assert abs(is_slow.mean() - 0.25) < 5 * (0.25 * 0.75 / 20_000) ** 0.5
    for mine, median in ((times[~is_slow], 0.0), (times[is_slow], 3.0)):
        assert abs(mine.mean() - median) < 5 * 0.5 / math.log(10) / len(mine) ** 0.5
        assert abs(mine.std() * math.log(10) - 0.5) < 0.02
    again = np.log10(one.course(EVERYBODY, AttemptId(9, 1), loads(20_000, examples=10**6)).upload_s[1])
    assert np.array_equal(times, again), "a client keeps its device"


def test_the_order_of_the_tables_does_not_matter():
    devices = {"slow": DeviceTable(examples_per_s=1), "fast": DeviceTable(examples_per_s=100)}
    some = loads(500, examples=100)
    one, other = (
        world(devices=dict(order)).course(np.arange(500), FIRST, some)
        for order in (devices.items(), reversed(devices.items()))
    )
    assert np.array_equal(one.upload_s, other.upload_s)


def test_both_ways_share_one_networks_factor_and_jitter_is_anew_each_round():
    one = world(devices={"d": DeviceTable(network_spread=1.0, latency_s=0, download_mbit_s=8, upload_mbit_s=8)})
    course = one.course(EVERYBODY, FIRST, loads(20_000, 10**6, 0, 10**6))
    assert np.allclose(course.upload_s[1], 2 * course.download_s[1])
    moody = world(jitter=0.5, devices={"d": DeviceTable(latency_s=1.0)})
    first, second = (np.log(moody.course(EVERYBODY, AttemptId(r, 1), loads(20_000)).download_s[0]) for r in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert abs(first.std() - 0.5) < 0.02


def test_a_dropout_vanishes_at_any_point_of_its_work():
    one = world(dropout=0.3, devices={"d": DeviceTable(latency_s=0, examples_per_s=1)})
    vanishes = one.course(EVERYBODY, FIRST, loads(20_000, examples=10)).vanishes_s
    gone = vanishes[np.isfinite(vanishes)]
    assert abs(len(gone) / 20_000 - 0.3) < 5 * (0.21 / 20_000) ** 0.5
    assert abs(gone.mean() - 5) < 0.2
    assert gone.max() < 10


# The end of a round.


def course_of(done, vanishes=None) -> Course:
    done = np.array(done, dtype=float)
    gone = np.full(len(done), np.inf) if vanishes is None else np.array(vanishes, dtype=float)
    return Course(np.stack([0 * done, done / 2]), np.stack([done / 2, done]), gone)


INF = math.inf
ENDS = {
    "everybody": (course_of([4, 2, 6]), None, {}, 6.0, [1, 1, 1], [0, 0, 0]),
    "the deadline": (course_of([4, 2, 6]), None, {"deadline_s": 5.0}, 5.0, [1, 1, 0], [0, 0, 0]),
    "the last one is lost before the others are in": (
        course_of([4, 2, 6], [INF, INF, 1]),
        None,
        {},
        4.0,
        [1, 1, 0],
        [0, 0, 1],
    ),
    "the last one is lost after the others are in": (
        course_of([4, 2, 9], [INF, INF, 7]),
        None,
        {},
        7.0,
        [1, 1, 0],
        [0, 0, 1],
    ),
    "the first two": (course_of([4, 2, 6]), 2, {}, 4.0, [1, 1, 0], [0, 0, 0]),
    "the first two of three at once": (course_of([4, 4, 4]), 2, {}, 4.0, [1, 1, 0], [0, 0, 0]),
    "lost after the end is too late, not lost": (course_of([4, 2, 9], [INF, INF, 7]), 2, {}, 4.0, [1, 1, 0], [0, 0, 0]),
    "too few are left": (course_of([4, 2, 6], [1, INF, 3]), 2, {}, 3.0, [0, 1, 0], [1, 0, 1]),
    "nobody in time": (course_of([4, 6]), None, {"deadline_s": 1.0}, 1.0, [0, 0], [0, 0]),
    "all lost": (course_of([4, 6], [1, 2]), None, {"deadline_s": 9.0}, 2.0, [0, 0], [1, 1]),
    "nobody asked": (course_of([]), None, {}, 0.0, [], []),
}


@pytest.mark.parametrize(("course", "size", "fields", "seconds", "arrived", "dropped"), ENDS.values(), ids=ENDS)
def test_a_round_ends(course, size, fields, seconds, arrived, dropped):
    close = world(**fields).close(course, loads(len(arrived), 100, 1, 100), size)
    assert close.seconds == seconds
    assert close.arrived.tolist() == [bool(one) for one in arrived]
    assert close.dropped.tolist() == [bool(one) for one in dropped]


def test_bytes_are_those_that_were_moved_by_then():
    weights = loads(3, 1000, 1, 100)
    whole = world().close(course_of([4, 2, 6]), weights, None)
    assert (whole.bytes_down, whole.bytes_up) == (3000, 300)
    cut = world(deadline_s=3.0).close(course_of([4, 2, 8]), weights, None)
    # At 3 s: of the first client's upload from 2 s to 4 s a half, of the third one's download to 4 s three quarters.
    assert (cut.bytes_down, cut.bytes_up) == (1000 + 1000 + 750, 50 + 100 + 0)
    lost = world().close(course_of([4, 2, 8], [1, INF, INF]), weights, None)
    assert (lost.bytes_down, lost.bytes_up) == (500 + 1000 + 1000, 0 + 100 + 100)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.none() | st.floats(0, 1)), min_size=1, max_size=20),
    st.none() | st.integers(1, 20),
    st.none() | st.floats(0.1, 100),
)
def test_every_client_ends_one_way(clients, size, deadline_s):
    done = [seconds for seconds, _ in clients]
    course = course_of(done, [INF if lost is None else lost * s for s, lost in clients])
    close = world(deadline_s=deadline_s).close(course, loads(len(done), 100, 1, 100), size)
    assert not (close.arrived & close.dropped).any()
    assert close.arrived.sum() <= min(size or 20, len(done))
    assert close.seconds <= min(max(done), deadline_s or INF)
    assert 100 * close.arrived.sum() <= close.bytes_up <= close.bytes_down <= 100 * len(done)
    late = ~close.arrived & ~close.dropped
    assert not late.any() or close.seconds in {deadline_s, *done}
