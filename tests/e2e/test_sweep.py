"""A sweep with real worker processes: parallel, resumed, and none the worse for a study that fails or a worker that dies."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

import fedlearn
from fedlearn.arrays import digest
from fedlearn.cli import main
from fedlearn.report.folder import RunFolder
from tests.support import fatal_task
from tests.support.processes import family
from tests.support.tiny_task import NAME

pytestmark = pytest.mark.e2e
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


@pytest.fixture
def study(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, ENV[name])
    path = tmp_path / "tiny.toml"
    path.write_text(f'name = "tiny"\nrounds = 3\n[task]\nname = "{NAME}"\n[train]\nlr = 0.3\n[data]\nfolds = 3\n')
    return str(path)


def report_of(capsys, *argv):
    code = main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_cells_run_fail_and_are_skipped_when_they_are_done(study, tmp_path, capsys):
    out = tmp_path / "sweep"
    # krum needs more clients than there are: these two fail
    argv = [
        "sweep",
        study,
        "--grid",
        "strategy=fedavg,krum",
        "--grid",
        "seed=0..1",
        "--out",
        str(out),
        "--workers",
        "1",
    ]
    code, report = report_of(capsys, *argv)
    assert code == 11
    assert [(c["strategy"], c["seed"], c["status"]) for c in report["cells"]] == [
        ("fedavg", "0", "finished"),
        ("fedavg", "1", "finished"),
        ("krum", "0", "failed"),
        ("krum", "1", "failed"),
    ]
    assert "clients" in report["cells"][2]["reason"]
    assert len(report["groups"]) == 1
    assert report["groups"][0]["runs"] == 2
    assert (out / "comparison.png").is_file()
    alone = fedlearn.simulate(study, overrides=["seed=1"])
    assert report["cells"][1]["score"] == alone.history.final()
    assert digest(RunFolder(Path(report["cells"][1]["folder"])).weights()) == digest(alone.weights)
    before = (Path(report["cells"][0]["folder"]) / "model.safetensors").stat().st_mtime_ns
    more = ["sweep", study, "--grid", "strategy=fedavg", "--grid", "seed=0..2", "--out", str(out)]
    code, report = report_of(capsys, *more)
    assert code == 0
    assert [c["status"] for c in report["cells"]] == ["finished"] * 3
    assert (Path(report["cells"][0]["folder"]) / "model.safetensors").stat().st_mtime_ns == before
    assert main(more) == 0
    shown = capsys.readouterr().out
    assert "3 studies, 3 finished already" in shown
    assert shown.splitlines()[2].startswith("runs  rounds  accuracy mean  deviation")
    assert main(["compare", str(out), "--plot", str(tmp_path / "x.png"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["groups"]) == 1
    assert main([*more, "--data", study]) == 11
    assert "its run folder is of another run: data None" in capsys.readouterr().err


def test_a_worker_that_dies_costs_its_study_alone(study, tmp_path, capsys):
    grid = f"task={NAME},{fatal_task.NAME}"
    code, report = report_of(capsys, "sweep", study, "--grid", grid, "--out", str(tmp_path / "x"), "--workers", "1")
    assert code == 11
    assert [cell["status"] for cell in report["cells"]] == ["finished", "failed"]
    assert report["cells"][1]["reason"] == "its process died (exit status 3)"


def test_ctrl_c_finishes_the_rounds_and_the_same_command_goes_on(study, tmp_path):
    out = tmp_path / "x"
    command = [sys.executable, "-m", "fedlearn.cli", "sweep", study, "--grid", "seed=0..2", "--out", str(out)]
    command += ["--rounds", "60", "--set", "evaluate.every=0", "--workers", "1"]
    with family(Path.cwd(), ENV) as processes:
        first = processes.start(*command)
        first.wait_for(r"^\[1/3\]", timeout_s=120)
        os.killpg(first.process.pid, signal.SIGINT)
        assert first.wait(120) == 130, first.output
        assert "finishing the rounds under way" in first.output
        assert "stopped; the same command goes on with" in first.output
        second = processes.start(*command)
        assert second.wait(200) == 0, second.output
    for seed in (0, 1, 2):
        alone = fedlearn.simulate(study, rounds=60, overrides=[f"seed={seed}", "evaluate.every=0"])
        assert digest(RunFolder(tmp_path / "x" / "cells" / f"seed={seed}").weights()) == digest(alone.weights)
