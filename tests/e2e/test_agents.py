"""Four agents, each its own process with its gate and worker, against the real ServerApp over the real link."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import fedlearn
from fedlearn import events
from fedlearn.app import load_app
from fedlearn.arrays import digest
from tests.support.link_net import LinkNet, link_net
from tests.support.processes import Family, Logged, family
from tests.support.runs import Run, run_on_link

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "simulations" / "heart.toml"
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
FOREIGN = Path(__file__).parent / "foreign_app"

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def start_agent(processes: Family, link: LinkNet, name: str, *more: str) -> Logged:
    return processes.start(
        *(
            sys.executable,
            "-m",
            "fedlearn.cli",
            "client",
            "--server",
            link.server.address,
            "--tls",
            str(link.issue(name)),
        ),
        *("--state", f"{name}-state", "--device", "cpu", *more),
    )


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Family]:
    with family(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as members:
        yield members


def run_study(link: LinkNet, run_id: int, overrides: list[str], seen=None) -> Run:
    """Run the ServerApp in this thread; `seen` is told each event."""
    return run_on_link(link, run_id, fedlearn.load_study(STUDY, tuple(overrides)), seen)


@pytest.mark.timeout(200)
def test_agents_end_with_the_simulations_bytes(processes: Family, tmp_path: Path):
    with link_net(tmp_path) as link:
        agents = [start_agent(processes, link, name, "--task", "hospital/heart") for name in HOSPITALS]
        for agent in agents:
            agent.wait_for("connected to", timeout_s=60)
        for run_id, overrides in enumerate(
            (
                ["rounds=3"],
                ["rounds=3", "strategy.name=scaffold"],
                ["rounds=2", "strategy.name=fedadam", "cohort.size=3"],
                ["rounds=2", "strategy.name=ditto"],
            ),
            start=1,
        ):
            run = run_study(link, run_id, overrides)
            expected = fedlearn.simulate(STUDY, overrides=overrides)
            assert not run.of(events.ClientDropped)
            assert digest(run.model) == digest(expected.weights), overrides
            assert run.of(events.Evaluated)[-1].mean["auc"] == expected.history.final()


@pytest.mark.timeout(200)
def test_an_agent_killed_between_rounds_goes_on_with_its_memory(processes: Family, tmp_path: Path):
    """SCAFFOLD's control variate is in the site's journal: kill -9 and a restart change nothing."""
    overrides = ["rounds=3", "strategy.name=scaffold", "cohort.minimum=4", "evaluate.every=0"]
    with link_net(tmp_path) as link:
        agents = {name: start_agent(processes, link, name, "--task", "hospital/heart") for name in HOSPITALS}
        for agent in agents.values():
            agent.wait_for("connected to", timeout_s=60)

        def kill(event: events.Event) -> None:
            if isinstance(event, events.RoundFinished) and event.round == 1:
                agents["hungary"].process.send_signal(signal.SIGKILL)
                agents["hungary"].wait(10)
                start_agent(processes, link, "hungary", "--task", "hospital/heart")

        run = run_study(link, 1, overrides, kill)
        assert digest(run.model) == digest(fedlearn.simulate(STUDY, overrides=overrides).weights)


@pytest.mark.timeout(100)
def test_agents_run_somebody_elses_app(processes: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An unmodified Flower App with its ClientApp in agents' workers, and its state kept between messages."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    foreign, out = load_app(FOREIGN), tmp_path / "result.json"
    with link_net(tmp_path) as link:
        for name in ("ada", "bob"):
            start_agent(processes, link, name, "--app", str(FOREIGN)).wait_for("connected to", timeout_s=60)
        foreign.server_app(
            link.grid(7), Context(7, 1, {}, RecordDict(), {"num-server-rounds": 3, "lr": 0.2, "out": str(out)})
        )
    for name in [name for name in sys.modules if name.partition(".")[0] == "plain"]:
        del sys.modules[name]
    result = json.loads(out.read_text())
    assert [result["calls"][str(n)] for n in (1, 2, 3)] == [1, 2, 3]
    assert result["a"] == pytest.approx(2, abs=0.1)
