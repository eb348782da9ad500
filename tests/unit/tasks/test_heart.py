from __future__ import annotations

import csv
import hashlib
from importlib.resources import files

import numpy as np
import pytest

from fedlearn.data.partition import make_partition
from fedlearn.errors import DataError
from fedlearn.learning.population import Population
from fedlearn.tasks.heart import HeartTask

SHIPPED = files("fedlearn.data") / "files" / "heart_disease_uci.csv"


def hospitals(task):
    data = task.load()
    return data, make_partition(data, "natural", None, 0)


def test_the_file_is_the_one_in_circulation():
    digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    assert digest == "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"


def test_counts_and_prevalence_by_hospital():
    data, rows = hospitals(HeartTask())
    assert {k: len(v) for k, v in rows.items()} == {
        "cleveland": 303,
        "hungary": 294,
        "switzerland": 123,
        "va-long-beach": 200,
    }
    ill = {k: round(100 * data.y[v].mean()) for k, v in rows.items()}
    assert ill == {"cleveland": 46, "hungary": 36, "switzerland": 93, "va-long-beach": 74}


def test_flamby_counts():
    _, rows = hospitals(HeartTask(variant="flamby"))
    assert [len(v) for v in rows.values()] == [303, 261, 46, 130]
    assert HeartTask().keeps_rows
    assert not HeartTask(variant="flamby").keeps_rows


def test_prepared_features_are_finite_named_and_moderate():
    for task in (HeartTask(), HeartTask(columns="all"), HeartTask(variant="flamby")):
        data, rows = hospitals(task)
        population = Population(task, data, rows, seed=3)
        for hospital in rows:
            mine = population.client(hospital)
            for batch in (mine.train, mine.test):
                assert batch.x.dtype == np.float32
                assert batch.x.shape[1] == len(task.feature_names)
                assert np.isfinite(batch.x).all()
                assert np.abs(batch.x).max() < 10


def test_no_cholesterol_at_all_becomes_the_public_constant_and_is_marked():
    task = HeartTask()
    data, rows = hospitals(task)
    x = Population(task, data, rows, seed=0).client("switzerland").train.x
    chol, marked = task.feature_names.index("chol"), task.feature_names.index("chol missing")
    assert np.unique(x[:, chol]).tolist() == [np.float32((200 - 220) / 50)]
    assert (x[:, marked] == 1).all()


def test_imputation_learns_from_training_rows_alone():
    task = HeartTask()
    data, rows = hospitals(task)
    mine = data.take(rows["va-long-beach"])
    train, test = task.split(mine, seed=1, folds=5, fold=0)
    before = task.prepare(mine.take(train), mine.take(test))
    changed = mine.take(np.arange(len(mine)))
    changed.x[test] = 77.0
    after = task.prepare(changed.take(train), changed.take(test))
    assert np.array_equal(before.train.x, after.train.x)

    measured = mine.take(train)
    chol = task.raw_columns.index("chol")
    present = measured.x[measured.x[:, chol] > 0, chol]
    filled = before.test.x[before.test.x[:, task.feature_names.index("chol missing")] == 1]
    assert np.allclose(filled[:, task.feature_names.index("chol")], (np.median(present) - 220) / 50)


def site_csv(tmp_path, keep, *, without=()):
    with SHIPPED.open(encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if keep(row)]
        columns = [c for c in reader.fieldnames if c not in without]
    path = tmp_path / "hospital.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_site_with_its_own_file_computes_what_the_simulation_does(tmp_path):
    task = HeartTask()
    data, rows = hospitals(task)
    whole = Population(task, data, rows, seed=5).client("hungary")
    path = site_csv(
        tmp_path,
        lambda r: r["dataset"] == "Hungary" or r["id"] == "304",
        without=("id", "dataset", "slope", "ca", "thal"),
    )
    own = task.load(path)
    assert own.client is None
    alone = Population(task, own, {"hungary": np.arange(len(own))}, seed=5).client("hungary")
    for a, b in ((whole.train, alone.train), (whole.test, alone.test)):
        assert np.array_equal(a.x, b.x)
        assert np.array_equal(a.y, b.y)


def test_row_304_is_moved_in_the_shipped_file_only(tmp_path):
    path = site_csv(tmp_path, lambda r: r["id"] in {"303", "304"})
    assert HeartTask().load(path).client.tolist() == ["cleveland", "cleveland"]


def test_a_file_of_another_schema_is_refused(tmp_path):
    with pytest.raises(DataError, match="missing column 'num'"):
        HeartTask().load(site_csv(tmp_path, lambda _: True, without=("num",)))
    path = site_csv(tmp_path, lambda r: r["id"] == "1")
    path.write_text(path.read_text().replace("typical angina", "angina"))
    with pytest.raises(DataError, match=r"column 'cp', line 2: got 'angina', expected one of 'typical angina'"):
        HeartTask().load(path).whole()


def test_metrics():
    outputs = np.array([[-1.0], [2.0], [0.5], [-3.0]], dtype=np.float32)
    assert HeartTask().metrics(outputs, np.array([0, 1, 0, 0])) == {"auc": 1.0, "accuracy": 0.75}
    assert np.isnan(HeartTask().metrics(outputs, np.ones(4, dtype=np.int64))["auc"])
