"""`fedlearn sweep` where nothing is left to run: what is read, shown and refused."""

from __future__ import annotations

import json

import pytest

import fedlearn
from fedlearn.cli import main
from fedlearn.simulation.grid import make_cells, parse_axis
from fedlearn.study import load_study
from tests.support.tiny_task import NAME

HEART = "hospital/heart"


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(f'name = "two"\nrounds = 1\n[task]\nname = "{NAME}"\n[data]\nfolds = 3\n')
    return path


def finished(study, out, *axes):
    """The cells of a grid, run here."""
    for cell in make_cells(load_study(study), [parse_axis(axis) for axis in axes]):
        fedlearn.simulate(cell.study, out=out / "cells" / cell.folder)
    return ["sweep", str(study), *(part for axis in axes for part in ("--grid", axis)), "--out", str(out)]


def test_finished_studies_are_a_table(study, tmp_path, capsys):
    argv = finished(study, tmp_path / "out", "lr=1e-5,0.3", "seed=0..1")
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 studies, 4 finished already; 1 at a time; in ")
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["train.lr", "runs", "rounds"],
        ["1e-05", "2", "1"],
        ["0.3", "2", "1"],
    ]
    stored = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [cell["lr"] for cell in stored["cells"]] == ["1e-5", "1e-5", "0.3", "0.3"]
    assert stored["groups"][0]["accuracy"] == pytest.approx(sum(c["score"] for c in stored["cells"][:2]) / 2)


def test_studies_with_different_metrics_have_no_table(study, tmp_path, capsys):
    argv = finished(study, tmp_path / "out", f"task={NAME},{HEART}")
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["groups"] == []
    assert [cell["status"] for cell in report["cells"]] == ["finished", "finished"]
    assert all(cell["score"] > 0 for cell in report["cells"])
    assert "note: no table: runs: their metrics are accuracy, auc" in err


@pytest.mark.parametrize(
    ("grid", "code", "says"),
    [
        (["--grid", "lrr=1"], 3, "did you mean 'lr'?"),
        (["--grid", "lr=-1"], 3, "train.lr"),
        (["--grid", "seed=0..99999"], 8, "limit MAX_CELLS"),
        ([], 2, "Missing option '--grid'"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_made(study, tmp_path, capsys, grid, code, says):
    assert main(["sweep", str(study), *grid, "--out", str(tmp_path / "out")]) == code
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
