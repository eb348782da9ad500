"""kill -9 of coordinator and hospitals in masked rounds, each its own process: the run ends with the bytes that it would have had, or a sum over who was left."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest, from_bytes
from tests.support.federation import ENV, HOSPITALS, STUDY, Federation, secrets_in
from tests.support.processes import family

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(200)]

MASKED = ("rounds=5", "secure_aggregation.enabled=true", "secure_aggregation.max_clients=4", "evaluate.every=0")
EVERYBODY = (*MASKED, "cohort.minimum=4", "runtime.max_attempts=20")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and four hospitals; what every process printed is searched for keys in the end."""
    folder = tmp_path_factory.mktemp("four")
    policy = folder / "policy.toml"
    policy.write_text("max_voids_per_run = 20\nsecure_aggregation = true\n")
    with family(folder, ENV) as processes:
        federation = Federation(processes, folder)
        federation.coordinator()
        for name in HOSPITALS:
            federation.site(name, "--policy", str(policy), wait=False)
        for name in HOSPITALS:
            federation.running[name].wait_for("connected to", timeout_s=60)
        yield federation
        secrets = list(secrets_in(folder))
        printed = "\n".join(one.output for one in federation.logs)
    assert not [line for line in secrets if line in printed]
    assert "Traceback" not in printed


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """The digest that a run with everybody in every round ends with."""
    return digest(fedlearn.simulate(STUDY, overrides=list(EVERYBODY)).weights)


def of(found: list[events.Event], kind: type) -> list:
    return [event for event in found if isinstance(event, kind)]


@pytest.mark.parametrize(("seed", "profile"), [(1, "semi-malicious"), (2, "semi-malicious"), (3, "malicious")])
def test_kill_9_of_the_coordinator_changes_no_bit(four: Federation, undisturbed: str, seed: int, profile: str):
    chosen = random.Random(seed).sample(range(2, 25), 2)

    def kill(number: int, _event: events.Event) -> None:
        if number in chosen:
            four.kill("coordinator")
            four.coordinator()

    found = four.follow(run := four.submit(*EVERYBODY, f"secure_aggregation.profile={profile}"), kill)
    assert isinstance(found[-1], events.RunFinished), found[-3:]
    assert len(of(found, events.RunStarted)) > 1, "it was never killed"
    assert digest(from_bytes(four.model(run))) == undisturbed


def test_kill_9_of_a_hospital_voids_rounds_or_changes_no_bit(four: Federation, undisturbed: str):
    """Everybody is asked for, so a round without it is void and tried again with fresh keys, until it is back."""
    chosen = random.Random(3).sample(range(2, 22), 2)

    def kill(number: int, _event: events.Event) -> None:
        if number in chosen:
            four.kill("hungary")
            four.site("hungary", "--policy", str(four.folder / "policy.toml"))

    found = four.follow(run := four.submit(*EVERYBODY), kill)
    assert isinstance(found[-1], events.RunFinished), found[-3:]
    assert digest(from_bytes(four.model(run))) == undisturbed


def test_three_of_four_go_on_while_one_is_away(four: Federation):
    def kill(number: int, _event: events.Event) -> None:
        if number == 8:
            four.kill("switzerland")

    found = four.follow(four.submit(*MASKED, "runtime.deadline_s=4"), kill)
    assert isinstance(found[-1], events.RunFinished), found[-3:]
    clients = [event.clients for event in of(found, events.RoundFinished)]
    assert clients[0] == 4
    assert clients[-1] == 3
