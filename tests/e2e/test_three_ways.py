"""The third way beside the simulation and Flower: a coordinator and four hospitals, each its own process, over mutual TLS.

What `fedlearn demo` does with FedAvg is done here with strategies that keep state on either side, several runs at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlearn
from fedlearn.arrays import digest
from fedlearn.report.folder import RunFolder
from tests.support.processes import Family, family, free_ports

ROOT = Path(__file__).resolve().parents[2]
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
FEDLEARN = (sys.executable, "-m", "fedlearn.cli")
STUDY = ROOT / "simulations" / "heart.toml"

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Family, Path, str]]:
    """A coordinator with all four hospitals connected: its processes, folder and address."""
    folder = tmp_path_factory.mktemp("federation")
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    with family(folder, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as processes:
        server = processes.start(*FEDLEARN, "server", "--listen", address, "--state", "coordinator")
        server.wait_for("listen", timeout_s=60)
        for name in HOSPITALS:
            issued = processes.start(*FEDLEARN, "certs", "issue", name, "--state", "coordinator")
            assert issued.wait(60) == 0, issued.output
            tls = folder / "coordinator" / "tls" / "clients" / name
            processes.start(
                *(*FEDLEARN, "client", "--server", address, "--tls", str(tls), "--task", "hospital/heart"),
                *("--state", f"{name}-state", "--device", "cpu"),
            )
        yield processes, folder, address


@pytest.mark.timeout(200)
def test_processes_end_with_the_simulations_bytes(federation):
    processes, folder, address = federation
    studies = {
        "scaffold": ["rounds=3", "strategy.name=scaffold"],
        "fedadam": ["rounds=3", "strategy.name=fedadam", "cohort.size=3"],
        "ditto": ["rounds=2", "strategy.name=ditto", "evaluate.every=2"],
    }
    tls = str(folder / "coordinator" / "tls" / "operator")
    commands = {
        name: processes.start(
            *(*FEDLEARN, "run", str(STUDY), "--server", address, "--tls", tls, "--out", name),
            *(word for override in overrides for word in ("--set", override)),
        )
        for name, overrides in studies.items()
    }
    for name, overrides in studies.items():
        assert commands[name].wait(150) == 0, commands[name].output
        expected = fedlearn.simulate(STUDY, overrides=overrides)
        got = RunFolder(folder / name)
        assert digest(got.weights()) == digest(expected.weights), name
        assert got.study() == expected.study
