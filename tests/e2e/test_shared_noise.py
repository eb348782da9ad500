"""Noise that clients add, over the link: a rehearsal ends with the simulation's bytes; in earnest the sum has the plan's noise, whoever is gone, and each
site's ledger the plan's charges."""

from __future__ import annotations

import numpy as np
import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.learning import masked
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MASKED, PRIVATE, decode_said
from fedlearn.privacy.events import Cost
from fedlearn.privacy.study import noise_plan, plan_of
from fedlearn.release.keys import TRAIN, UNMASK
from fedlearn.secagg.messages import from_bytes
from tests.support.desk_net import private_net
from tests.support.shared_noise import assert_noise, noise_std, noisy_study
from tests.support.tiny_task import CLIENTS

SURPLUS = "privacy.surplus=true"
BUDGET = "[budgets.client]\nepsilon = 200.0\ndelta = 1e-2\n"
EARNEST = ("privacy.seeded=false", "privacy.noise_multiplier=3.0")

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    with private_net(tmp_path_factory.mktemp("shares"), BUDGET) as made:
        yield made


def charges(net, run, client):
    """What a run was charged at a site, and for what."""
    name = run.of(events.RunStarted)[0].run
    return [(r.key.exchange, r.key.round, r.charge) for r in net.sites.releases(client) if r.key.run == name]


@pytest.mark.parametrize(
    "overrides",
    [(), ("strategy.name=scaffold",), (SURPLUS,), (SURPLUS, "cohort.size=3", "rounds=5")],
    ids=["fedavg", "scaffold", "surplus", "surplus below its level"],
)
def test_a_rehearsal_ends_with_the_simulations_bytes(net, overrides):
    study = noisy_study("task.options={hidden=6}", *overrides)
    run = net.run(study)
    assert not run.of(events.ClientDropped)
    for mode in ("exact", "equivalent"):
        simulated = fedlearn.simulate(study.with_overrides([f"secure_aggregation.mode={mode}"]))
        assert digest(run.model) == digest(simulated.weights)


def test_every_site_pays_the_plans_price_for_every_attempt_before_its_vector_leaves(net):
    """Bob and cyd are gone from the first attempt at round 2, which is void: ada and dee have paid for it, and pay again."""

    def meets(site, now, number, attempt):
        if now is Exchange.TRAIN and (number, attempt) == (2, 1) and site in {"bob", "cyd"}:
            raise RuntimeError("pulled the plug")

    study = noisy_study(*EARNEST, "task.options={hidden=6}")
    price = plan_of(study).cost(1)
    run = net.run(study, meets=meets)
    (void,) = run.of(events.RoundVoid)
    assert (void.round, void.attempt) == (2, 1)
    for client in CLIENTS:
        found = charges(net, run, client)
        paid = [charge for exchange, _, charge in found if exchange == TRAIN]
        assert len(paid) == (3 if client in {"bob", "cyd"} else 4)
        assert {charge.account for charge in paid} == {"tiny/client"}
        assert {Cost.from_text(charge.cost) for charge in paid} == {price}
        assert all(charge is None for exchange, _, charge in found if exchange == UNMASK)
    said = run.of(events.PrivacyStated)[-1].statement
    assert said["rounds"] == 4, "attempts"
    assert {one["epsilon"] for one in said["against"]} == {said["epsilon"]}


@pytest.mark.parametrize("more", [(), (SURPLUS,)], ids=["", "surplus"])
@pytest.mark.parametrize("gone", [None, "bob"])
def test_in_earnest_the_open_sum_has_the_plans_noise(net, gone, more, monkeypatch):
    opened = []
    real = masked.MaskedRounds.opened

    def watched(rounds, sum_, *asked):
        found = real(rounds, sum_, *asked)
        (arrays,) = found.totals().values()
        opened.append((np.concatenate([np.ravel(a) for a in arrays.values()]), found.clients))
        return found

    monkeypatch.setattr(masked.MaskedRounds, "opened", watched)

    def meets(site, now, _number, _attempt):
        if now is Exchange.TRAIN and site == gone:
            raise RuntimeError("pulled the plug")

    study = noisy_study(*EARNEST, "rounds=6", "train.lr=0.001", *more)
    net.sites.replies.clear()
    run = net.run(study, meets=meets)
    assert [clients for _, clients in opened] == [4 if gone is None else 3] * 6
    length = len(opened[0][0])
    assert_noise([total for total, _ in opened], [n * noise_std(study, length, n) for _, n in opened])
    sent = [
        reply.content for name, exchange, reply in net.sites.replies if exchange is Exchange.TRAIN and name == "ada"
    ]
    assert all(MASKED in content and not any(name.startswith(PRIVATE) for name in content) for content in sent)
    vectors = [from_bytes(decode_said("ada", content).body).vector for content in sent]
    assert {len(vector) for vector in vectors} == {noise_plan(study, length).encoding.upload_bytes}
    assert len(vectors[0]) <= 3 * (length + 1)
    assert digest(run.model) != digest(fedlearn.simulate(study).weights)
