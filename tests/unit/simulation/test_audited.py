"""Whole audits of a small study: every kind of plan, honest and with a defect planted in the code that trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlearn.app import load_app
from fedlearn.data.population import build_population
from fedlearn.errors import DataError, RunFailedError, StudyError, UnsupportedError
from fedlearn.learning.task import Examples
from fedlearn.privacy import clipping
from fedlearn.privacy.accounting import account
from fedlearn.privacy.canaries import WIDENED
from fedlearn.privacy.central import CentralPlan
from fedlearn.privacy.clipping import Contribution
from fedlearn.privacy.plan import Unit
from fedlearn.privacy.steps import NoisySteps
from fedlearn.privacy.study import plan_of
from fedlearn.simulation import shadows
from fedlearn.simulation.audit import audit
from fedlearn.simulation.audited import COMPANY, company_of
from fedlearn.simulation.prepare import Ready
from fedlearn.simulation.shadows import train_shadows
from fedlearn.simulation.workspace import Setting
from fedlearn.tasks import load_task
from tests.support.planted import plant_noise
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study

DELTA = "privacy.delta=1e-5"
RECORD = ("privacy.unit=record", "privacy.noise_multiplier=2.41", DELTA)
ANY_CLIENT = ("privacy.unit=client", DELTA, f"privacy.units={len(CLIENTS)}")
CLIENT = (*ANY_CLIENT, "privacy.noise_multiplier=6.462")
FTRL = ("privacy.mechanism=ftrl", "rounds=6")
PLANS = {  # each with the noise for epsilon = 1, but for one that asks for the budget itself
    "record": RECORD,
    "record-adaptive": (*RECORD, "privacy.clipping=adaptive"),
    "record-evaluated": ("privacy.unit=record", "privacy.epsilon=1", DELTA, "privacy.evaluation_noise=20"),
    "record-masked": (*RECORD, "secure_aggregation.enabled=true"),
    "client": CLIENT,
    "client-poisson-adaptive": (
        *ANY_CLIENT,
        "privacy.noise_multiplier=3.689",
        "cohort.rate=0.5",
        "cohort.wait_for=1",
        "privacy.clipping=adaptive",
    ),
    "client-fixed-cohort": (*ANY_CLIENT, "privacy.noise_multiplier=6.081", "cohort.size=1", "cohort.wait_for=1"),
    "client-ftrl": (*ANY_CLIENT, "privacy.noise_multiplier=3.731", *FTRL, "privacy.min_separation=1"),
    "client-ftrl-banded": (
        *ANY_CLIENT,
        "privacy.noise_multiplier=3.731",
        *FTRL,
        "privacy.min_separation=2",
        "privacy.matrix=banded",
        "cohort.size=2",
        "cohort.wait_for=2",
    ),
    "client-scaffold": (*CLIENT, "strategy.name=scaffold"),
}


def ready(*overrides: str) -> Ready:
    study = tiny_study(*overrides)
    task = load_task(study.task.name, study.task.options)
    strategy = load_app().strategy(study.strategy.name, study.strategy.options)
    return Ready(study, build_population(study, task), strategy, Setting())


def audited(*overrides: str, shadows: int = 0, **options):
    return audit(ready(*overrides), shadows=shadows, **options)


@pytest.mark.parametrize("plan", PLANS)
def test_an_honest_build_passes(plan):
    report = audited(*PLANS[plan])
    assert not report.refuted
    assert report.claim.epsilon == pytest.approx(1.0, abs=1e-3)
    assert report.finding.canaries == 1000
    assert report.finding.epsilon_lower < 1.0
    assert report.audited.evidence.releases == report.plan.releases
    assert report.audited.clients == CLIENTS
    noise = report.audited.evidence.noise()
    assert {one.name for one in noise} == {"weight", "bias", WIDENED}
    for one in noise:
        assert one.factor == pytest.approx(1.0, abs=5 * one.chance)
    assert report.power[0].refuted <= 0.05
    assert report.power[-1].refuted == 1.0


@pytest.mark.parametrize(("plan", "factor"), [("record", 0.0), ("client", 0.0), *((plan, 0.1) for plan in PLANS)])
def test_no_noise_and_a_tenth_of_it_are_caught(plan, factor, monkeypatch):
    plant_noise(monkeypatch, factor)
    report = audited(*PLANS[plan])
    assert report.finding.refuted
    assert report.finding.epsilon_lower > 1.0
    assert report.finding.p_claim < 0.05
    # The release's rounding is all that is left of it.
    assert report.audited.evidence.noise_factor() == pytest.approx(factor, abs=0.02)


def test_one_layer_without_noise_is_caught_though_few_canaries_are_in_it(monkeypatch):
    honest = NoisySteps._add_noise
    monkeypatch.setattr(NoisySteps, "_add_noise", lambda self, sums, std: honest(self, sums[1:], std))
    report = audited(*RECORD)
    assert [one.name for one in report.short_of_noise] == ["weight"]
    assert report.refuted
    assert not report.finding.refuted


def test_a_build_that_does_not_clip_is_caught(monkeypatch):
    monkeypatch.setattr(
        clipping,
        "contribute",
        lambda update, clip_l2: Contribution(replace(update, examples=1, facts={}), unclipped=True),
    )
    with pytest.raises(RunFailedError, match="longer than the plan's clip"):
        audited(*CLIENT)  # by the coordinator itself
    monkeypatch.setattr(CentralPlan, "refusal", lambda self, update, shared: None)
    report = audited(*CLIENT)
    assert report.finding.refuted


def test_a_build_that_trains_privately_in_its_first_round_only_is_caught(monkeypatch):
    honest = NoisySteps._add_noise
    rounds = []

    def add_noise(self, sums, std):
        if self not in rounds:
            rounds.append(self)
        if rounds.index(self) < len(CLIENTS):
            honest(self, sums, std)

    monkeypatch.setattr(NoisySteps, "_add_noise", add_noise)
    assert audited(*RECORD).refuted


def test_the_same_study_gives_the_same_audit_and_another_seed_another():
    first, again, other = audited(*RECORD), audited(*RECORD), audited(*RECORD, "seed=8")
    np.testing.assert_array_equal(first.scores, again.scores)
    assert (first.scores != other.scores).any()


def test_the_canaries_may_be_among_any_clients_records():
    report = audited(*RECORD, client="cyd")
    assert report.audited.among == "cyd"
    assert audited(*RECORD).audited.among == CLIENTS[0]
    with pytest.raises(DataError, match="zoe"):
        audited(*RECORD, client="zoe")
    with pytest.raises(UnsupportedError, match="canaries are clients"):
        audited(*CLIENT, client="cyd")


def test_a_few_clients_are_company_enough():
    population = ready("data.partition=iid", "data.clients=20").population
    few = company_of(population)
    assert len(few) == COMPANY
    assert list(few) == sorted(few)
    other = population.client_ids[1]
    assert other not in few
    assert other in company_of(population, other)
    assert len(company_of(population, other)) == COMPANY


def test_the_claim_may_be_tested_at_another_delta():
    report = audited(*RECORD, delta=1e-7)
    assert report.plan.delta == report.finding.delta == 1e-7
    plan = plan_of(ready(*RECORD).study)
    assert plan is not None
    assert report.claim.epsilon == account(plan.whole_cost(), 1e-7).reported.epsilon > 1.0


@pytest.mark.parametrize(
    ("overrides", "options", "says"),
    [
        ((), {}, "no privacy"),
        (RECORD, {"canaries": 9}, "9 canaries"),
        (RECORD, {"confidence": 1.0}, "confidence"),
        (RECORD, {"delta": 0.5}, "delta"),
        (RECORD, {"shadows": 2}, "--shadows"),
        ((*CLIENT, "cohort.size=2", "cohort.wait_for=2", "privacy.delta=1e-2"), {}, "delta"),
    ],
)
def test_what_cannot_be_audited_is_refused(overrides, options, says):
    with pytest.raises(StudyError, match=says):
        audited(*overrides, **options)


# Final models.


def test_models_are_trained_without_those_who_are_out(monkeypatch):
    rows = []

    class Watched(shadows._Few):
        def fit_one(self, work, client, state):
            rows.append((client, len(self._population.client(client).train)))
            return super().fit_one(work, client, state)

    monkeypatch.setattr(shadows, "_Few", Watched)
    given = ready(*RECORD, "rounds=1")
    plan = plan_of(given.study)
    assert plan is not None
    found = train_shadows(given.study, given.population, given.strategy, plan, 3, lambda event: None)
    sizes = [len(given.population.client(client).train) for client in CLIENTS]
    assert found.scores.shape == found.inside.shape == (3, sum(sizes))
    assert np.isfinite(found.scores).all()
    parts = np.split(found.inside, np.cumsum(sizes)[:-1], axis=1)
    expected = [(client, int(part[run].sum())) for run in range(3) for client, part in zip(CLIENTS, parts, strict=True)]
    assert rows == expected
    assert (found.inside[0] != found.inside[1]).any()


def test_clients_that_are_out_send_nothing(monkeypatch):
    trained = []

    class Watched(shadows._Few):
        def fit_one(self, work, client, state):
            trained.append(client)
            return super().fit_one(work, client, state)

    monkeypatch.setattr(shadows, "_Few", Watched)
    given = ready(*CLIENT, "rounds=1")
    plan = plan_of(given.study)
    assert plan is not None
    assert plan.unit is Unit.CLIENT
    found = train_shadows(given.study, given.population, given.strategy, plan, 3, lambda event: None)
    assert found.inside.shape == (3, len(CLIENTS))
    assert trained == [client for run in found.inside for client, there in zip(CLIENTS, run, strict=True) if there]


def test_a_model_that_remembers_gives_its_members_away(monkeypatch):
    # Every row is like no other and its label is a coin: a model that fits them knows them by heart.
    plant_noise(monkeypatch, 0.0)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(120, 30)).astype(np.float32), generator.integers(2, size=120)
    monkeypatch.setattr(TinyTask, "load", lambda self, source=None: Examples(x, y, np.repeat(np.array(CLIENTS), 30)))
    monkeypatch.setattr(TinyTask, "model", lambda self: torch.nn.Linear(30, 2))
    more = ("privacy.clip_l2=10", "privacy.sampling_rate=1.0", "privacy.units=20", "train.lr=1")
    report = audited(*RECORD, *more, shadows=5)
    assert report.membership is not None
    assert report.membership.noticed
    assert report.membership.auc > 0.7


def test_an_honest_model_does_not():
    told = []
    report = audited(*RECORD, shadows=4, told=lambda done, total, what: told.append((done, total, what)))
    assert report.membership is not None
    assert not report.membership.finding.refuted
    assert report.membership.units == report.membership.finding.canaries == 38
    assert told[0] == (1, 15, "canaries")
    assert told[-1] == (15, 15, "membership")
    assert report.finding.confidence == pytest.approx(0.955)  # the two tests share the error
    assert report.membership.finding.confidence == pytest.approx(0.995)


def test_a_test_that_is_not_made_says_why():
    assert "fewer than 20" in audited(*CLIENT, shadows=None).no_membership
    many = (*CLIENT, "data.partition=iid", "data.clients=20", "privacy.units=20", "rounds=1", "data.folds=1")
    assert "--shadows" in audited(*many, shadows=None).no_membership
    asked = audited(*many, shadows=3)
    assert asked.membership is not None
    assert asked.membership.units == 20
