"""Who takes part: a draw that depends on the study and on who is there, and on nothing else."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.learning.cohort import pick_cohort
from fedlearn.learning.rows import NumberedIds

CLIENTS = st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=12)


@given(CLIENTS, st.none() | st.integers(1, 15), st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_cohort_is_a_sorted_draw_without_replacement(clients, size, seed, random):
    cohort = pick_cohort(clients, size, seed, "train", 1)
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(clients)
    assert len(cohort) == (len(clients) if size is None else min(size, len(clients)))
    random.shuffle(clients)
    assert pick_cohort(clients, size, seed, "train", 1) == cohort


def test_every_client_is_drawn_equally_often():
    clients = [f"c{i}" for i in range(10)]
    counts = Counter(c for r in range(2000) for c in pick_cohort(clients, 3, 1, "train", r))
    # 2,000 draws with chance 0.3: within 5 standard deviations.
    assert all(abs(counts[c] - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for c in clients)


@pytest.mark.parametrize("other", [(2, "train", 1), (1, "evaluate", 1), (1, "train", 2)])
def test_rounds_purposes_and_seeds_draw_apart(other):
    clients = [f"c{i}" for i in range(50)]
    assert pick_cohort(clients, 10, *other) != pick_cohort(clients, 10, 1, "train", 1)


def test_of_a_million_only_the_cohort_is_named():
    ids = NumberedIds(1_000_000)
    cohort = pick_cohort(ids, 1000, 5, "train", 1)
    assert cohort == pick_cohort([*reversed(ids)], 1000, 5, "train", 1)
    began = time.process_time()
    for number in range(10):
        pick_cohort(ids, 1000, 5, "train", number)
    assert time.process_time() - began < 1, "ten milliseconds, most of them for the names"


def test_a_pinned_draw():
    assert pick_cohort("abcdefgh", 3, 2026, "train", 1) == ("d", "f", "h")
