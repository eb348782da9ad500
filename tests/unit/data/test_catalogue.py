from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from fedlearn.data.catalogue import EVERYBODY, MAX_SHARES, NOT_SPLIT, Availability, entry_of, list_data, summarise
from fedlearn.data.picture import MAX_BARS, picture_of_split
from fedlearn.errors import StudyError
from fedlearn.tasks import task_names

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_list_names_every_task_and_where_its_data_is():
    entries = {entry.name: entry for entry in list_data()}
    assert tuple(entries) == task_names()
    assert entries["hospital/heart"].availability is Availability.INCLUDED
    assert entries["device/keyboard"].availability is Availability.INSTALLED
    own = {"tabular/csv", "image/npz", "image/folder"}
    assert {name for name, e in entries.items() if e.availability is Availability.YOUR_OWN} == own


def test_data_that_is_not_installed_is_told_so(monkeypatch):
    cls = type("Cls", (), {})
    card = dataclasses.replace(entry_of("device/keyboard").card, package="no-such-distribution-fedlearn")
    cls.card = card
    monkeypatch.setattr("fedlearn.data.catalogue.task_class", lambda _: cls)
    assert entry_of("device/keyboard").availability is Availability.NOT_INSTALLED


def test_options_are_described():
    heart = {o.name: (o.kind, o.default) for o in entry_of("hospital/heart").options}
    assert heart == {
        "variant": ("full or flamby", "'full'"),
        "columns": ("common or all", "'common'"),
        "hidden": ("a whole number", "16"),
        "imputation": ("median or public", "'median'"),
    }
    table = {o.name: (o.kind, o.default) for o in entry_of("tabular/csv").options}
    assert table["label"] == ("text", None)
    assert table["categorical"] == ("a table", "{}")
    assert table["target_range"] == ("a list of 2", "(-1.0, 1.0)")


def test_heart_by_hospital():
    summary = summarise("hospital/heart")
    assert (summary.examples, summary.feature_shape, summary.partition) == (920, (10,), "natural")
    assert summary.labels == ("healthy", "ill")
    assert {c.client_id: c.labels for c in summary.clients} == {
        "cleveland": (164, 139),
        "hungary": (188, 106),
        "switzerland": (8, 115),
        "va-long-beach": (51, 149),
    }
    assert 0.03 < summary.missing < 0.05


def test_a_made_partition_and_none():
    made = summarise("vision/digits", partition="dirichlet", clients=5, partition_options={"alpha": 0.3}, seed=1)
    assert [c.client_id for c in made.clients][:2] == ["client-0000", "client-0001"]
    assert sum(c.examples for c in made.clients) == made.examples == 1797
    assert all(sum(c.labels) == c.examples for c in made.clients)
    whole = summarise("vision/digits")
    assert (whole.partition, [c.client_id for c in whole.clients]) == (NOT_SPLIT, [EVERYBODY])
    with pytest.raises(StudyError):
        summarise("vision/digits", partition="natural", clients=3)


def test_labels_that_are_no_classes(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2.5\n,3.5\n")
    summary = summarise("tabular/csv", {"label": "b", "features": ["a"], "kind": "regression"}, source=path)
    assert summary.labels == ()
    assert summary.clients[0].labels == ()
    assert summary.missing == 0.5
    picture_of_split(summary, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:8] == PNG


def test_pictures(tmp_path):
    few = picture_of_split(summarise("hospital/heart"), tmp_path / "few.png")
    assert (tmp_path / "few.png").read_bytes()[:8] == PNG
    (axes,) = few.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cleveland", "hungary", "switzerland", "va-long-beach"]
    assert sum(bar.get_width() for bar in axes.patches) == 920
    many = summarise("vision/digits", partition="shards", clients=MAX_BARS + 20)
    figure = picture_of_split(many, tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes()[:8] == PNG
    heat = figure.axes[1].get_images()[0].get_array()
    assert heat.shape == (10, MAX_BARS + 20)
    assert np.allclose(heat.sum(axis=0), 1)


def test_of_a_million_clients_some_are_looked_at(tmp_path):
    options = {"examples_per_client": 8, "alpha": 0.5}
    crowd = summarise("vision/digits", partition="bootstrap", clients=1_000_000, partition_options=options)
    assert (crowd.population, len(crowd.clients)) == (1_000_000, MAX_SHARES)
    assert [c.client_id for c in crowd.clients[:2]] == ["client-000000", "client-000100"]
    figure = picture_of_split(crowd, tmp_path / "crowd.png")
    assert (tmp_path / "crowd.png").read_bytes()[:8] == PNG
    assert "1,000,000 clients (10,000 shown)" in figure.get_suptitle()


def test_a_summary_is_plain_data():
    summary = dataclasses.asdict(summarise("hospital/heart"))
    summary["entry"]["availability"] = summary["entry"]["availability"].value
    assert json.loads(json.dumps(summary))["clients"][0]["client_id"] == "cleveland"
