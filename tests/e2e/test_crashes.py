"""Whatever dies, the run ends with the bytes that it would have had; whoever misbehaves costs its own update only."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest, from_bytes
from tests.support.federation import ENV, HOSPITALS, STUDY, Federation, children, secrets_in, wait_for_end
from tests.support.processes import family

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(200)]

SCAFFOLD = ("rounds=5", "strategy.name=scaffold", "cohort.minimum=4", "evaluate.every=2")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and four hospitals; what every process printed is searched for keys in the end."""
    folder = tmp_path_factory.mktemp("four")
    with family(folder, ENV) as processes:
        federation = Federation(processes, folder)
        federation.coordinator()
        for name in HOSPITALS:
            federation.site(name, wait=False)
        for name in HOSPITALS:
            federation.running[name].wait_for("connected to", timeout_s=60)
        yield federation
        secrets = list(secrets_in(folder))
        printed = "\n".join(one.output for one in federation.logs)
    assert len(secrets) > 10
    assert not [line for line in secrets if line in printed]
    traces = [one.output.partition("Traceback") for one in federation.logs]
    assert not [f"{before[-300:]}{trace}{after[:3000]}" for before, trace, after in traces if trace]
    assert processes.alive() == []


@pytest.fixture(scope="module")
def undisturbed() -> str:
    """The digest that the disturbed runs must end with."""
    return digest(fedlearn.simulate(STUDY, overrides=list(SCAFFOLD)).weights)


def of(found: list[events.Event], kind: type) -> list:
    return [event for event in found if isinstance(event, kind)]


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_of_the_coordinator_changes_no_bit(four: Federation, undisturbed: str, seed: int):
    """Killed as a seeded event is seen, in the middle of whatever it does then; twice in a run."""
    chosen = random.Random(seed).sample(range(2, 30), 2)

    def kill(number: int, _event: events.Event) -> None:
        if number in chosen:
            four.kill("coordinator")
            four.coordinator()

    run = four.submit(*SCAFFOLD)
    found = four.follow(run, kill)
    assert isinstance(found[-1], events.RunFinished)
    assert len(of(found, events.RunStarted)) > 1, "it was never killed"
    assert found[-1].model_digest == undisturbed
    assert digest(from_bytes(four.model(run))) == undisturbed


def test_kill_9_of_a_site_within_a_round_changes_no_bit(four: Federation, undisturbed: str):
    def kill(_number: int, event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round in {2, 4} and event.attempt == 1:
            four.kill("hungary")
            four.site("hungary", wait=False)

    found = four.follow(four.submit(*SCAFFOLD), kill)
    assert isinstance(found[-1], events.RunFinished)
    assert found[-1].model_digest == undisturbed


def test_a_site_that_vanishes_costs_its_round_the_deadline_and_never_the_run(four: Federation):
    """Stopped, not killed: its connection stays, and nobody answers."""
    frozen = four.running["switzerland"].process

    def freeze(_number: int, event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 2:
            os.kill(frozen.pid, signal.SIGSTOP)
        if isinstance(event, events.RoundFinished) and event.round == 2:
            os.kill(frozen.pid, signal.SIGCONT)

    found = four.follow(four.submit("rounds=4", "runtime.deadline_s=4", "evaluate.every=0"), freeze)
    assert isinstance(found[-1], events.RunFinished)
    rounds = {event.round: event for event in of(found, events.RoundFinished)}
    assert [rounds[n].clients for n in (1, 2)] == [4, 3]
    assert 4 <= rounds[2].seconds < 10
    assert rounds[4].clients == 4, "it came back"
    assert next((d.round, d.client) for d in of(found, events.ClientDropped)) == (2, "switzerland")


def test_a_worker_that_dies_is_reported_and_replaced(four: Federation):
    agent = four.running["cleveland"].process.pid

    def kill(_number: int, event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 2:
            for worker in children(agent):
                os.kill(worker, signal.SIGKILL)

    # Rounds long enough to be hit.
    slow = ("rounds=4", "train.epochs=40", "evaluate.every=0")
    found = four.follow(four.submit(*slow), kill)
    assert isinstance(found[-1], events.RunFinished)
    dropped = of(found, events.ClientDropped)
    assert [d.client for d in dropped] in ([], ["cleveland"])
    assert all("SIGKILL" in d.reason for d in dropped)
    assert of(found, events.RoundFinished)[-1].clients == 4
    assert four.running["cleveland"].process.poll() is None, "the agent survived"


@pytest.mark.parametrize(("how", "said"), [("nan", "not finite"), ("shape", "expected float32"), ("size", "headroom")])
def test_a_bad_update_is_named_and_the_round_goes_on(four: Federation, how: str, said: str):
    four.stop_site("va-long-beach")
    bad = four.bad_site("va-long-beach", how)
    try:
        found = four.follow(four.submit("rounds=2", "evaluate.every=0"))
        assert isinstance(found[-1], events.RunFinished)
        dropped = of(found, events.ClientDropped)
        assert [(d.round, d.client) for d in dropped] == [(1, "va-long-beach"), (2, "va-long-beach")]
        assert all(said in d.reason for d in dropped), dropped
        assert [r.clients for r in of(found, events.RoundFinished)] == [3, 3]
    finally:
        bad.stop()
        four.site("va-long-beach")


def test_a_site_of_another_policy_refuses_and_says_so(four: Federation):
    four.stop_site("va-long-beach")
    policy = four.folder / "policy.toml"
    policy.write_text('strategies = ["fedprox"]\n')
    four.site("va-long-beach", "--policy", str(policy))
    try:
        found = four.follow(four.submit("rounds=1", "cohort.wait_for=3", "evaluate.every=0"))
        assert isinstance(found[-1], events.RunFinished)
        assert of(found, events.RunStarted)[0].clients == HOSPITALS[:3]
        assert "admits fedprox" in four.running["va-long-beach"].output
    finally:
        four.stop_site("va-long-beach")
        four.site("va-long-beach")


def test_a_killed_agent_takes_its_worker_along(four: Federation):
    agent = four.running["hungary"].process
    workers = children(agent.pid)
    assert workers
    four.kill("hungary")
    assert wait_for_end(workers)
    four.site("hungary")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_within_a_round_ends_everything_and_loses_nothing(
    four: Federation, number: signal.Signals, status: int
):
    """Ctrl-C of a site and of the coordinator while they compute; the run then goes on."""
    run = four.submit("rounds=3", "train.epochs=10", "cohort.minimum=4", "evaluate.every=0")

    def interrupt(_number: int, event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 2 and not stopped:
            stopped.append(event)
            site = four.running["cleveland"]
            workers = children(site.process.pid)
            for one in (site, four.running["coordinator"]):
                one.process.send_signal(number)
                assert one.wait(20) == status, one.output
            assert wait_for_end(workers)
            four.coordinator()
            four.site("cleveland")

    stopped: list[events.Event] = []
    found = four.follow(run, interrupt)
    assert isinstance(found[-1], events.RunFinished)
    overrides = ["rounds=3", "train.epochs=10", "evaluate.every=0"]
    assert found[-1].model_digest == digest(fedlearn.simulate(STUDY, overrides=overrides).weights)
