"""Degrees and thresholds against published ones, and the graphs' shape."""

import json
from math import comb
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import UnsupportedError
from fedlearn.secagg.graph import COMPLETE_LIMIT, Graph, members_of, parameters, sparse_parameters, to_bits

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "secagg" / "graph.json").read_text())


def ours(clients, adversarial, dropout, server):
    ppm = (round(adversarial * 1e6), round(dropout * 1e6))
    return sparse_parameters(clients, *ppm, semi_malicious=server == "semi-malicious")


@pytest.mark.parametrize("row", VECTORS["same"], ids=str)
def test_published_degrees_and_thresholds(row):
    *case, degree, threshold = row
    assert ours(*case)[:2] == (degree, threshold)


@pytest.mark.parametrize("row", VECTORS["stricter_here"], ids=str)
def test_a_threshold_that_the_survivors_might_not_reach_is_not_taken(row):
    # The published degree leaves one certain survivor for a threshold of two.
    *case, degree, threshold = row
    assert ours(*case)[:2] == (degree + 2, threshold)


@pytest.mark.parametrize("row", VECTORS["infeasible"] + VECTORS["beyond_our_degree_limit"][:1], ids=str)
def test_what_is_not_possible_is_refused(row):
    with pytest.raises(UnsupportedError, match="not possible"):
        ours(*row[:4])


def test_the_shared_table_of_semi_malicious_thresholds():
    expected = {
        (50, 0.1): (16, 11),
        (100, 0.1): (32, 22),
        (200, 0.1): (56, 39),
        (1000, 0.1): (96, 67),
        (100, 0.2): (42, 32),
    }
    for (clients, adversarial), pair in expected.items():
        assert ours(clients, adversarial, 0.1, "semi-malicious")[:2] == pair


@pytest.mark.parametrize("clients", [201, 300, 1000])
def test_the_three_probabilities_by_another_way(clients):
    """Sums from the other end, over all terms, as fractions: nothing is shared with the implementation but the definition."""
    found = parameters(clients, 100_000, 100_000)
    k, t, bad, gone = found.degree, found.threshold, clients // 10, clients // 10

    def more_than(limit, marked):
        ways = sum(comb(marked, i) * comb(clients - marked, k - i) for i in range(limit + 1))
        return comb(clients, k) - ways

    assert clients * (clients - k - 1) * comb(bad + gone, k) << 40 < comb(clients, k)
    assert more_than(found.adversarial, bad) * clients << 41 <= comb(clients, k)
    assert more_than(k - t, gone) * clients << 20 <= comb(clients, k)
    assert 2 * t > k + found.adversarial


@given(st.integers(3, COMPLETE_LIMIT), st.sampled_from([0.0, 0.05, 0.1, 0.2]))
def test_complete_graphs_never_let_both_kinds_of_share_reach_the_threshold(clients, adversarial):
    found = parameters(clients, round(adversarial * 1e6), 0)
    assert found.complete
    assert found.holders == clients
    assert 2 * found.threshold > clients + found.adversarial
    assert 2 * (found.threshold - 1) <= clients + found.adversarial
    assert found.adversarial >= max(1, int(adversarial * clients))


@pytest.mark.parametrize(("clients", "threshold"), [(3, 3), (4, 3), (5, 4), (10, 6), (20, 12), (100, 56)])
def test_small_consortia(clients, threshold):
    assert parameters(clients, 100_000, 100_000).threshold == threshold


@pytest.mark.parametrize("clients", [0, 1, 2, 10_001])
def test_too_few_or_too_many_clients_are_refused(clients):
    with pytest.raises(UnsupportedError, match="expected 3 to 10000"):
        parameters(clients, 100_000, 100_000)


def test_a_complete_graph_that_loses_too_many_is_refused():
    with pytest.raises(UnsupportedError, match="must stay"):
        parameters(10, 100_000, 500_000)


@settings(max_examples=8)
@given(st.binary(max_size=32), st.sampled_from([201, 250]))
def test_a_sparse_graph_is_regular_symmetric_and_has_no_loops(seed, clients):
    graph = Graph(parameters(clients, 100_000, 100_000), seed)
    for i in range(clients):
        near = graph.neighbours(i)
        assert len(near) == graph.parameters.degree
        assert i not in near
        assert list(near) == sorted(set(near))
        assert all(i in graph.neighbours(j) for j in near)
        assert graph.holders(i) == near
        assert graph.holder_set(i) == to_bits(near)
    assert [graph.point(0, j) for j in graph.neighbours(0)] == list(range(1, graph.parameters.degree + 1))


def test_the_seed_orders_the_ring():
    found = parameters(201, 100_000, 100_000)
    assert Graph(found, b"one").neighbours(0) != Graph(found, b"other").neighbours(0)
    assert Graph(found, b"one").neighbours(0) == Graph(found, b"one").neighbours(0)


def test_a_complete_graph():
    graph = Graph(parameters(4, 100_000, 100_000))
    assert graph.neighbours(1) == (0, 2, 3)
    assert graph.holders(1) == (0, 1, 2, 3)
    assert graph.holder_set(1) == 0b1111
    assert graph.point(1, 3) == 4


@given(st.sets(st.integers(0, 300)))
def test_sets_of_bits(members):
    assert list(members_of(to_bits(tuple(members)))) == sorted(members)
