from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.data import partition
from fedlearn.data.partition import client_id, client_ids, make_partition, partition_names
from fedlearn.errors import DataError, StudyError
from fedlearn.learning.task import Examples

MADE = [name for name in partition_names() if name != "natural"]
DEALT = [name for name in partition_names() if name != "bootstrap"]


def examples(rows, classes=4, seed=0):
    g = np.random.default_rng(seed)
    y = g.integers(0, classes, rows)
    return Examples(g.normal(size=(rows, 3)) + y[:, None], y, np.array([f"Site {i % 3}" for i in range(rows)]))


def options_of(draw_alpha, name):
    return {"alpha": draw_alpha} if name in {"dirichlet", "quantity"} else {}


@given(
    name=st.sampled_from(DEALT),
    rows=st.integers(40, 300),
    clients=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    alpha=st.sampled_from([1e-6, 0.01, 0.5, 100.0]),
)
@settings(deadline=None, max_examples=150)
def test_every_row_is_used_exactly_once_and_no_client_is_empty(name, rows, clients, seed, alpha):
    parts = make_partition(examples(rows), name, None if name == "natural" else clients, seed, options_of(alpha, name))
    assert len(parts) == (3 if name == "natural" else clients)
    assert all(part.dtype == np.int64 and len(part) > 0 and (np.diff(part) > 0).all() for part in parts.values())
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(rows))


@pytest.mark.parametrize("name", MADE)
def test_same_seed_same_partition_other_seed_another(name):
    data = examples(200)
    first, again, other = (make_partition(data, name, 7, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[k], again[k]) for k in first)
    if name != "feature_shift":  # decided by the features, not by the seed
        assert any(not np.array_equal(first[k], other[k]) for k in first)


@given(rows=st.integers(20, 200), clients=st.integers(1, 10), min_size=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_min_size_is_kept(rows, clients, min_size, seed):
    data = examples(rows)
    if rows < clients * min_size:
        with pytest.raises(DataError, match="which needs"):
            make_partition(data, "dirichlet", clients, seed, {"min_size": min_size})
        return
    for name in ("dirichlet", "quantity"):
        parts = make_partition(data, name, clients, seed, {"alpha": 0.05, "min_size": min_size})
        assert min(map(len, parts.values())) >= min_size


def test_levelling_takes_from_the_largest_and_leaves_the_others_alone():
    owner = np.repeat(np.arange(4), [10, 5, 1, 0])
    levelled = partition._level(owner, 4, 3, np.random.default_rng(0))
    assert sorted(np.bincount(levelled, minlength=4)) == [3, 3, 5, 5]


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(rows) for rows in partition.iid(100, 7, 0)]
    assert max(sizes) - min(sizes) <= 1


def test_small_alpha_gives_few_labels_and_large_alpha_all():
    labels = np.repeat(np.arange(10), 200)

    def labels_a_client(alpha):
        parts = partition.dirichlet(labels, 10, 3, alpha=alpha)
        return np.mean([len(np.unique(labels[rows])) for rows in parts])

    assert labels_a_client(0.01) < 4
    assert labels_a_client(1000.0) == 10


def test_two_shards_give_three_labels_at_most():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    parts = partition.shards(labels, 20, 0, shards_per_client=2)
    assert {len(rows) for rows in parts} == {50}
    assert max(len(np.unique(labels[rows])) for rows in parts) <= 4
    assert np.mean([len(np.unique(labels[rows])) for rows in parts]) < 2.5


def test_feature_shift_orders_clients_by_the_feature_and_mixing_undoes_it():
    x = np.random.default_rng(1).normal(size=(400, 2))
    x[0, 1] = np.nan
    sorted_means = [np.nanmean(x[rows, 1]) for rows in partition.feature_shift(x, 4, 0, feature=1)]
    assert sorted_means == sorted(sorted_means)
    mixed_means = [np.nanmean(x[rows, 1]) for rows in partition.feature_shift(x, 4, 0, feature=1, mixing=1.0)]
    assert np.ptp(mixed_means) < np.ptp(sorted_means) / 4


def test_ids():
    assert list(make_partition(examples(20), "iid", 3, 0)) == ["client-0000", "client-0001", "client-0002"]
    assert list(make_partition(examples(9), "natural", None, 0)) == ["site-0", "site-1", "site-2"]
    assert client_id("VA Long Beach") == "va-long-beach"
    with pytest.raises(DataError, match="share the id 'a-b'"):
        client_ids(np.array(["A b", "a-B"]))


PINNED = {
    "natural": "bea3e489128e11c7",
    "iid": "4d4f7e27b5150372",
    "dirichlet": "885899e2c3b69fc0",
    "shards": "15d983490c05a389",
    "quantity": "a0898a260a59a529",
    "feature_shift": "55da3d0a5b68f3b5",
}


@pytest.mark.parametrize("name", DEALT)
def test_ids_and_rows_are_pinned(name):
    parts = make_partition(examples(500), name, None if name == "natural" else 9, 7)
    digest = hashlib.sha256()
    for client, rows in parts.items():
        digest.update(client.encode() + rows.tobytes())
    assert digest.hexdigest()[:16] == PINNED[name]


@pytest.mark.parametrize("name", DEALT)
def test_rows_of_several_clients_are_gathered_in_their_order(name):
    parts = make_partition(examples(90), name, None if name == "natural" else 8, 3)
    cohort = [parts.ids[i] for i in (2, 0, 2, 1)]
    rows, sizes = parts.gather(cohort)
    assert rows.tolist() == np.concatenate([parts[client] for client in cohort]).tolist()
    assert sizes.tolist() == [len(parts[client]) for client in cohort]
    assert [part.size for part in parts.gather([])] == [0, 0]
    assert "nobody" not in parts
    for ask in (parts.__getitem__, parts.only, lambda client: parts.gather([client])):
        with pytest.raises(KeyError):
            ask("nobody")


def test_a_million_clients_take_two_numbers_each():
    labels = np.tile(np.arange(10), 120_000)
    data = Examples(np.zeros((len(labels), 1), dtype=np.float32), labels)
    began = time.process_time()
    rows = make_partition(data, "dirichlet", 1_000_000, 0, {"alpha": 0.3})
    assert time.process_time() - began < 8, "a second where nothing else runs"
    sizes = rows.partition.sizes()
    assert (len(rows), sizes.sum(), sizes.min()) == (1_000_000, len(labels), 1)
    assert rows.partition.order.nbytes + rows.partition.offsets.nbytes < 10e6
    assert rows.ids[-1] == "client-999999"
    assert len(rows["client-999999"]) == sizes[-1]


@pytest.mark.parametrize(
    ("name", "clients", "options", "error", "words"),
    [
        ("iid", 21, {}, DataError, "20 clients at most"),
        ("iid", 0, {}, StudyError, "got 0 clients"),
        ("dirichlt", 2, {}, StudyError, "did you mean 'dirichlet'"),
        ("dirichlet", 2, {"alfa": 1}, StudyError, "did you mean 'alpha'"),
        ("dirichlet", 2, {"alpha": 0}, StudyError, "above 0"),
        ("dirichlet", 2, {"alpha": "1"}, StudyError, "expected a number"),
        ("dirichlet", 2, {"min_size": 1.5}, StudyError, "whole number"),
        ("shards", 11, {"shards_per_client": 2}, DataError, "which needs 22"),
        ("shards", 2, {"shards_per_client": 0}, StudyError, "expected 1 or more"),
        ("feature_shift", 2, {"feature": 3}, StudyError, "expected 0 to 2"),
        ("feature_shift", 2, {"mixing": 2}, StudyError, "expected 0 to 1"),
        ("natural", 2, {}, StudyError, "names its clients"),
        ("natural", None, {"alpha": 1}, StudyError, "valid options: none"),
        ("iid", None, {}, StudyError, "expected clients = 1 or more"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(name, clients, options, error, words):
    with pytest.raises(error) as caught:
        make_partition(examples(20), name, clients, 0, options)
    assert words in str(caught.value)


def test_labels_that_do_not_fit():
    sequences = Examples(np.zeros((8, 4)), np.zeros((8, 4), dtype=np.int64))
    with pytest.raises(StudyError, match="one label a row"):
        make_partition(sequences, "dirichlet", 2, 0)
    regression = Examples(np.zeros((8, 4)), np.linspace(0, 1, 8))
    with pytest.raises(StudyError, match="expected classes"):
        make_partition(regression, "dirichlet", 2, 0)
    with pytest.raises(DataError, match="names no clients"):
        make_partition(regression, "natural", None, 0)
