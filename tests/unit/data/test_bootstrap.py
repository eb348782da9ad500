"""Clients that draw from one pool: pure functions of seed and number, as skewed as asked, free of charge."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from fedlearn.data.partition import make_partition
from fedlearn.errors import DataError, StudyError
from fedlearn.learning.task import Examples

LABELS = np.repeat(np.arange(5), (400, 300, 150, 100, 50))
POOL = Examples(np.zeros((len(LABELS), 2), dtype=np.float32), LABELS)


def population(clients=1000, seed=1, **options):
    return make_partition(POOL, "bootstrap", clients, seed, options)


def labels_of(rows, clients=400):
    mine = [LABELS[rows[client]] for client in rows.ids[:clients]]
    return np.stack([np.bincount(y, minlength=5) for y in mine])


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"alpha": 100.0, "examples_per_client": 3}])
def test_a_client_is_a_function_of_the_seed_and_its_number(options):
    small, large = population(1001, **options), population(9999, **options)
    for client in ("client-0000", "client-1000"):
        assert np.array_equal(small[client], large[client])
        assert small[client].dtype == np.int64
        assert len(small[client]) == options.get("examples_per_client", 32)
        assert (np.diff(small[client]) >= 0).all()
        assert not np.array_equal(small[client], population(1001, seed=2, **options)[client])
    rows, sizes = large.gather(("client-0007", "client-1000", "client-0007"))
    first, second, third = np.split(rows, np.cumsum(sizes)[:-1])
    assert np.array_equal(first, large["client-0007"])
    assert np.array_equal(second, small["client-1000"])
    assert np.array_equal(first, third)


def test_without_alpha_every_row_is_as_likely_as_every_other():
    rows, _ = population().gather(population().ids[:])
    counts = np.bincount(rows, minlength=len(LABELS))
    # 32,000 draws over 1,000 rows: the variance of a count is its mean, 32; chi-square with 999 degrees of freedom.
    assert abs(((counts - 32) ** 2 / 32).sum() - 999) < 5 * (2 * 999) ** 0.5


@pytest.mark.parametrize("alpha", [0.05, 1.0, 1e6])
def test_label_shares_are_dirichlet_around_the_pools(alpha):
    shares = labels_of(population(alpha=alpha, examples_per_client=100)) / 100
    prior = np.bincount(LABELS) / len(LABELS)
    # Dirichlet-multinomial: mean p, variance p (1 - p) / n * (n + alpha) / (1 + alpha).
    variance = prior * (1 - prior) / 100 * (100 + alpha) / (1 + alpha)
    assert (abs(shares.mean(axis=0) - prior) < 5 * np.sqrt(variance / 400)).all()
    assert np.allclose(shares.var(axis=0), variance, rtol=0.35)


def test_a_skew_beyond_numbers_leaves_one_label_a_client():
    assert (np.sort(labels_of(population(alpha=1e-9), 50))[:, :-1] == 0).all()


def test_a_pool_of_test_rows_may_lack_a_label():
    test = np.flatnonzero(LABELS == 4)[:5]
    train = np.setdiff1d(np.arange(len(LABELS)), test)
    rows = population(alpha=0.1, examples_per_client=10).set_aside(train, test, 5)
    for client in rows.ids[:50]:
        mine, held = rows.halves(client)
        assert (len(mine), len(held)) == (8, 2)
        assert set(held.tolist()) <= set(test.tolist())
        assert not set(mine.tolist()) & set(test.tolist())
        assert sorted([*mine, *held]) == rows[client].tolist()


@pytest.mark.parametrize(("examples", "folds", "held"), [(1, 5, 0), (2, 5, 1), (10, 2, 5), (3, 1000, 1)])
def test_everybody_has_a_training_row(examples, folds, held):
    rows = population(examples_per_client=examples).set_aside(np.arange(500), np.arange(500, 1000), folds)
    assert (rows.test_examples, rows.holds_out) == (held, held > 0)
    assert len(rows.gather(("client-0000",))[0]) == examples - held > 0


def test_a_hundred_million_clients_cost_nothing():
    tracemalloc.start()
    began = time.process_time()
    rows = population(10**8, alpha=0.3)
    cohort = [rows.ids[i] for i in range(0, 10**8, 10**6)]
    assert len(rows.gather(cohort)[0]) == 3200
    assert time.process_time() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("clients", "options", "error", "words"),
    [
        (0, {}, StudyError, "expected 1 or more of both"),
        (2, {"examples_per_client": 0}, StudyError, "expected 1 or more of both"),
        (2, {"examples_per_client": 2.5}, StudyError, "whole number"),
        (2, {"alpha": 0}, StudyError, "above 0"),
        (2, {"examples": 3}, StudyError, "did you mean 'examples_per_client'"),
        (None, {}, StudyError, "expected clients = 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(clients, options, error, words):
    with pytest.raises(error, match=words):
        make_partition(POOL, "bootstrap", clients, 0, options)


def test_data_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="0 rows"):
        make_partition(Examples(np.zeros((0, 2)), np.zeros(0, dtype=int)), "bootstrap", 2, 0)
    regression = Examples(np.zeros((8, 4)), np.linspace(0, 1, 8))
    assert len(make_partition(regression, "bootstrap", 2, 0)["client-0001"]) == 32
    with pytest.raises(StudyError, match="expected classes"):
        make_partition(regression, "bootstrap", 2, 0, {"alpha": 1.0})
