"""Record-level privacy and secure aggregation together over the link: each site charges its ledger, and its noisy update leaves under masks alone."""

from __future__ import annotations

import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MASKED
from fedlearn.privacy.study import plan_of
from fedlearn.release.charge import Charge
from fedlearn.release.keys import TRAIN, UNMASK
from tests.support.desk_net import private_net
from tests.support.tiny_task import CLIENTS, tiny_study

BUDGET = "[budgets.record]\nepsilon = 200.0\ndelta = 1e-4\n"
PRIVATE = '{unit="record", noise_multiplier=1.0, delta=0.001, clip_l2=0.3, steps=2, seeded=SEEDED}'

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with private_net(tmp_path_factory.mktemp("private"), BUDGET) as made:
        yield made


def study_of(*, seeded, more=()):
    private = PRIVATE.replace("SEEDED", str(seeded).lower())
    return tiny_study(
        f"privacy={private}",
        "secure_aggregation.enabled=true",
        "secure_aggregation.max_clients=4",
        "evaluate.every=0",
        "runtime.deadline_s=20.0",
        *more,
    )


def test_a_rehearsal_ends_with_the_simulations_bytes(net):
    run = net.run(study_of(seeded=True))
    assert not run.of(events.ClientDropped)
    assert digest(run.model) == digest(fedlearn.simulate(study_of(seeded=True)).weights)


def test_in_earnest_every_masked_update_is_charged_and_nothing_else_is(net):
    net.sites.replies.clear()
    run = net.run(study_of(seeded=False))
    assert not run.of(events.ClientDropped)
    assert [event.clients for event in run.of(events.RoundFinished)] == [4, 4, 4]
    sent = [set(reply.content) for _, exchange, reply in net.sites.replies if exchange is Exchange.TRAIN]
    assert all(MASKED in names and not any(name.startswith("private.") for name in names) for names in sent)
    for name in CLIENTS:
        releases = [r for r in net.sites.releases(name) if r.key.run == run.of(events.RunStarted)[0].run]
        charged = {r.key.exchange for r in releases if r.charge is not None}
        assert charged == {TRAIN}
        assert sum(r.key.exchange == TRAIN for r in releases) == 3
        assert {r.charge.account for r in releases if r.charge is not None} == {"tiny/record"}
        assert all(r.charge is None for r in releases if r.key.exchange == UNMASK)


def test_a_refusal_for_good_charges_nobody_for_the_round(net):
    """Another run takes what bob had left. He refuses before he shares keys: nobody is asked for an update, and there is no other attempt."""
    study = study_of(seeded=False, more=("cohort.minimum=4", "runtime.max_attempts=5"))
    asked = []

    def meets(name, exchange, round_, attempt):
        asked.append((round_, attempt, exchange))
        if (name, exchange, round_) == ("bob", Exchange.SHARE, 2):
            for rounds in (20, 1):
                net.sites.spend("bob", Charge("tiny/record", plan_of(study).cost(rounds).to_text()))

    with pytest.raises(RunFailedError, match="3 clients are left, needs 4; refused: bob: budget: epsilon"):
        net.run(study, meets=meets)
    run = net.runs[-1]
    (dropped,) = run.of(events.ClientDropped)
    assert (dropped.client, dropped.round, dropped.refused) == ("bob", 2, True)
    assert [(void.round, void.attempt) for void in run.of(events.RoundVoid)] == [(2, 1)]
    assert not [one for one in asked if one[0] == 2 and one[2] is Exchange.TRAIN]
    for name in CLIENTS:
        mine = [r for r in net.sites.releases(name) if r.key.run == run.of(events.RunStarted)[0].run]
        assert [r.key.round for r in mine if r.charge is not None] == [1], (
            f"{name} pays for the round that was committed"
        )
