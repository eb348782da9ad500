"""A grid over a study's keys."""

from __future__ import annotations

import pytest

from fedlearn.errors import LimitExceededError, StudyError
from fedlearn.simulation.grid import MAX_CELLS, make_cells, parse_axis, short_names
from tests.support.tiny_task import tiny_study


def test_short_names_are_unambiguous_and_documented():
    names = short_names()
    expected = {"strategy": "strategy.name", "task": "task.name", "lr": "train.lr", "seed": "seed", "rounds": "rounds"}
    assert expected.items() <= names.items()
    assert names["partition"] == "data.partition"
    assert names["epsilon"] == "privacy.epsilon", "of a table that a study may leave out"
    assert {"clients", "clip_l2", "name", "options"}.isdisjoint(names), "several keys end so"


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("strategy=fedavg,fedprox", "strategy.name", ("fedavg", "fedprox")),
        ("seed=0..3", "seed", ("0", "1", "2", "3")),
        ("seed=1,5..6,1", "seed", ("1", "5", "6")),
        ("lr = 0.1, 0.3", "train.lr", ("0.1", "0.3")),
        ("data.options={alpha=0.1, x=[1,2]},{alpha=5.0}", "data.options", ("{alpha=0.1, x=[1,2]}", "{alpha=5.0}")),
        ("strategy.options.mu=0.1", "strategy.options.mu", ("0.1",)),
        ("description='a,b',c", "description", ("'a,b'", "c")),
    ],
)
def test_an_axis_is_read(text, key, values):
    axis = parse_axis(text)
    assert (axis.key, axis.values) == (key, values)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("strategy", StudyError, "expected KEY=VALUE"),
        ("strategy=", StudyError, "expected KEY=VALUE"),
        ("strateg=a", StudyError, "did you mean 'strategy'"),
        ("clients=1", StudyError, "one of data.clients, evaluate.clients"),
        (f"seed=0..{MAX_CELLS}", LimitExceededError, "MAX_CELLS"),
        ("seed=3..1", StudyError, "expected KEY=VALUE"),
    ],
)
def test_what_is_no_axis_is_refused(text, error, says):
    with pytest.raises(error) as caught:
        parse_axis(text)
    assert says in str(caught.value)


def test_cells_are_all_combinations_in_order_and_their_folders_differ():
    axes = [parse_axis("strategy=fedavg,fedprox"), parse_axis("lr=0.1,0.2"), parse_axis("seed=0..1")]
    cells = make_cells(tiny_study(), axes)
    assert [cell.label for cell in cells[:3]] == [
        "strategy=fedavg, lr=0.1, seed=0",
        "strategy=fedavg, lr=0.1, seed=1",
        "strategy=fedavg, lr=0.2, seed=0",
    ]
    study = cells[-1].study
    assert (study.strategy.name, study.train.lr, study.seed) == ("fedprox", 0.2, 1)
    assert len({cell.folder for cell in cells}) == 8
    odd = make_cells(tiny_study(), [parse_axis("description='../x',a/x,a?x," + "y" * 300)])
    assert len({cell.folder for cell in odd}) == 4
    assert all("/" not in cell.folder and len(cell.folder) < 130 for cell in odd)


def test_bad_combinations_are_refused_before_anything_runs():
    with pytest.raises(StudyError, match="unknown key"):
        make_cells(tiny_study(), [parse_axis("train.lrr=1")])
    with pytest.raises(StudyError, match="lr"):
        make_cells(tiny_study(), [parse_axis("lr=0.1,-1")])
    with pytest.raises(StudyError, match="twice"):
        make_cells(tiny_study(), [parse_axis("lr=0.1"), parse_axis("train.lr=0.2")])
    with pytest.raises(LimitExceededError, match="limit MAX_CELLS"):
        make_cells(tiny_study(), [parse_axis("seed=0..999"), parse_axis("rounds=1..11")])
