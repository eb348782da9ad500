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


def demo_report(tmp_path, *options: str):
    with family(tmp_path, ENVIRONMENT) as processes:
        demo = processes.start(*DEMO, "--rounds", "3", "--json", "--out", "d", *options)
        assert demo.wait(240) == 0, demo.output
        assert processes.alive() == []
    return json.loads(demo.output)


def test_the_demo_protects_and_shows_what_was_spent_and_seen(tmp_path):
    report = demo_report(tmp_path)
    assert report["identical_to_simulation"] is None, "its noise is secret"
    spent = {one["epsilon"] for one in report["ledgers"]}
    assert [one["hospital"] for one in report["ledgers"]] == HOSPITALS
    assert all(one["charges"] == 3 for one in report["ledgers"])
    assert all(2.9 < epsilon <= 3 for epsilon in spent), "three rounds, planned for an epsilon of 3"
    opened = report["opened"]
    assert opened["client"] in HOSPITALS
    assert all(0 <= element < 2 ** opened["ring_bits"] for element in opened["masked"])
    assert max(abs(number) for number in opened["mean"]) < 1
    assert (tmp_path / "d" / "seen.png").read_bytes().startswith(b"\x89PNG")
    for name in HOSPITALS:
        assert "Traceback" not in (tmp_path / "d" / "logs" / f"{name}.log").read_text()


def test_the_plain_demo_compares_and_leaves_nothing_running(tmp_path):
    report = demo_report(tmp_path, "--plain")
    assert report["identical_to_simulation"] is True
    assert report["opened"] is None
    assert report["ledgers"] == []
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
        demo = processes.start(*DEMO, "--plain", "--rounds", "100000", "--out", "d")
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
