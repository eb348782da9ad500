"""A simulation that is killed, stopped or out of disk goes on to the bytes that it would have ended with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fedlearn
from fedlearn.arrays import digest
from fedlearn.report.folder import RunFolder
from tests.support.killed_runs import study_of
from tests.support.processes import family

pytestmark = pytest.mark.e2e
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


def test_killed_or_out_of_disk_at_any_moment_a_run_ends_with_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "tests.support.killed_runs", str(tmp_path), "7", "fedavg", "scaffold", "ditto"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["strategy"] for run in runs] == ["fedavg", "scaffold", "ditto"]
    for run in runs:
        assert run["kills"] > 2
        assert run["killed"] == run["alone"]
        assert run["full"] == run["alone"]
        assert set(run["codes"][:-1]) == {12}, "a full disk is an error of its own, again and again"
    assert "cannot write" in done.stderr


def test_ctrl_c_finishes_the_round_and_resume_goes_on(tmp_path):
    study = study_of("ditto").with_overrides(["rounds=100", "evaluate.every=0"])
    (tmp_path / "study.toml").write_text(_toml(json.loads(study.to_json())))
    run = [sys.executable, "-m", "fedlearn.cli", "simulate"]
    with family(Path.cwd(), ENV) as processes:
        stopped = processes.start(*run, str(tmp_path / "study.toml"), "--out", str(tmp_path / "stopped"))
        stopped.wait_for(r"^\s+3 ", timeout_s=120)
        stopped.process.send_signal(signal.SIGINT)
        assert stopped.wait(60) == 130
        assert "finishing this round; Ctrl-C again stops at once" in stopped.output
        assert f"fedlearn simulate --resume {tmp_path / 'stopped'} goes on" in stopped.output
        rows = json.loads((tmp_path / "stopped" / "history.json").read_text())
        assert 3 <= len(rows) < 100
        assert json.loads((tmp_path / "stopped" / "manifest.json").read_text())["stopped"]
        again = processes.start(*run, "--resume", str(tmp_path / "stopped"))
        assert again.wait(120) == 0, again.output
    assert digest(RunFolder(tmp_path / "stopped").weights()) == digest(fedlearn.simulate(study).weights)
    assert len(json.loads((tmp_path / "stopped" / "history.json").read_text())) == 100


def test_a_second_ctrl_c_stops_within_the_round(tmp_path):
    (tmp_path / "study.toml").write_text(_toml(json.loads(study_of("fedavg").to_json())))
    run = [
        sys.executable,
        "-m",
        "fedlearn.cli",
        "simulate",
        str(tmp_path / "study.toml"),
        "--out",
        str(tmp_path / "run"),
    ]
    with family(Path.cwd(), ENV) as processes:
        endless = processes.start(*run, "--set", "train.epochs=100000000")
        endless.wait_for("round  clients", timeout_s=120)
        endless.process.send_signal(signal.SIGINT)
        endless.wait_for("Ctrl-C again stops at once")
        endless.process.send_signal(signal.SIGINT)
        assert endless.wait(60) == 130
        assert "interrupted before a round was committed" in endless.output
    assert not (tmp_path / "run").exists()


def _toml(tree: dict, prefix: str = "") -> str:
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict) and value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    if prefix:
        lines.insert(0, f"[{prefix}]")
    for key, value in tree.items():
        if isinstance(value, dict):
            lines.append(_toml(value, f"{prefix}.{key}" if prefix else key))
    return "\n".join(lines)
