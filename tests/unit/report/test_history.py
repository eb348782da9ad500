"""A run's history as a table."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from fedlearn.errors import DataError
from fedlearn.report import history as module
from fedlearn.report.history import History

ROWS = [
    {"round": 1, "clients": 2, "dropped": 0, "attempt": 1, "seconds": 0.5, "train_loss": 0.7, "update_norm": 1.0},
    {
        "round": 2,
        "clients": 1,
        "dropped": 1,
        "attempt": 2,
        "seconds": 0.5,
        "train_loss": None,
        "update_norm": 0.5,
        "metrics": {"auc": 0.75, "loss": 0.5, "round": 99.0},
        "clients_metrics": {"ada": {"auc": 0.8, "examples": 4}, "bob": {"auc": None, "examples": 1}},
    },
]


@pytest.fixture
def history():
    return History(ROWS, "auc")


def test_it_is_a_sequence_of_flat_rows(history):
    assert len(history) == 2
    assert history[-1]["auc"] == 0.75
    assert history[-1]["auc@ada"] == 0.8
    assert [row["round"] for row in history] == [1, 2], "a metric cannot take a column's place"
    assert history.clients == ("ada", "bob")


def test_columns_hold_none_where_there_is_no_value(history):
    assert history.column("auc") == [None, 0.75]
    assert history.column("train_loss") == [0.7, None]
    assert history.column("auc@bob") == [None, None]
    with pytest.raises(DataError, match="no column 'acu'; it has round, clients"):
        history.column("acu")


def test_the_final_value_is_the_last_that_there_is(history):
    assert history.final() == 0.75
    assert history.final("train_loss") == 0.7
    assert math.isnan(history.final("no such metric"))
    assert math.isnan(History([], "auc").final())


def test_of_too_many_clients_none_has_a_column(monkeypatch):
    assert "auc@ada" in History(ROWS, "auc").columns
    monkeypatch.setattr(module, "MAX_CLIENT_COLUMNS", 1)
    few = History(ROWS, "auc")
    assert few.clients == ()
    assert few.column("auc") == [None, 0.75]


def test_a_curve_goes_along_virtual_time_where_there_is_one():
    seconds = [5_400.0, 7_200.0]
    rows = [{**row, "virtual_seconds": s} for row, s in zip(ROWS, seconds, strict=True)]
    top, bottom = History(rows, "auc").plot().axes
    assert bottom.get_xlabel() == "virtual time, hours"
    assert [line.get_xdata()[-1] for line in top.lines] == [3.5, 3.5]
    assert History(ROWS, "auc").plot().axes[1].get_xlabel() == "round"
    assert History([rows[0], ROWS[1]], "auc").plot().axes[1].get_xlabel() == "round", "a run that began without one"


def test_json_csv_and_pandas_hold_the_same(history):
    assert json.loads(history.to_json()) == list(history)
    read = list(csv.DictReader(io.StringIO(history.to_csv())))
    assert [row["auc"] for row in read] == ["", "0.75"]
    assert tuple(read[0]) == history.columns
    frame = history.to_pandas()
    assert list(frame.columns) == list(history.columns)
    assert frame["auc@ada"].iloc[1] == 0.8


def test_text_and_html_show_each_round_once(history):
    lines = repr(history).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert lines[1].split()[-1] == "-"
    assert history._repr_html_().count("<tr>") == 3


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []], ids=["all", "never evaluated", "no round"])
def test_a_plot_of_whatever_there_is(rows, tmp_path):
    history = History(rows, "auc")
    history.plot(tmp_path / "curve.png", title="t")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
