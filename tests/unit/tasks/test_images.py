"""The image tasks that bring their own data."""

from __future__ import annotations

import numpy as np
import pytest

from fedlearn.data.partition import make_partition
from fedlearn.errors import DataError
from fedlearn.tasks.blood_smear import BloodSmearTask
from fedlearn.tasks.digits import DigitsTask


def test_digits():
    data = DigitsTask().load()
    assert (data.x.shape, data.x.dtype, data.x.max()) == ((1797, 1, 8, 8), np.uint8, 255)
    assert np.bincount(data.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(make_partition(data, "dirichlet", 10, 0, {"alpha": 0.3})) == 10


def test_blood_smear_hospitals_and_options():
    task = BloodSmearTask(hospitals=3, images=20, size=16)
    data = task.load()
    rows = make_partition(data, "natural", None, 0)
    assert {k: len(v) for k, v in rows.items()} == {"hospital-01": 20, "hospital-02": 20, "hospital-03": 20}
    assert task.card.synthetic
    assert not np.array_equal(data.x, BloodSmearTask(hospitals=3, images=20, size=16, data_seed=2).load().x)


def test_own_medmnist_file(tmp_path):
    path = tmp_path / "bloodmnist.npz"
    np.savez(path, train_images=np.zeros((4, 28, 28, 3), np.uint8), train_labels=np.array([[0], [7], [3], [1]]))
    assert BloodSmearTask(classes=8).load(path).y.tolist() == [0, 7, 3, 1]
    with pytest.raises(DataError, match="option classes"):
        BloodSmearTask().load(path).whole()


def test_metrics_known_answer():
    outputs = np.eye(4)[[0, 0, 2, 3]]
    got = BloodSmearTask().metrics(outputs, np.array([0, 1, 2, 3]))
    assert got == {"accuracy": 0.75, "balanced_accuracy": 0.75}
