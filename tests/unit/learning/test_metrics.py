from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from fedlearn.learning.metrics import accuracy, average_precision, balanced_accuracy, roc_auc


def test_known_answers():
    scores, y = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])
    assert roc_auc(scores, y) == 0.75
    assert average_precision(scores, y) == pytest.approx((1 + 2 / 3) / 2)
    assert accuracy(np.array([1, 2, 3]), np.array([1, 2, 0])) == pytest.approx(2 / 3)
    assert balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 2])) == 0.5


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=60))
@settings(deadline=None)
def test_ties_and_all_as_in_scikit_learn(rows):
    scores = np.array([score for score, _ in rows], dtype=np.float32)
    y = np.array([positive for _, positive in rows], dtype=np.int64)
    if 0 < y.sum() < len(y):
        assert roc_auc(scores, y) == pytest.approx(roc_auc_score(y, scores))
        assert balanced_accuracy(scores > 3, y == 1) == pytest.approx(balanced_accuracy_score(y == 1, scores > 3))
    else:
        assert np.isnan(roc_auc(scores, y))
    if y.sum():
        assert average_precision(scores, y) == pytest.approx(average_precision_score(y, scores))
    else:
        assert np.isnan(average_precision(scores, y))


def test_nothing_to_measure_is_not_a_number():
    nothing = np.array([], dtype=np.int64)
    assert all(
        np.isnan(metric(nothing, nothing)) for metric in (accuracy, balanced_accuracy, roc_auc, average_precision)
    )
