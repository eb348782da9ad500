"""From updates to an aggregate: exact means in any order, all of an update or nothing of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.arrays import specs_of
from fedlearn.errors import UpdateError
from fedlearn.learning.collect import (
    MAX_EXAMPLES,
    PartialSum,
    StackCollector,
    SumCollector,
    collector_for,
    update_checksum,
)
from fedlearn.learning.update import Update
from strategies import create

MODEL = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(1, np.float32)}


def update(seed: int, examples: int = 3, releases=("delta",)) -> Update:
    generator = np.random.default_rng(seed)
    return Update(
        {
            release: {name: generator.normal(size=a.shape).astype(np.float32) for name, a in MODEL.items()}
            for release in releases
        },
        examples=examples,
    )


CLIENTS = st.lists(st.tuples(st.integers(0, 999), st.integers(1, 10_000)), min_size=1, max_size=6)


@given(CLIENTS, st.randoms(use_true_random=False))
@settings(deadline=None)
@pytest.mark.parametrize(
    ("strategy", "releases"), [("fedavg", ("delta",)), ("scaffold", ("control", "delta")), ("median", ("delta",))]
)
def test_the_order_of_arrival_changes_no_bit(strategy, releases, clients, random):
    arriving = [(f"c{i}", update(seed, examples, releases)) for i, (seed, examples) in enumerate(clients)]
    results = []
    for _ in range(2):
        collector = collector_for(create(strategy), MODEL)
        for client, one in arriving:
            collector.add(client, one)
        results.append(collector.aggregate(population=9))
        collector.close()
        random.shuffle(arriving)
    a, b = results
    assert (a.clients, a.population, a.examples) == (len(clients), 9, sum(n for _, n in clients))
    assert (a.clients, a.examples) == (b.clients, b.examples)
    assert set(a.means) == set(releases)
    for release in releases:
        for name in MODEL:
            assert a.means[release][name].tobytes() == b.means[release][name].tobytes()


@given(CLIENTS)
@settings(deadline=None)
def test_means_are_exact_to_half_a_quantum(clients):
    collector = SumCollector(create("scaffold"), specs_of(MODEL))
    updates = [update(seed, examples, ("delta", "control")) for seed, examples in clients]
    for i, one in enumerate(updates):
        collector.add(f"c{i}", one)
    means = collector.aggregate(9).means
    for release in ("delta", "control"):  # SCAFFOLD counts each client once, for both
        exact = sum(Fraction(float(u.private[release]["b"][0])) for u in updates) / len(updates)
        assert abs(Fraction(float(means[release]["b"][0])) - exact) <= Fraction(1, 2**33) + Fraction(1, 2**50)


def test_examples_weigh_where_the_strategy_says_so():
    collector = collector_for(create("fedavg"), MODEL)
    for client, value, examples in (("a", 1.0, 30), ("b", 4.0, 10)):
        delta = {name: np.full_like(array, value) for name, array in MODEL.items()}
        collector.add(client, Update({"delta": delta}, examples))
    assert collector.aggregate(2).means["delta"]["b"] == pytest.approx(1.75)


BAD = {
    "twice": ("a", update(2), "client 'a' sent a second one"),
    "another release": ("x", Update({"control": update(2).private["delta"]}, 3), "releases ['control']"),
    "no release": ("x", Update({}, 3), "releases []"),
    "one too many": ("x", update(2, releases=("delta", "control")), "releases ['control', 'delta']"),
    "no examples": ("x", update(2, examples=0), "0 training examples"),
    "negative examples": ("x", update(2, examples=-1), "-1 training examples"),
    "too many examples": ("x", update(2, examples=MAX_EXAMPLES + 1), "training examples, expected 1 to"),
    "another shape": ("x", Update({"delta": {**MODEL, "b": np.zeros(2, np.float32)}}, 3), "float32[2]"),
    "not finite": ("x", Update({"delta": {**MODEL, "b": np.full(1, np.nan, np.float32)}}, 3), "not finite"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("strategy", ["fedavg", "median"])
def test_a_refused_update_changes_nothing(strategy, name):
    client, bad, message = BAD[name]
    with_bad, without = collector_for(create(strategy), MODEL), collector_for(create(strategy), MODEL)
    for collector in (with_bad, without):
        collector.add("a", update(1))
    with pytest.raises(UpdateError) as caught:
        with_bad.add(client, bad)
    assert message in caught.value.message
    for collector in (with_bad, without):
        collector.add("b", update(3))
    a, b = with_bad.aggregate(2), without.aggregate(2)
    assert (a.clients, a.examples) == (b.clients, b.examples) == (2, 6)
    assert all(a.means["delta"][n].tobytes() == b.means["delta"][n].tobytes() for n in MODEL)
    with_bad.close()
    without.close()


def test_all_releases_enter_or_none():
    """The second release is bad: the first must not be in its sum."""
    collector = collector_for(create("scaffold"), MODEL)
    collector.add("a", update(1, releases=("delta", "control")))
    good = update(2).private["delta"]
    for bad in ({"delta": good, "control": {**MODEL, "b": np.full(1, np.inf, np.float32)}},):
        with pytest.raises(UpdateError):
            collector.add("b", Update(bad, 3))
        with pytest.raises(UpdateError):
            collector.add("c", Update(dict(reversed(bad.items())), 3))
    only = update(1, releases=("delta", "control")).private
    means = collector.aggregate(2).means
    for release in ("delta", "control"):
        np.testing.assert_allclose(means[release]["w"], only[release]["w"], atol=2**-33)


def test_an_empty_stack_has_no_file_and_no_aggregate():
    collector = collector_for(create("median"), MODEL)
    assert isinstance(collector, StackCollector)
    with pytest.raises(UpdateError, match="none arrived"):
        collector.aggregate(1)
    collector.close()
    collector.close()


@pytest.mark.parametrize(
    "other",
    [
        update(1, examples=4),
        update(2),
        Update({"control": update(1).private["delta"]}, 3),
        Update({"delta": {"w": update(1).private["delta"]["w"]}}, 3),
        Update({"delta": {n: a.astype(np.float64) for n, a in update(1).private["delta"].items()}}, 3),
        Update({"delta": {n: a[None] for n, a in update(1).private["delta"].items()}}, 3),
    ],
)
def test_checksums_tell_updates_apart(other):
    assert update_checksum(update(1)) == update_checksum(update(1))
    assert update_checksum(other) != update_checksum(update(1))


def test_checksums_follow_values_and_not_layout():
    one = update(1)
    turned = Update({"delta": {n: np.asfortranarray(a) for n, a in reversed(one.private["delta"].items())}}, 3)
    assert update_checksum(turned) == update_checksum(one)


def partial_of(strategy: str, *updates: tuple[str, Update]) -> PartialSum:
    """What a block of these clients gives."""
    collector = collector_for(create(strategy), MODEL)
    assert isinstance(collector, SumCollector)
    for client, one in updates:
        collector.add(client, one)
    return PartialSum(collector._sums, {client: one.examples for client, one in updates})


@pytest.mark.parametrize(("strategy", "releases"), [("fedavg", ("delta",)), ("scaffold", ("control", "delta"))])
def test_sums_of_blocks_are_the_sum(strategy, releases):
    updates = [(name, update(i, i + 1, releases)) for i, name in enumerate("abcde")]
    one_by_one, merged = (collector_for(create(strategy), MODEL) for _ in range(2))
    for client, one in updates:
        one_by_one.add(client, one)
    merged.merge(partial_of(strategy, *updates[:3]))
    merged.add(*updates[3])
    merged.merge(partial_of(strategy, updates[4]))
    got, expected = merged.aggregate(9), one_by_one.aggregate(9)
    assert (got.clients, got.examples) == (expected.clients, expected.examples) == (5, 15)
    for release, arrays in expected.means.items():
        assert all(np.array_equal(got.means[release][name], array) for name, array in arrays.items())


def test_a_block_is_merged_whole_or_not_at_all():
    collector = collector_for(create("scaffold"), MODEL)
    both = ("control", "delta")
    collector.merge(partial_of("scaffold", ("a", update(1, releases=both))))
    with pytest.raises(UpdateError, match="'a' is in this round's sum already"):
        collector.merge(partial_of("scaffold", ("b", update(2, releases=both)), ("a", update(1, releases=both))))
    with pytest.raises(UpdateError, match="releases"):
        collector.merge(partial_of("fedavg", ("c", update(3))))
    huge = Update({"delta": update(1).private["delta"], "control": {n: a + 2e9 for n, a in MODEL.items()}}, 1)
    collector.merge(partial_of("scaffold", ("d", huge)))
    with pytest.raises(UpdateError, match="headroom"):
        collector.merge(partial_of("scaffold", ("e", huge)))
    assert collector.aggregate(9).clients == 2
    with pytest.raises(UpdateError, match="needs each client's update by itself"):
        collector_for(create("median"), MODEL).merge(partial_of("fedavg", ("a", update(1))))


def test_checksums_tell_partial_sums_apart():
    one = partial_of("fedavg", ("a", update(1)), ("b", update(2)))
    assert one.checksum() == partial_of("fedavg", ("b", update(2)), ("a", update(1))).checksum()
    others = [("a", update(1)), ("b", update(3))], [("a", update(1)), ("c", update(2))], [("a", update(1))]
    assert len({one.checksum(), *(partial_of("fedavg", *other).checksum() for other in others)}) == 4
