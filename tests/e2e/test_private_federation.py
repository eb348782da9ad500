"""Private studies over the link, each site a process with its own policy, ledger and worker."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.errors import RunFailedError
from fedlearn.link import TlsBundle
from fedlearn.link.closing import closing
from fedlearn.privacy.chain import Kind
from fedlearn.privacy.ledger_file import LEDGER_FILE, account_states, charges_of, read_records, verify_ledger
from fedlearn.privacy.study import plan_of
from tests.support.heads import Heads
from tests.support.link_net import LinkNet, link_net
from tests.support.processes import Family, Logged, family
from tests.support.runs import Run, run_on_link

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "simulations" / "heart.toml"
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
RECORD = (
    "privacy.unit=record",
    "privacy.noise_multiplier=2.0",
    "privacy.delta=1e-5",
    "privacy.steps=3",
    "train.batch_size=32",
    "train.epochs=1",
)
ACCOUNT = "hospital/heart/record"

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Family]:
    with family(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as members:
        yield members


def start_agent(processes: Family, link: LinkNet, folder: Path, name: str, policy: str) -> Logged:
    file = folder / f"{name}.toml"
    file.write_text(policy)
    command = (sys.executable, "-m", "fedlearn.cli", "client", "--server", link.server.address)
    return processes.start(
        *(*command, "--tls", str(folder / "tls" / name), "--state", f"{name}-state", "--policy", str(file)),
        *("--device", "cpu", "--task", "hospital/heart"),
    )


def ready(processes: Family, link: LinkNet, folder: Path, policies: dict[str, str]) -> dict[str, Logged]:
    for name in policies:
        link.issue(name)
    agents = {name: start_agent(processes, link, folder, name, policy) for name, policy in policies.items()}
    for agent in agents.values():
        agent.wait_for("connected to", timeout_s=60)
    return agents


def run_study(
    link: LinkNet, run_id: int, overrides: list[str], heads: Heads, seen=None, stop=lambda: False, end=None
) -> Run:
    """Run the ServerApp in this thread; `seen` is told each event."""
    study, run = fedlearn.load_study(STUDY, tuple(overrides)), Run()
    with suppress(RunFailedError):  # the last event says so
        run_on_link(link, run_id, study, seen, should_stop=stop, run=run, heads=heads, closing=end)
    return run


def budget(epsilon: float, *, unit: str = "record", seeded: bool = True) -> str:
    return f"seeded = {str(seeded).lower()}\n[budgets.{unit}]\nepsilon = {epsilon}\ndelta = 1e-5\n"


def ledger(folder: Path, name: str) -> Path:
    return folder / f"{name}-state" / "ledgers" / "hospital-heart"


def test_a_private_run_ends_with_the_simulations_bytes_and_every_round_in_every_ledger(
    processes: Family, tmp_path: Path
):
    overrides = ["rounds=3", *RECORD, "privacy.seeded=true"]
    scored = [*overrides, "privacy.evaluation_noise=4.0"]
    client = ["rounds=3", "privacy.unit=client", "privacy.noise_multiplier=4.0", "privacy.delta=1e-3"]
    client += ["privacy.units=4", "privacy.clipping=adaptive", "privacy.seeded=true"]
    policy = "mixed_units = true\n" + budget(50.0) + "[budgets.client]\nepsilon = 50.0\ndelta = 1e-5\n"
    with link_net(tmp_path) as link:
        ready(processes, link, tmp_path, dict.fromkeys(HOSPITALS, policy))
        heads = Heads()
        for run_id, study in enumerate((overrides, scored, client), start=1):
            run = run_study(link, run_id, study, heads)
            expected = fedlearn.simulate(STUDY, overrides=study)
            assert not run.of(events.ClientDropped)
            assert digest(run.model) == digest(expected.weights), study
            facts = [dict(e.facts) for e in run.of(events.ClientFinished)]
            assert not any(facts)
        assert sorted(heads.kept) == sorted(HOSPITALS)
    for name in HOSPITALS:
        states = {s.account: s for s in account_states(read_records(ledger(tmp_path, name)))}
        rounds = {account: s.charges for account, s in states.items() if s.charges}
        assert rounds == {f"{ACCOUNT}/seeded": 3 + 3 + 3, "hospital/heart/client/seeded": 1}
        assert verify_ledger(ledger(tmp_path, name)).problems == ()


def charges(folder: Path, name: str) -> int:
    (state,) = account_states(read_records(ledger(folder, name)))
    return state.charges


def test_a_budget_that_runs_out_ends_the_sites_part_and_then_the_run(processes: Family, tmp_path: Path):
    """Two hospitals can pay for seven rounds, one for nine: each says which update is its last, and none is asked for one more."""
    overrides = ["rounds=12", *RECORD, "cohort.wait_for=3", "cohort.minimum=1", "evaluate.every=0"]
    overrides += ["runtime.wait_s=60"]
    sizes = {"cleveland": 1.3, "hungary": 1.3, "switzerland": 1.5}
    with link_net(tmp_path) as link:
        ready(processes, link, tmp_path, {name: budget(e, seeded=False) for name, e in sizes.items()})
        started_s = time.monotonic()
        run = run_study(link, 1, overrides, Heads())
        assert time.monotonic() - started_s < 50, "nobody is waited for who could not take part"
    done = [(e.round, e.clients, e.dropped) for e in run.of(events.RoundFinished)]
    assert done == [(number, 3 if number <= 7 else 1, 0) for number in range(1, 10)]
    refused = [(e.client, e.final, e.reason) for e in run.of(events.ClientRefused)]
    reason = "budget: it has no room for an update after that of round"
    assert refused == [
        *((name, True, f"{reason} 7") for name in ("cleveland", "hungary")),
        ("switzerland", True, f"{reason} 9"),
    ]
    assert not run.of(events.RoundVoid)
    assert isinstance(run.events[-1], events.RunFailed)
    assert "0 clients are left, needs 1" in run.events[-1].reason
    for name, epsilon in sizes.items():
        (state,) = account_states(read_records(ledger(tmp_path, name)))
        assert state.charges == sum(1 for e in run.of(events.ClientFinished) if e.client == name)
        assert state.refusals == 0
        assert state.epsilon is not None
        assert 0 < state.epsilon <= epsilon


def test_a_refusal_that_comes_in_a_round_costs_the_willing_no_other_attempt(processes: Family, tmp_path: Path):
    """An evaluation takes what an update would have needed, which nobody foresees: all three are needed, so the run ends there."""
    overrides = ["rounds=12", *RECORD, "privacy.evaluation_noise=2.0", "cohort.wait_for=3", "cohort.minimum=3"]
    overrides += ["runtime.wait_s=60", "runtime.max_attempts=5"]
    sizes = {"cleveland": 2.24, "hungary": 50.0, "switzerland": 50.0}
    with link_net(tmp_path) as link:
        ready(processes, link, tmp_path, {name: budget(e, seeded=False) for name, e in sizes.items()})
        run = run_study(link, 1, overrides, Heads())
    rounds = len(run.of(events.RoundFinished))
    assert rounds >= 1
    (dropped,) = [e for e in run.of(events.ClientDropped) if e.refused]
    assert (dropped.client, dropped.round) == ("cleveland", rounds + 1)
    assert f"of 2.24 is spent on '{ACCOUNT}', and round {rounds + 1} would make it" in dropped.reason
    (void,) = run.of(events.RoundVoid)
    assert "cleveland refuses the rest of the run" in void.reason
    failed = run.events[-1]
    assert isinstance(failed, events.RunFailed)
    assert "2 clients are left, needs 3; refused: cleveland: budget: epsilon" in failed.reason
    for name in ("hungary", "switzerland"):
        assert charges(tmp_path, name) - 2 * rounds in {0, 1}, "an update and an evaluation a round, and one attempt"


def test_an_old_copy_of_a_ledger_is_refused_by_its_own_agent(processes: Family, tmp_path: Path):
    overrides = ["rounds=2", *RECORD, "cohort.wait_for=1", "cohort.minimum=1", "runtime.wait_s=20", "evaluate.every=0"]
    policy, heads = budget(50.0, seeded=False), Heads()
    state = tmp_path / "cleveland-state"
    with link_net(tmp_path) as link:
        agent = ready(processes, link, tmp_path, {"cleveland": policy})["cleveland"]
        run_study(link, 1, overrides, heads)
        agent.stop()
        shutil.copytree(state, tmp_path / "copy")
        agent = start_agent(processes, link, tmp_path, "cleveland", policy)
        agent.wait_for("connected to", timeout_s=60)
        assert run_study(link, 2, overrides, heads).finished.model is not None
        agent.stop()
        shutil.rmtree(state)
        shutil.copytree(tmp_path / "copy", state)
        agent = start_agent(processes, link, tmp_path, "cleveland", policy)
        agent.wait_for("connected to", timeout_s=60)
        run = run_study(link, 3, [*overrides, "runtime.wait_s=2"], heads)
        assert isinstance(run.events[-1], events.RunFailed)
        agent.wait_for("an old copy was put back", timeout_s=10)
    assert "run-3" not in {r.body["key"]["run"] for r in read_records(ledger(tmp_path, "cleveland")) if "key" in r.body}


def test_a_run_that_is_stopped_gives_back_what_did_not_take_place(processes: Family, tmp_path: Path):
    """Charged whole with the first update, and closed by the coordinator's signed word after two of six rounds."""
    overrides = ["rounds=6", "privacy.unit=client", "privacy.noise_multiplier=4.0", "privacy.delta=1e-3"]
    overrides += ["privacy.units=2", "cohort.wait_for=2", "evaluate.every=0"]
    over = threading.Event()

    def seen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.round == 2:
            over.set()

    with link_net(tmp_path) as link:
        ready(processes, link, tmp_path, dict.fromkeys(HOSPITALS[:2], budget(50.0, unit="client", seeded=False)))
        bundle = TlsBundle.load(tmp_path / "coordinator")
        run = run_study(link, 1, overrides, Heads(), seen, over.is_set, lambda n: closing(bundle, "run-1", n))
        assert isinstance(run.events[-1], events.RunStopped)
    cost = plan_of(fedlearn.load_study(STUDY, tuple(overrides))).cost(2).to_text()
    for name in HOSPITALS[:2]:
        (charge,) = charges_of(read_records(ledger(tmp_path, name)), "hospital/heart/client")
        assert charge.cost == cost


def test_kill_9_of_a_site_leaves_its_ledger_at_no_less_than_what_left(processes: Family, tmp_path: Path):
    """Killed in the middle of rounds; what entered the coordinator's sum stands charged in the ledger on the disk."""
    overrides = ["rounds=6", *RECORD, "cohort.wait_for=1", "cohort.minimum=1", "evaluate.every=0"]
    overrides += ["runtime.max_attempts=20", "runtime.deadline_s=60"]
    policy, arrived = budget(500.0, seeded=False), set()
    with link_net(tmp_path) as link:
        agents = ready(processes, link, tmp_path, {"cleveland": policy})
        kills = [2, 4]

        def seen(event: events.Event) -> None:
            if isinstance(event, events.ClientFinished):
                charged = {
                    r.body["key"]["round"]
                    for r in read_records(ledger(tmp_path, "cleveland") / LEDGER_FILE)
                    if r.kind is Kind.CHARGE
                }
                arrived.add(event.round)
                assert arrived <= charged
            if isinstance(event, events.RoundStarted) and kills and event.round == kills[0]:
                kills.pop(0)
                agents["cleveland"].process.send_signal(signal.SIGKILL)
                agents["cleveland"].wait(10)
                agents["cleveland"] = start_agent(processes, link, tmp_path, "cleveland", policy)
                agents["cleveland"].wait_for("connected to", timeout_s=60)

        run = run_study(link, 1, overrides, Heads(), seen)
    assert not kills
    assert len(run.of(events.RoundFinished)) == 6
    assert arrived == set(range(1, 7))
