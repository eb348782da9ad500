"""What the coordinator's operator sees when sites refuse, as the command line shows it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlearn import arrays
from fedlearn.privacy.ledger_file import account_states, read_records
from tests.support.federation import ENV, FEDLEARN, STUDY, Federation
from tests.support.processes import family

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(200)]

SITES = ("cleveland", "hungary", "switzerland")
PRIVATE = (
    *("privacy.unit=record", "privacy.noise_multiplier=2.0", "privacy.delta=1e-5", "privacy.steps=3"),
    *(
        "train.batch_size=32",
        "train.epochs=1",
        "evaluate.every=0",
        "rounds=12",
        "cohort.wait_for=3",
        "cohort.minimum=3",
    ),
)
BUDGET = "[budgets.record]\nepsilon = {}\ndelta = 1e-5\n"
HEX = re.compile(r"\b[0-9a-f]{32,}\b")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Federation]:
    with family(tmp_path, ENV) as processes:
        yield Federation(processes, tmp_path)


def with_policies(place: Federation, **policies: str) -> None:
    place.coordinator()
    for name, policy in policies.items():
        file = place.folder / f"{name}.toml"
        file.write_text(policy)
        place.site(name, "--policy", str(file), wait=False)
    for name in policies:
        place.running[name].wait_for("connected to", timeout_s=60)


def fedlearn(place: Federation, *words: str, limit_s: float = 100) -> subprocess.CompletedProcess[str]:
    command = [*FEDLEARN, *words, "--server", place.address, "--tls", str(place.tls["operator"])]
    return subprocess.run(command, env=dict(ENV), capture_output=True, text=True, timeout=limit_s, check=False)


def sets(*overrides: str) -> list[str]:
    return [word for one in overrides for word in ("--set", one)]


def test_a_spent_budget_ends_a_run_and_its_model_is_there(place: Federation):
    """All three are needed, and one can pay for seven rounds: seven are charged everywhere, and their model is fetched."""
    with_policies(place, cleveland=BUDGET.format(1.3), hungary=BUDGET.format(50.0), switzerland=BUDGET.format(50.0))
    ended = fedlearn(place, "run", str(STUDY), *sets(*PRIVATE))
    assert ended.returncode == 11, ended.stderr
    assert "refused: cleveland: budget: it has no room for an update after that of round 7" in ended.stdout
    run = re.search(r"error: run (\w+): 2 clients are left, needs 3; refused: cleveland: budget: ", ended.stderr)
    assert run is not None, ended.stderr
    command = f"fedlearn model get {run[1]} --out DIR"
    assert ended.stderr.rstrip().endswith(f"{command} fetches the model of round 7, the last that was committed")
    shown = fedlearn(place, "show", run[1]).stdout
    assert "7 rounds released" in shown
    assert "refused    cleveland: budget: it has no room" in shown
    assert command in shown
    fetched = fedlearn(place, "model", "get", run[1], "--out", str(place.folder / "model"))
    assert "which failed after round 7" in fetched.stdout, fetched.stderr
    weights = arrays.from_bytes((place.folder / "model" / "model.safetensors").read_bytes())
    assert sum(int(a.size) for a in weights.values()) == 401
    assert "2 clients are left" in json.loads((place.folder / "model" / "manifest.json").read_text())["failed"]
    for name in SITES:
        (state,) = account_states(read_records(place.folder / "state" / name / "ledgers" / "hospital-heart"))
        assert state.charges == 7, f"{name} pays for what was committed, and for no other attempt"
    for text in (ended.stdout, ended.stderr, shown, *(log.output for log in place.logs)):
        assert not HEX.search(text)


def test_a_run_that_nobody_joins_says_who_refuses_and_that_it_waits(place: Federation):
    with_policies(place, cleveland=BUDGET.format(0.5), hungary="tasks = ['hospital/blood-smear']\n")
    ended = fedlearn(place, "run", str(STUDY), *sets(*PRIVATE, "runtime.wait_s=3"))
    assert ended.returncode == 11
    lines = ended.stdout.splitlines()
    assert any(
        re.match(r"  refused: cleveland: budget: epsilon 0 of 0\.5 is spent on 'hospital/heart/record'", one)
        for one in lines
    )
    assert any(
        one.startswith("  refused: hungary: policy: tasks: the server asks for 'hospital/heart'") for one in lines
    )
    assert "  waiting for clients: 0 of 3 are here, 3 s are left for the others" in lines
    assert ended.stderr.rstrip().endswith("no round was committed, so there is no model")
