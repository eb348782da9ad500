"""`fedlearn demo`: real processes, mutual TLS, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from fedlearn.errors import INTERRUPTED_EXIT_CODE
from tests.support.processes import family

ROOT = Path(__file__).resolve().parents[2]
HOSPITALS = ["cleveland", "hungary", "switzerland", "va-long-beach"]
DEMO = (sys.executable, "-m", "fedlearn.cli", "demo")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_demo_compares_and_leaves_nothing_running(tmp_path):
    with family(tmp_path, ENVIRONMENT) as processes:
        demo = processes.start(*DEMO, "--rounds", "3", "--json", "--out", "d")
        assert demo.wait(180) == 0, demo.output
        assert processes.alive() == []
    report = json.loads(demo.output)
    assert report["identical_to_simulation"] is True
    assert [row["client"] for row in report["hospitals"]] == HOSPITALS
    assert all(0 < row["federated"] <= 1 for row in report["hospitals"])
    folder = tmp_path / "d"
    for name in ("model/model.safetensors", "model/curve.png", "model/history.csv", "auc.png", "comparison.json"):
        assert (folder / name).is_file(), name
    for name in ["coordinator", *HOSPITALS]:
        log = (folder / "logs" / f"{name}.log").read_text()
        assert "Traceback" not in log
        assert "PRIVATE KEY" not in log


def test_ctrl_c_in_the_demo_stops_everybody(tmp_path):
    with family(tmp_path, ENVIRONMENT) as processes:
        demo = processes.start(*DEMO, "--rounds", "100000", "--out", "d")
        demo.wait_for(r"^\s+2\s+4\s", timeout_s=120)
        demo.process.send_signal(signal.SIGINT)
        assert demo.wait(60) == INTERRUPTED_EXIT_CODE, demo.output
        assert processes.alive() == []
    assert demo.output.splitlines()[-1] == "interrupted; the coordinator and the hospitals are stopped"


def test_a_second_demo_replaces_the_first_and_nothing_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with family(tmp_path, ENVIRONMENT) as processes:
        demo = processes.start(*DEMO, "--rounds", "1", "--out", "mine")
        assert demo.wait(60) == 12
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
