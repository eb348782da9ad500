"""`fedlearn simulate`: what is printed, and what is left behind."""

import json

import pytest

import fedlearn
from fedlearn.cli import main

STUDY = "simulations/heart.toml"


def test_rows_clients_and_a_run_folder(capsys, tmp_path):
    folder = tmp_path / "run"
    assert main(["simulate", STUDY, "--rounds", "2", "--out", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "heart: 4 clients, 2 rounds, 401 parameters"
    assert lines[1].split() == ["round", "clients", "seconds", "train", "loss", "auc"]
    assert [line.split()[:2] for line in lines[2:4]] == [["1", "4"], ["2", "4"]]
    clients = [line.split()[0] for line in lines if line.startswith("  ")][-4:]
    assert clients == ["cleveland", "hungary", "switzerland", "va-long-beach"]
    assert str(folder) in lines[-1]
    names = {"model.safetensors", "study.json", "history.json", "history.csv", "manifest.json", "curve.png"}
    names |= {"run.json", "journal"}
    assert {p.name for p in folder.iterdir()} == names


def test_json_is_one_object_and_equals_the_library(capsys, tmp_path):
    assert main(["simulate", STUDY, "--rounds", "2", "--json", "--out", str(tmp_path / "run")]) == 0
    report = json.loads(capsys.readouterr().out)
    result = fedlearn.simulate(STUDY, rounds=2)
    assert report["final"] == result.history.final()
    assert [row["auc"] for row in report["history"]] == result.history.column("auc")
    assert report["clients"]["cleveland"]["auc"] == result.history.final("auc@cleveland")
    from fedlearn import arrays

    assert report["model_digest"] == arrays.digest(result.weights)


def test_overrides_and_options_reach_the_study(capsys, tmp_path):
    argv = ["simulate", STUDY, "--rounds", "1", "--set", "strategy.name=fedprox", "--set", "strategy.options.mu=0.5"]
    assert main([*argv, "--json", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    study = json.loads((tmp_path / "run" / "study.json").read_text())
    assert (study["rounds"], study["strategy"]) == (1, {"name": "fedprox", "options": {"mu": 0.5}})


def test_a_study_that_never_evaluates_has_no_client_table(capsys, tmp_path):
    argv = ["simulate", STUDY, "--rounds", "1", "--set", "evaluate.every=0", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "cleveland" not in out
    assert "nan" not in out


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_default_folder_is_named_after_study_and_time(capsys, tmp_path, monkeypatch, rounds):
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", STUDY, "--rounds", str(rounds)]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("heart-2")
