"""How an example counts in a charged evaluation: never by more than 1, and without noise the metrics are the task's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlearn.errors import StudyError, UnsupportedError
from fedlearn.learning.metrics import accuracy, average_precision, balanced_accuracy, roc_auc
from fedlearn.privacy.evaluation import per_unit
from fedlearn.privacy.scoring import BinaryScores, ShareRight, SquaredErrors, _as_counts
from fedlearn.tasks import load_task, task_names

ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)
BINARY, SHARE, SQUARED = BinaryScores(), ShareRight("top1"), SquaredErrors(-2.0, 6.0)


def of(count: int, *shape: int):
    return arrays(np.float32, (count, *shape), elements=ANY)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 6))
def test_no_example_counts_more_than_one_whatever_the_model_says(data, count):
    labels = data.draw(arrays(np.int64, count, elements=st.integers(0, 1)))
    places = data.draw(arrays(np.int64, (count, 3), elements=st.integers(0, 3)))
    targets = data.draw(of(count))
    with np.errstate(invalid="ignore", over="ignore"):
        found = [
            BINARY.contributions(data.draw(of(count, 1)), labels),
            BINARY.contributions(data.draw(of(count, 2)), labels),
            SHARE.contributions(data.draw(of(count, 4)), labels),
            SHARE.contributions(data.draw(of(count, 3, 4)), places),
            SQUARED.contributions(data.draw(of(count, 1)), targets),
        ]
    for scoring, vectors in zip((BINARY, BINARY, SHARE, SHARE, SQUARED), found, strict=True):
        assert vectors.shape == (count, scoring.cells)
        assert np.isfinite(vectors).all()
        assert (np.linalg.norm(vectors, axis=1) <= 1 + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32), st.booleans())
def test_one_unit_moves_the_sums_by_at_most_one(rows, seed, grouped):
    """Also where a task's scoring breaks its promise: longer vectors, numbers that are none."""
    rng = np.random.default_rng(seed)
    wild = rng.normal(size=(rows, 5)) * 10.0 ** rng.integers(-3, 9, size=(rows, 1))
    wild[rng.random((rows, 5)) < 0.05] = np.nan
    groups = np.array([f"g{g}" for g in rng.integers(0, 4, size=rows)]) if grouped else None
    whole = per_unit(wild, groups).sum(axis=0)
    for unit in range(rows) if groups is None else np.unique(groups):
        kept = np.arange(rows) != unit if groups is None else groups != unit
        rest = per_unit(wild[kept], None if groups is None else groups[kept]).sum(axis=0)
        assert np.linalg.norm(whole - rest) <= 1 + 1e-9


def test_a_group_counts_once_by_the_mean_of_its_rows():
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert per_unit(rows, np.array(["b", "a", "a", "a"])).tolist() == [
        [pytest.approx(1 / 3), pytest.approx(2 / 3)],
        [1, 0],
    ]


def test_binary_metrics_without_noise_are_those_of_binned_scores():
    rng = np.random.default_rng(0)
    y = (rng.random(4_000) < 0.2).astype(np.int64)
    scores = rng.normal(size=4_000) * 2 + 1.5 * y
    found = BINARY.metrics(BINARY.contributions(scores[:, None], y).sum(axis=0), 0.0)
    width = 2 * BINARY.limit / BINARY.bins
    binned = np.clip(np.floor(scores / width), -BINARY.bins // 2, BINARY.bins // 2 - 1)
    assert found["accuracy"] == pytest.approx(accuracy(scores > 0, y == 1))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy(scores > 0, y == 1))
    assert found["auc"] == pytest.approx(roc_auc(binned, y))
    assert found["average_precision"] == pytest.approx(average_precision(binned, y))
    assert found["auc"] == pytest.approx(roc_auc(scores, y), abs=0.01)
    both = BINARY.contributions(np.column_stack([-scores / 2, scores / 2]), y)
    assert np.array_equal(both, BINARY.contributions(scores[:, None], y)), "two outputs are their difference"


def test_shares_and_squared_errors_without_noise_are_the_tasks_own():
    rng = np.random.default_rng(1)
    outputs, y = rng.normal(size=(500, 4)), rng.integers(4, size=500)
    found = SHARE.metrics(SHARE.contributions(outputs, y).sum(axis=0), 0.0)
    assert found == {"top1": pytest.approx(accuracy(outputs.argmax(axis=1), y))}
    sequences, tokens = rng.normal(size=(90, 7, 5)), rng.integers(5, size=(90, 7))
    sums = SHARE.contributions(sequences, tokens).sum(axis=0)
    assert SHARE.metrics(sums, 0.0)["top1"] == pytest.approx(accuracy(sequences.argmax(axis=2), tokens))
    assert SHARE.count(sums) == pytest.approx(90)
    targets = rng.uniform(-2, 6, size=800)
    predicted = np.clip(targets + rng.normal(size=800) * 0.7, -2, 6)
    sums = SQUARED.contributions(predicted[:, None], targets).sum(axis=0)
    found = SQUARED.metrics(sums, 0.0)
    residual = ((predicted - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()
    assert found == {"r2": pytest.approx(1 - residual), "mae": pytest.approx(np.abs(predicted - targets).mean())}
    assert SQUARED.count(sums) == pytest.approx(800)


def test_noisy_metrics_are_near_where_there_is_data_and_none_where_there_is_not():
    rng = np.random.default_rng(2)
    y = (rng.random(20_000) < 0.3).astype(np.int64)
    scores = rng.normal(size=20_000) * 2 + 3 * y
    sums = BINARY.contributions(scores[:, None], y).sum(axis=0)
    exact = BINARY.metrics(sums, 0.0)
    for _ in range(20):
        noisy = BINARY.metrics(sums + rng.normal(size=sums.size) * 10, 10.0)
        assert noisy == {name: pytest.approx(value, abs=0.03) for name, value in exact.items()}
    for scoring in (BINARY, SHARE, SQUARED):
        nothing = scoring.metrics(np.zeros(scoring.cells), 10.0)
        assert all(math.isnan(value) for value in nothing.values())
        assert all(math.isnan(value) for value in scoring.metrics(np.zeros(scoring.cells), 0.0).values())


@given(arrays(np.float64, 8, elements=st.floats(-50, 50)))
def test_noisy_counts_become_counts_of_the_same_total(noisy):
    noisy[0] += 1 - min(0.0, noisy.sum())  # the total is above 0
    counts = _as_counts(noisy)
    assert (counts >= 0).all()
    assert counts.sum() == pytest.approx(noisy.sum())
    if (noisy >= 0).all():
        assert counts == pytest.approx(noisy)


OPTIONS = {
    "image/folder": {"classes": ["a", "b"]},
    "image/npz": {"classes": 3},
    "tabular/csv": {"label": "sick", "features": ["age"], "classes": ["no", "yes"]},
}


@pytest.mark.parametrize("name", task_names())
def test_a_charged_evaluation_has_the_tasks_primary_metric(name):
    task = load_task(name, OPTIONS.get(name))
    scoring = task.scoring()
    assert task.card.metric.split()[0] in scoring.metrics(np.zeros(scoring.cells), 1.0)


def test_what_is_not_scored_so_is_refused():
    for scoring, outputs, y in (
        (SHARE, np.zeros((3, 1)), np.zeros(3)),
        (SHARE, np.zeros(3), np.zeros(3, dtype=np.int64)),
        (BINARY, np.zeros((3, 3)), np.zeros(3, dtype=np.int64)),
        (SQUARED, np.zeros((3, 2)), np.zeros(3)),
    ):
        with pytest.raises(UnsupportedError, match="got outputs of shape"):
            scoring.contributions(outputs, y)
    for bins, limit in ((3, 1.0), (0, 1.0), (4, 0.0), (4, math.inf)):
        with pytest.raises(StudyError, match="even number"):
            BinaryScores(bins, limit)
