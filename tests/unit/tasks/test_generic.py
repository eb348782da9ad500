from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fedlearn.data.partition import make_partition
from fedlearn.errors import DataError, StudyError
from fedlearn.learning.population import Population
from fedlearn.learning.task import build_model
from fedlearn.tasks import load_task

OPTIONS = {
    "label": "sick",
    "features": ["age", "dose"],
    "categorical": {"ward": ["north", "south"]},
    "ranges": {"age": [0.0, 100.0]},
    "client": "clinic",
    "classes": ["no", "yes"],
}
TABLE = """clinic,age,dose,ward,sick
A,20,1,north,no
A,40,,south,yes
A,?,3,,no
B,60,5,north,yes
B,80,7,north,no
"""


def write(tmp_path, text, name="t.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_table_by_configuration_alone(tmp_path):
    task = load_task("tabular/csv", {**OPTIONS, "path": str(write(tmp_path, TABLE))})
    data = task.load()
    assert data.client.tolist() == ["a", "a", "a", "b", "b"]
    assert data.y.tolist() == [0, 1, 0, 1, 0]
    rows = make_partition(data, "natural", None, 0)
    train = Population(task, data, rows, 0, folds=1).client("a").train.x
    named = dict(zip(task.feature_names, train.T.tolist(), strict=True))
    assert named["age"] == pytest.approx([-0.6, -0.2, -0.4])  # the public range, and the training median
    assert named["age missing"] == [0, 0, 1]
    assert named["dose"] == pytest.approx([-1, 0, 1])  # own mean and deviation
    assert named["ward=south"] == [0, 1, 0]
    assert named["ward=missing"] == [0, 0, 1]
    assert load_task("tabular/csv", task.options) == task


def test_test_rows_change_nothing_in_training_rows(tmp_path):
    task = load_task("tabular/csv", OPTIONS)
    data = task.load(write(tmp_path, TABLE))
    train, test = np.array([0, 1, 2]), np.array([3, 4])
    before = task.prepare(data.take(train), data.take(test))
    changed = data.take(np.arange(5))
    changed.x[test] = 1e6
    after = task.prepare(changed.take(train), changed.take(test))
    assert np.array_equal(before.train.x, after.train.x)


def test_a_sites_own_file_needs_no_client_column(tmp_path):
    task = load_task("tabular/csv", OPTIONS)
    text = "\n".join(line.partition(",")[2] for line in TABLE.splitlines())
    assert task.load(write(tmp_path, text)).client is None
    with pytest.raises(DataError, match="missing column 'clinic'"):
        load_task("tabular/csv", {**OPTIONS, "path": str(write(tmp_path, text))}).load()


def test_regression(tmp_path):
    options = {"label": "dose", "features": ["age"], "kind": "regression", "target_range": [0.0, 10.0]}
    task = load_task("tabular/csv", options)
    assert task.card.metric == "r2"
    data = task.load(write(tmp_path, "age,dose\n1,2\n2,4\n3,6\n"))
    y = task.prepare(data, data).train.y
    assert y.tolist() == [2, 4, 6]
    model = build_model(task, 0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-0.6)  # of the range 0 to 10
        outputs = model(torch.zeros(3, 2))
    assert outputs.tolist() == [[2.0]] * 3
    assert task.loss(outputs, torch.from_numpy(y)).tolist() == pytest.approx([0, 0.4**2, 0.8**2])
    assert task.metrics(y[:, None], y) == pytest.approx({"r2": 1.0, "mae": 0.0})
    assert task.metrics(y[:, None] + 1.0, y)["mae"] == pytest.approx(1.0)
    assert np.isnan(task.metrics(y[:1, None], y[:1])["r2"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": [], "categorical": {}}, "no feature columns"),
        ({"features": ["sick"]}, "is a feature and the label"),
        ({"classes": ["no"]}, "expected 2 or more"),
        ({"ranges": {"age": [3.0, 1.0]}}, "expected low below high"),
        ({"ranges": {"weight": [3.0, 4.0]}}, "not among the features"),
        ({"label": 3}, "option 'label'"),
        ({"kind": "clasification"}, "did you mean 'classification'"),
        ({"categorial": {}}, "did you mean 'categorical'"),
    ],
)
def test_options_that_cannot_be(change, words):
    with pytest.raises(StudyError) as caught:
        load_task("tabular/csv", {**OPTIONS, **change})
    assert words in str(caught.value)


def test_missing_options_and_missing_data():
    with pytest.raises(StudyError, match="missing option 'label'"):
        load_task("tabular/csv", {})
    for name, options in (
        ("tabular/csv", OPTIONS),
        ("image/npz", {"classes": 2}),
        ("image/folder", {"classes": ["a", "b"]}),
    ):
        with pytest.raises(DataError, match="no data of its own"):
            load_task(name, options).load()


def test_cells_that_do_not_fit(tmp_path):
    task = load_task("tabular/csv", OPTIONS)
    for cell, words in (("perhaps", "one of 'no', 'yes'"), ("", "an empty cell")):
        with pytest.raises(DataError, match=f"column 'sick', line 2: got .*{words}|column 'sick', line 2: got {words}"):
            task.load(write(tmp_path, f"age,dose,ward,sick\n1,2,north,{cell}\n")).whole()
    with pytest.raises(DataError, match="column 'ward', line 2: got 'west', expected one of 'north', 'south'"):
        task.load(write(tmp_path, "age,dose,ward,sick\n1,2,west,no\n")).whole()


def npz(tmp_path, **arrays):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


GREY = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)


def test_npz_in_medmnist_layout(tmp_path):
    task = load_task("image/npz", {"classes": 3, "channels": 1})
    labels = np.array([[0], [1], [2], [0], [1]])
    data = task.load(
        npz(tmp_path, train_images=GREY, train_labels=labels, test_images=GREY[:2], test_labels=labels[:2])
    )
    assert data.x.shape == (7, 1, 6, 7)
    assert data.y.tolist() == [0, 1, 2, 0, 1, 0, 1]
    prepared = task.prepare(data, data).train.x
    assert prepared.dtype == np.float32
    assert prepared.min() >= -1
    assert prepared.max() <= 1
    colour = np.repeat(GREY[..., None], 3, axis=3)
    clients = np.array(["A", "A", "B", "B", "B"])
    task = load_task("image/npz", {"classes": 3})
    data = task.load(npz(tmp_path, train_images=colour, train_labels=labels[:, 0], train_clients=clients))
    assert data.x.shape == (5, 3, 6, 7)
    assert data.client.tolist() == ["a", "a", "b", "b", "b"]


LABELS = np.zeros(5, dtype=np.int64)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": GREY}, "no array 'train_images'"),
        ({"train_images": GREY}, "no array train_labels beside it"),
        ({"train_images": GREY / 255, "train_labels": LABELS}, "got dtype float64, expected uint8"),
        ({"train_images": GREY[..., None].repeat(3, 3), "train_labels": LABELS}, "expected (n, height, width)"),
        ({"train_images": GREY, "train_labels": LABELS[:4]}, "expected integers of shape [5]"),
        ({"train_images": GREY, "train_labels": LABELS + 3}, "got label 3, expected 0 to 2"),
        ({"train_images": GREY, "train_labels": LABELS, "train_clients": LABELS}, "expected text of shape [5]"),
        (
            {"train_images": GREY, "train_labels": LABELS, "val_images": GREY[:, 1:], "val_labels": LABELS},
            "expected one shape",
        ),
        ({"train_images": np.array([{"a": 1}], dtype=object), "train_labels": LABELS}, "plain arrays"),
    ],
)
def test_npz_of_another_layout(tmp_path, arrays, words):
    with pytest.raises(DataError) as caught:
        load_task("image/npz", {"classes": 3, "channels": 1}).load(npz(tmp_path, **arrays)).whole()
    assert words in str(caught.value)


def test_not_an_npz(tmp_path):
    task = load_task("image/npz", {"classes": 3})
    with pytest.raises(DataError, match=r"not an \.npz archive"):
        task.load(write(tmp_path, "hello", "a.npz"))
    with pytest.raises(DataError, match="no such file"):
        task.load(tmp_path / "none.npz")


def test_a_folder_of_images(tmp_path):
    for name, shade in (("cat", 0), ("dog", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10), (shade, shade, shade)).save(tmp_path / name / "1.png")
    (tmp_path / "cat" / "notes.md").write_text("not an image")
    task = load_task("image/folder", {"classes": ["cat", "dog", "owl"], "size": 8, "channels": 1})
    data = task.load(tmp_path)
    assert data.x.shape == (2, 1, 8, 8)
    assert data.y.tolist() == [0, 1]
    assert data.x[:, 0, 0, 0].tolist() == [0, 255]
    (tmp_path / "dog" / "2.png").write_text("broken")
    with pytest.raises(DataError, match=r"2\.png: cannot be read as an image"):
        task.load(tmp_path).whole()
    (tmp_path / "dog" / "2.png").unlink()
    Image.new("LAB", (20, 10)).save(tmp_path / "dog" / "3.tif")  # Pillow raises ValueError where it cannot convert
    found = task.load(tmp_path)
    assert (len(found), found.left_out.rows) == (2, 1)
    (tmp_path / "dog" / "3.tif").unlink()
    (tmp_path / "cow").mkdir()
    with pytest.raises(DataError, match="got the subfolders cat, cow, dog, expected cat, dog, owl"):
        task.load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        task.load(tmp_path / "none")


def test_folders_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no images in its subfolders"):
        load_task("image/folder", {"classes": ["cat", "dog"]}).load(tmp_path).whole()
