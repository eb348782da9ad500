"""A private run whose coordinator and sites are killed at random: no ledger falls below what left, and nothing is forgotten."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlearn import events
from fedlearn.privacy.budget import Budget, spent_epsilon
from fedlearn.privacy.chain import Kind
from fedlearn.privacy.events import Cost
from fedlearn.privacy.ledger_file import charges_of, read_records, verify_ledger
from fedlearn.privacy.study import plan_of
from fedlearn.study import load_study
from tests.support.federation import ENV, HOSPITALS, STUDY, Federation
from tests.support.processes import family

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

TWO = HOSPITALS[:2]
PRIVATE = (
    "rounds=10",
    "privacy.unit=record",
    "privacy.noise_multiplier=2.0",
    "privacy.delta=1e-5",
    "privacy.steps=3",
    "train.batch_size=32",
    "train.epochs=1",
    "cohort.wait_for=2",
    "cohort.minimum=1",
    "evaluate.every=0",
    "runtime.max_attempts=20",
)
ACCOUNT = "hospital/heart/record"
POLICY = "max_voids_per_run = 50\n[budgets.record]\nepsilon = 500.0\ndelta = 1e-5\n"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Federation]:
    with family(tmp_path, ENV) as processes:
        federation = Federation(processes, tmp_path)
        federation.coordinator()
        (tmp_path / "policy.toml").write_text(POLICY)
        for name in TWO:
            start(federation, name)
        yield federation


def start(federation: Federation, name: str) -> None:
    federation.site(name, "--policy", str(federation.folder / "policy.toml"))


def ledger(federation: Federation, name: str) -> Path:
    return federation.folder / "state" / name / "ledgers" / "hospital-heart"


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_of_anybody_leaves_no_ledger_below_what_left(two: Federation, seed: int):
    chance = random.Random(seed)
    doomed = {number: chance.choice(("coordinator", *TWO)) for number in chance.sample(range(3, 30), 4)}
    arrived: defaultdict[str, set[int]] = defaultdict(set)

    def disturb(number: int, event: events.Event) -> None:
        if isinstance(event, events.ClientFinished):
            arrived[event.client].add(event.round)
        if (name := doomed.pop(number, None)) is not None:
            two.kill(name)
            if name == "coordinator":
                two.coordinator()
            else:
                start(two, name)

    run = two.submit(*PRIVATE)
    found = two.follow(run, disturb)
    assert isinstance(found[-1], events.RunFinished)
    one_round, budget = plan_of(load_study(STUDY, PRIVATE)).cost(1), Budget(500.0, 1e-5)
    for name in TWO:
        records = read_records(ledger(two, name))
        charged = {r.body["key"]["round"] for r in records if r.kind is Kind.CHARGE}
        assert arrived[name] <= charged
        costs = [Cost.from_text(charge.cost) for charge in charges_of(records, ACCOUNT)]
        assert spent_epsilon(costs, budget) >= spent_epsilon([one_round] * len(arrived[name]), budget)
        assert verify_ledger(ledger(two, name)).problems == ()


def test_what_a_coordinator_remembers_outlives_it(two: Federation):
    """A site whose state folder was deleted begins a new ledger; a coordinator that was killed meanwhile still shows it what it had signed."""
    assert isinstance(two.follow(two.submit(*PRIVATE, "rounds=2"))[-1], events.RunFinished)
    two.kill("coordinator")
    two.kill("hungary")
    shutil.rmtree(two.folder / "state" / "hungary")
    two.coordinator()
    start(two, "hungary")
    found = two.follow(two.submit(*PRIVATE, "rounds=1", "runtime.wait_s=5"))
    assert isinstance(found[-1], events.RunFailed)
    two.running["hungary"].wait_for("an old copy was put back", timeout_s=10)
    assert charges_of(read_records(ledger(two, "hungary")), ACCOUNT) == []
