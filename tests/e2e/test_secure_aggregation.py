"""Secure aggregation over the real link, mutual TLS on loopback: the simulation's bytes, whatever drops out or is killed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest

import fedlearn
from client.policy import MaskRules, SiteRules
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MASKED, decode_said
from fedlearn.link.grid import GridCancelledError
from fedlearn.release.journal import DictJournal
from fedlearn.release.keys import AGREE, TRAIN
from fedlearn.secagg import client as secagg_client
from fedlearn.secagg import primitives
from fedlearn.secagg.messages import from_bytes
from tests.support.desk_net import RUNS, DeskNet
from tests.support.desk_site import DeskSites
from tests.support.link_net import link_net
from tests.support.secagg_world import sparse_graphs
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

MASKS = ("secure_aggregation.enabled=true", "secure_aggregation.max_examples=20", "task.options={hidden=6}")
ORDER = [Exchange.CHECK_IN, Exchange.SHARE, Exchange.TRAIN, Exchange.UNMASK]
AGREED = "secure_aggregation.profile=malicious"
STAGES = [((), exchange) for exchange in ORDER] + [
    ((AGREED,), exchange) for exchange in (Exchange.TRAIN, Exchange.AGREE, Exchange.UNMASK)
]
"""Where something goes wrong: a study, and the exchange. What comes before the vectors is the same in both profiles."""
AFTER_VECTORS = (Exchange.AGREE, Exchange.UNMASK)
HEART = Path(__file__).resolve().parents[2] / "simulations" / "heart.toml"

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    sites = DeskSites(NAME, "hospital/heart")
    with link_net(tmp_path_factory.mktemp("link"), CLIENTS, handler_of=sites.handler) as link:
        yield DeskNet(link, sites)


def study_of(*overrides):
    return tiny_study(*MASKS, "runtime.deadline_s=20.0", *overrides)


def clients_of(run):
    return [event.clients for event in run.of(events.RoundFinished)]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("strategy.name=scaffold",),
        ("strategy.name=fedadam", "update.clip_l2=0.3"),
        ("cohort.size=3", "rounds=5", "secure_aggregation.ring_bits=24"),
        (AGREED,),
    ],
    ids=["fedavg", "scaffold", "fedadam", "three of four", "agreed"],
)
def test_the_link_ends_with_the_simulations_bytes(net, overrides):
    run = net.run(study_of(*overrides))
    assert not run.of(events.ClientDropped)
    assert digest(run.model) == digest(fedlearn.simulate(study_of(*overrides)).weights)


def test_at_most_two_exchanges_more_from_the_second_round_on(net):
    net.sites.replies.clear()
    net.sites.models.clear()
    net.run(study_of("evaluate.every=0"))
    assert sorted(net.sites.models) == sorted((name, Exchange.SHARE) for name in CLIENTS for _ in range(3))
    asked = [exchange for _, exchange, _ in net.sites.replies]
    # Who opens is asked, but a sum that enough have opened waits for nobody.
    assert [asked.count(exchange) for exchange in ORDER[:3]] == [4, 12, 12]
    assert 9 <= asked.count(Exchange.UNMASK) <= 12
    assert Exchange.AGREE not in asked


def test_survivors_are_agreed_upon_in_one_exchange_more(net):
    net.sites.replies.clear()
    net.run(study_of(AGREED, "evaluate.every=0"))
    asked = [exchange for _, exchange, _ in net.sites.replies]
    assert [asked.count(exchange) for exchange in (*ORDER[:3], Exchange.AGREE)] == [4, 12, 12, 12]
    for site in CLIENTS:
        left = [release.key.exchange for release in net.sites.releases(site) if release.key.run == f"run-{net.last}"]
        assert left.count(AGREE) == left.count(TRAIN) == 3


def test_what_a_site_sends_is_noise(net):
    """Two runs of one study: the same updates under other keys, each value of a byte as likely as any."""
    sent = []
    for _ in range(2):
        net.sites.replies.clear()
        net.run(study_of("rounds=1", "task.options={hidden=300}"))
        sent += [
            np.frombuffer(from_bytes(decode_said(name, reply.content).body).vector, dtype=np.uint8)
            for name, exchange, reply in net.sites.replies
            if exchange is Exchange.TRAIN and name == "ada"
        ]
    first, other = sent
    assert len(first) == len(other) > 5_000
    assert np.mean(first == other) < 0.02
    for each in (first, other):
        counts = np.bincount(each, minlength=256)
        chi2 = float(((counts - len(each) / 256) ** 2).sum() / (len(each) / 256))
        assert 150 < chi2 < 400, "255 degrees of freedom: outside with a chance below 1e-8"


def test_replies_hold_nothing_beside_the_masked_vector(net):
    net.sites.replies.clear()
    run = net.run(study_of(AGREED, "evaluate.every=0"))
    for _, exchange, reply in net.sites.replies:
        if exchange is not Exchange.DESCRIBE:
            assert set(reply.content) == {"fedlearn", MASKED}
            assert set(reply.content["fedlearn"]) == {"format", "entry"}
    assert {tuple(event.facts) for event in run.of(events.ClientFinished)} == {()}


@pytest.mark.parametrize(("study", "exchange"), STAGES)
@pytest.mark.parametrize("how", ["refuses", "killed"])
def test_one_of_four_is_gone_at_any_stage(net, study, exchange, how):
    """Its message is lost, or its process is killed before it answers; the sum is exact over the others, and it is back in the next round."""
    at_round = 1 if exchange is Exchange.CHECK_IN else 2
    met = threading.Event()

    def meets(site, now, number, _attempt):
        if (site, now, number) == ("bob", exchange, at_round) and not met.is_set():
            met.set()
            if how == "killed":
                net.sites.kill(site)
            raise RuntimeError("pulled the plug")

    run = net.run(study_of(*study), meets=meets)
    assert met.is_set()
    finished = clients_of(run)
    assert finished[at_round - 1] == (4 if exchange in AFTER_VECTORS else 3)
    assert [n for i, n in enumerate(finished, start=1) if i != at_round] == [4, 4]
    assert not run.of(events.RoundVoid)
    expected = fedlearn.simulate(study_of())
    if exchange in AFTER_VECTORS:
        assert digest(run.model) == digest(expected.weights)


@pytest.mark.parametrize(("study", "exchange"), STAGES)
def test_a_site_that_is_killed_and_answers_is_a_dropout_or_exact(net, study, exchange):
    """kill -9 and a restart just before the message: what it held is gone, what it committed is sent again."""
    at_round = 1 if exchange is Exchange.CHECK_IN else 2

    def meets(site, now, number, attempt):
        if (site, now, number, attempt) == ("dee", exchange, at_round, 1):
            net.sites.kill(site)

    run = net.run(study_of(*study), meets=meets)
    # Before the first check-in there is nothing to lose; before the opening the vector is in the sum already.
    expected = 4 if exchange in {Exchange.CHECK_IN, *AFTER_VECTORS} else 3
    assert clients_of(run)[at_round - 1] == expected
    assert not run.of(events.RoundVoid)


def test_below_the_threshold_nothing_is_opened_and_the_next_attempt_has_fresh_keys(net):
    vectors, opened = [], []

    def meets(site, now, number, attempt):
        if now is Exchange.UNMASK:
            opened.append((number, attempt))
        if now is Exchange.TRAIN and (number, attempt) == (2, 1) and site in {"bob", "cyd"}:
            raise RuntimeError("pulled the plug")

    net.sites.replies.clear()
    run = net.run(study_of(), meets=meets)
    (void,) = run.of(events.RoundVoid)
    assert (void.round, void.attempt) == (2, 1)
    assert (2, 1) not in opened
    assert (2, 2) in opened
    vectors = [
        decode_said(name, reply.content).body
        for name, exchange, reply in net.sites.replies
        if exchange is Exchange.TRAIN and name == "ada"
    ]
    assert len(set(vectors)) == 4
    assert digest(run.model) == digest(fedlearn.simulate(study_of()).weights)


def test_a_site_that_allows_no_void_sends_one_vector_of_a_round(tmp_path):
    """Two openings of one round over sets that differ by one client would give that client's update away."""

    def meets(site, now, number, attempt):
        if now is Exchange.TRAIN and (number, attempt) == (2, 1) and site in {"bob", "cyd"}:
            raise RuntimeError("pulled the plug")

    sites = DeskSites(rules=SiteRules(tasks=(NAME,), max_voids_per_run=0))
    with link_net(tmp_path, CLIENTS, handler_of=sites.handler) as link, pytest.raises(RunFailedError):
        DeskNet(link, sites).run(study_of(), meets=meets)
    for name in ("ada", "dee"):
        sent = [release.key.at for release in sites.releases(name) if release.key.exchange == TRAIN]
        assert sent == [(1, 1), (2, 1)]


def opened_by_too_few(site, now, number, attempt):
    """Two of four open the second round's first sum, which needs three; then the other two are gone."""
    if now is Exchange.UNMASK and (number, attempt) == (2, 1) and site in {"bob", "cyd"}:
        raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("more", [(), (AGREED,)], ids=["told", "agreed"])
def test_who_has_opened_a_sum_gives_no_other_update_of_its_round(net, more):
    """Two sums of one round over sets that differ by one client would give that client's update away. Nobody can know that the first is not open."""
    with pytest.raises(RunFailedError, match="void 3 times"):
        net.run(study_of(*more), meets=opened_by_too_few)
    for name in CLIENTS:
        sent = [
            r.key.at for r in net.sites.releases(name) if r.key.run == f"run-{net.last}" and r.key.exchange == TRAIN
        ]
        assert sent == [(1, 1), (2, 1)]
    reasons = {event.reason for event in net.runs[-1].of(events.ClientDropped) if event.client in {"ada", "dee"}}
    assert all("helped to open the sum of round 2 attempt 1" in reason for reason in reasons)


def test_a_site_may_allow_a_round_to_be_opened_again(tmp_path):
    sites = DeskSites(rules=SiteRules(tasks=(NAME,), secure_aggregation=MaskRules(reopen=True)))
    with link_net(tmp_path, CLIENTS, handler_of=sites.handler) as link:
        run = DeskNet(link, sites).run(study_of(), meets=opened_by_too_few)
    assert [(void.round, void.attempt) for void in run.of(events.RoundVoid)] == [(2, 1)]
    assert digest(run.model) == digest(fedlearn.simulate(study_of()).weights)


def test_a_graph_that_is_not_complete(tmp_path):
    """The code above 200 clients, at a size that a test can afford: nonces before shares, agreements before openings, a client lost at each."""
    study = study_of(
        *("data.partition=iid", "data.clients=12", "data.folds=1", "cohort.wait_for=12"),
        *("secure_aggregation.adversarial=0", "secure_aggregation.mode=exact"),
    )
    names = tuple(f"client-{number:04d}" for number in range(12))
    lost = {1: Exchange.REVEAL, 2: Exchange.AGREE}

    def meets(site, now, number, _attempt):
        if site == names[3] and lost.get(number) is now:
            sites.kill(site)
            raise RuntimeError("pulled the plug")

    sites = DeskSites(NAME)
    with sparse_graphs(above=10), link_net(tmp_path, names, handler_of=sites.handler) as link:
        run = DeskNet(link, sites).run(study, meets=meets)
    assert clients_of(run) == [11, 12, 12]
    asked = [exchange for _, exchange, _ in sites.replies]
    assert (asked.count(Exchange.REVEAL), asked.count(Exchange.AGREE)) == (35, 34)


def test_a_run_ends_when_every_attempt_is_void(net):
    def meets(site, now, _number, _attempt):
        if now is Exchange.SHARE and site in {"ada", "bob"}:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RunFailedError, match="void 3 times"):
        net.run(study_of(), meets=meets)


@pytest.mark.parametrize(("study", "exchange"), STAGES)
@pytest.mark.parametrize("after", [0, 2])
def test_a_coordinator_that_is_killed_resumes_to_the_same_bits(net, study, exchange, after):
    journal, number = DictJournal(), next(RUNS)
    met: list[str] = []

    def meets(site, now, at_round, _attempt):
        if now is exchange and at_round == (1 if exchange is Exchange.CHECK_IN else 2):
            met.append(site)
            if len(met) == after + 1:
                net.cancel()

    with pytest.raises(GridCancelledError):
        net.run(study_of(*study), meets=meets, journal=journal, number=number)
    run = net.run(study_of(*study), journal=journal, number=number)
    assert not run.of(events.RoundVoid), run.of(events.ClientDropped)
    assert digest(run.model) == digest(fedlearn.simulate(study_of()).weights)


def test_a_coordinator_and_a_site_that_are_killed_together_end_void_or_exact(net):
    """The site had committed its vector: the coordinator gets it again, and opens the sum with the three others."""
    journal, number = DictJournal(), next(RUNS)

    def meets(_site, now, at_round, _attempt):
        if now is Exchange.UNMASK and at_round == 2:
            net.cancel()

    with pytest.raises(GridCancelledError):
        net.run(study_of(), meets=meets, journal=journal, number=number)
    net.sites.kill("cyd")
    run = net.run(study_of(), journal=journal, number=number)
    assert digest(run.model) == digest(fedlearn.simulate(study_of()).weights)


def test_no_key_share_or_seed_is_in_a_log(net, caplog, monkeypatch):
    secrets: list[bytes] = []

    def remember(name, module, pick):
        real = getattr(module, name)

        def watched(*args, **kwargs):
            found = real(*args, **kwargs)
            secrets.extend(pick(args, found))
            return found

        monkeypatch.setattr(module, name, watched)

    remember("new_key", secagg_client, lambda _args, found: [found.secret])
    remember("split", secagg_client, lambda args, found: [args[0], *found])
    remember("derive", primitives, lambda _args, found: [found])
    caplog.set_level(logging.DEBUG)

    def meets(site, now, number, _attempt):
        if (site, now, number) == ("bob", Exchange.TRAIN, 2):
            raise RuntimeError("pulled the plug")

    run = net.run(study_of(), meets=meets)
    assert len(secrets) > 100
    logged = caplog.text + repr(run.events)
    for secret in secrets:
        assert secret.hex() not in logged
        assert repr(secret)[2:-1] not in logged
        assert str(int.from_bytes(secret, "big")) not in logged


@pytest.mark.slow
def test_four_hospitals(net, tmp_path):
    study = fedlearn.load_study(HEART, ("rounds=3", "secure_aggregation.enabled=true"))
    names = ("cleveland", "hungary", "switzerland", "va-long-beach")
    sites = DeskSites("hospital/heart")
    with link_net(tmp_path, names, handler_of=sites.handler) as link:
        run = DeskNet(link, sites).run(study)
    assert digest(run.model) == digest(fedlearn.simulate(study).weights)
