"""Listings: tasks, strategies, and what a task's data looks like."""

import importlib
import json

import pytest

from fedlearn.cli import main
from fedlearn.tasks import task_names


def test_every_task_is_listed(capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in task_names())
    assert main(["data", "list", "--json"]) == 0
    assert [entry["task"] for entry in json.loads(capsys.readouterr().out)] == list(task_names())


def test_a_task_shows_its_clients_and_draws_them(capsys, tmp_path):
    plot = tmp_path / "split.png"
    assert main(["data", "show", "hospital/heart", "--study", "simulations/heart.toml", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "CC BY 4.0" in out
    assert ["cleveland", "303", "164", "139"] in [line.split() for line in out.splitlines()]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_refused(capsys, tmp_path):
    assert main(["data", "show", "hospital/heart", "--plot", str(tmp_path / "no" / "x.png")]) == 12
    assert "cannot be written" in capsys.readouterr().err


def test_a_site_counts_its_own_file(capsys, tmp_path):
    own = tmp_path / "own.csv"
    own.write_text(
        "age,sex,cp,trestbps,chol,fbs,restecg,thalch,exang,oldpeak,num\n"
        "63,Male,typical angina,145,233,TRUE,normal,150,FALSE,2.3,0\n"
    )
    assert main(["data", "show", "hospital/heart", "--data", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["examples"] == 1


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_every_strategy_is_listed(capsys, flag):
    assert main(["strategies", *flag]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in importlib.import_module("strategies").names())
