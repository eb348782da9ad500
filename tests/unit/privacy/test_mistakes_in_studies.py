"""The mistakes of test_mistakes.py cannot be made through a study either: each is tried on a whole run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from torch import nn

from fedlearn import events
from fedlearn.app import load_app
from fedlearn.data.population import build_population
from fedlearn.errors import FedlearnError, RunFailedError, StudyError
from fedlearn.learning.backend import Failed, Fitted, Work
from fedlearn.learning.federation import Federation, Outcome
from fedlearn.learning.local import initial_weights
from fedlearn.learning.update import DELTA, UNCLIPPED, Update
from fedlearn.privacy.accounting import account, rdp_epsilon
from fedlearn.privacy.claims import REAL_NUMBERS
from fedlearn.privacy.clipping import COUNT
from fedlearn.privacy.plan import Everyone, FixedCohort, PoissonSampling
from fedlearn.privacy.statement import planned
from fedlearn.privacy.study import CLIP, plan_of
from fedlearn.release.journal import DictJournal
from fedlearn.simulation.run import simulate, simulate_population
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.study import Study
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study

RECORD = ("privacy.unit=record", "privacy.noise_multiplier=1.5", "privacy.delta=1e-3", "privacy.steps=4")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=0.5", "privacy.delta=1e-3", "privacy.units=4")
WIDE = "task.options.hidden=4000"
SIZE = 24_002


class Backend(SequentialBackend):
    """Clients whose replies can be changed on their way."""

    def __init__(self, study: Study, change=lambda _, reply: reply) -> None:
        task = TinyTask(**study.task.options)
        strategy = load_app().strategy(study.strategy.name, study.strategy.options)
        super().__init__(study, build_population(study, task), strategy)
        self.works: list[Work] = []
        self.scored: list[str] = []
        self._change = change

    def fit(self, work):
        self.works.append(work)
        for reply in super().fit(work):
            yield self._change(work, reply)

    def evaluate(self, work):
        self.scored += work.cohort
        yield from super().evaluate(work)


def run(study: Study, change=lambda _, reply: reply, seen=None, *, rehearsal: bool = True) -> tuple[Outcome, Backend]:
    backend = Backend(study, change)
    outcome = Federation(
        study,
        "run",
        load_app().strategy(study.strategy.name, study.strategy.options),
        initial_weights(TinyTask(**study.task.options), study),
        backend,
        DictJournal(),
        metric="accuracy",
        emit=(seen if seen is not None else []).append,
        rehearsal=rehearsal,
        may_join=False,
    ).run()
    return outcome, backend


def changed(reply, **parts):
    return replace(reply, update=replace(reply.update, **parts))


def scaled(reply, factor: float):
    private = {
        name: {key: array * np.float32(factor) for key, array in arrays.items()}
        for name, arrays in reply.update.private.items()
    }
    return changed(reply, private=private)


def moved(study: Study, outcome: Outcome) -> np.ndarray:
    """What the model was moved by, as one vector in float64."""
    before = initial_weights(TinyTask(**study.task.options), study)
    return np.concatenate([(np.float64(outcome.state.model[n]) - np.float64(before[n])).reshape(-1) for n in before])


def test_1_an_adaptive_clip_moves_towards_the_norms():
    # Counting the clipped instead, it would run away from them: towards 0 here.
    study = tiny_study(
        *CLIENT, "privacy.noise_multiplier=0.01", "privacy.clipping=adaptive", "privacy.clip_l2=1e-3", "rounds=12"
    )
    outcome, backend = run(study)
    clips = [float(work.shared[CLIP]) for work in backend.works] + [float(outcome.state.shared[CLIP])]
    assert clips[0] == 1e-3
    assert clips[-1] == pytest.approx(1e-3 * np.exp(0.2 * 0.5 * 12), rel=0.1)


class Lying:
    """One client sends something else than the plan has it send."""

    def __init__(self, change) -> None:
        self._change = change

    def __call__(self, _, reply):
        return self._change(reply) if reply.client == "cyd" else reply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda reply: changed(reply, examples=1000), "each counts once"),
        (lambda reply: changed(reply, facts={"loss": 0.1}), "each counts once"),
        (lambda reply: scaled(reply, 1.5), "longer than the plan's clip"),
        (lambda reply: scaled(reply, np.nan), "not finite"),
        (lambda reply: scaled(reply, np.inf), "not finite"),
    ],
)
def test_2_a_clients_weight_or_length_changes_no_sensitivity(change, says):
    """Weights by examples: 4.87 claimed, 18.8 spent. The round goes on as if the client had vanished."""
    study = tiny_study(*CLIENT, "privacy.clip_l2=1e-3", "rounds=1")
    seen: list[events.Event] = []
    lied, _ = run(study, Lying(change), seen)
    gone, _ = run(study, Lying(lambda reply: Failed(reply.client, "gone")))
    assert np.array_equal(moved(study, lied), moved(study, gone))
    assert any(isinstance(e, events.ClientDropped) and says in e.reason for e in seen)


def test_2_a_large_client_moves_the_model_no_more_than_a_small_one():
    study = tiny_study(*CLIENT, "privacy.clip_l2=1e-3", "rounds=1", "train.epochs=5")
    whole, _ = run(study)
    for client in CLIENTS:
        without, _ = run(
            study, lambda _, reply, client=client: Failed(client, "gone") if reply.client == client else reply
        )
        assert np.linalg.norm(moved(study, whole) - moved(study, without)) == pytest.approx(1e-3 / 4, rel=1e-3)


@pytest.mark.parametrize("bit", [2.0, -1.0, np.nan])
def test_2_the_count_of_an_adaptive_clip_takes_one_bit_a_client(bit):
    study = tiny_study(*CLIENT, "privacy.clipping=adaptive", "rounds=1")

    def bits(reply):
        return changed(reply, private={**reply.update.private, UNCLIPPED: {COUNT: np.array([bit], dtype=np.float32)}})

    lied, _ = run(study, Lying(bits))
    gone, _ = run(study, Lying(lambda reply: Failed(reply.client, "gone")))
    assert float(lied.state.shared[CLIP]) == float(gone.state.shared[CLIP])


def test_3_a_training_that_is_not_finite_stays_at_its_client():
    study = tiny_study(*CLIENT, "rounds=2", "train.lr=3e38", "train.epochs=5")
    seen: list[events.Event] = []
    outcome, _ = run(study, seen=seen)
    assert np.isfinite(moved(study, outcome)).all()
    dropped = [e for e in seen if isinstance(e, events.ClientDropped)]
    assert dropped
    assert all("finite" in e.reason for e in dropped)
    assert [row["clients"] + row["dropped"] for row in outcome.history] == [4, 4], "a round like any other"


def test_3_a_row_that_is_not_finite_contributes_nothing():
    study = tiny_study(*RECORD, "privacy.sampling_rate=1.0", "rounds=1")
    population = build_population(study, TinyTask())
    x = population.examples.x.copy()
    x[0] = np.inf
    broken = replace(population, examples=replace(population.examples, x=x))
    result = simulate_population(study, broken)
    assert all(np.isfinite(array).all() for array in result.weights.values())


def test_3_a_zero_update_is_an_update():
    study = tiny_study(*CLIENT, "rounds=1", "train.lr=1e-45")
    outcome, _ = run(study)
    assert [row["clients"] for row in outcome.history] == [4]


@pytest.mark.parametrize("unit", ["record", "client"])
def test_4_epsilon_is_of_all_rounds_and_met_by_them(unit):
    base = (*(RECORD if unit == "record" else CLIENT), "privacy.epsilon=3")
    base = tuple(key for key in base if "noise_multiplier" not in key)
    noises = []
    for rounds in (1, 8):
        plan = plan_of(tiny_study(*base, f"rounds={rounds}"))
        assert plan is not None
        assert 3.0 - 1e-4 <= account(plan.cost(), plan.delta).reported.epsilon <= 3.0
        noises.append(plan.noise_multiplier)
    assert noises[0] < noises[1]


def test_5_noise_is_added_to_what_was_learnt_and_does_not_replace_it():
    study = tiny_study(*CLIENT, "privacy.noise_multiplier=1e-4", "privacy.clip_l2=100", "rounds=1", "evaluate.every=0")
    outcome, _ = run(study)
    updates = []

    def keep(_, reply):
        updates.append(np.concatenate([a.reshape(-1) for a in reply.update.private[DELTA].values()]))
        return reply

    run(study, keep)
    mean = np.mean(updates, axis=0)
    assert np.linalg.norm(mean) > 0.1
    assert np.linalg.norm(moved(study, outcome) - mean) < 0.03


@pytest.mark.parametrize("first_round", [1, 2, 37])
def test_6_a_site_trains_with_noise_whenever_it_joins(first_round):
    """A framework that prepares the model in the first round only lets a later site train without noise, silently."""
    study = tiny_study(*RECORD, WIDE, "privacy.sampling_rate=1e-9", "privacy.clip_l2=0.5", "rounds=40", "train.lr=1e-9")
    model = initial_weights(TinyTask(hidden=4000), study)
    (reply,) = Backend(study).fit(Work(first_round, 1, ("dee",), model, {}, "digest", {}, 1.0))
    assert isinstance(reply, Fitted)
    noise = np.concatenate([array.reshape(-1) for array in reply.update.private[DELTA].values()])
    # Nobody is ever drawn: four steps of noise over a denominator of 100 units x 1e-9, times the learning rate.
    assert noise.shape == (SIZE,)
    assert noise.std() == pytest.approx(1e-9 * 1.5 * 0.5 * 2 / 1e-7, rel=0.03)


def test_7_a_delta_that_promises_nothing_is_refused_when_the_study_is_read():
    for unit in (RECORD, CLIENT):
        study = tiny_study(*unit, "privacy.units=1000", "privacy.delta=5e-3")
        with pytest.raises(StudyError, match="less than 1/1000"):
            run(study)


@pytest.mark.parametrize(
    ("cohort", "sampling", "epsilon"),
    [
        ("cohort.rate=0.05", PoissonSampling(0.05), 1.56),
        ("cohort.size=50", FixedCohort(50, 1000), 9.28),
        ("cohort.minimum=1", Everyone(), 54.4),
    ],
)
def test_8_a_cohort_is_accounted_as_it_is_drawn(cohort, sampling, epsilon):
    keys = ("privacy.unit=client", "privacy.noise_multiplier=2.0", "privacy.delta=1e-5", "privacy.units=1000")
    plan = plan_of(tiny_study(*keys, cohort, "rounds=200"))
    assert plan is not None
    assert plan.sampling == sampling
    found = (
        rdp_epsilon(plan.cost(), 1e-5)
        if isinstance(sampling, FixedCohort)
        else account(plan.cost(), 1e-5).reported.epsilon
    )
    assert found == pytest.approx(epsilon, rel=0.005)


@pytest.mark.parametrize(("cohort", "drawn"), [("cohort.size=2", {2}), ("cohort.rate=0.5", {0, 1, 2, 3, 4})])
def test_8_and_drawn_as_it_is_accounted(cohort, drawn):
    study = tiny_study(*CLIENT, cohort, "rounds=40", "evaluate.every=0")
    _, backend = run(study)
    sizes = [len(work.cohort) for work in backend.works]
    assert set(sizes) <= drawn
    assert sum(sizes) == pytest.approx(80, abs=0 if len(drawn) == 1 else 20)


@pytest.mark.parametrize("secret", [False, True])
@pytest.mark.parametrize("missing", [0, 2, 4])
def test_9_dropouts_change_neither_noise_nor_denominator(missing, secret):
    study = tiny_study(*CLIENT, WIDE, "rounds=1", "evaluate.every=0", "privacy.clip_l2=0.25")
    left = CLIENTS[missing:]
    outcome, _ = run(
        study, lambda _, reply: reply if reply.client in left else Failed(reply.client, "gone"), rehearsal=not secret
    )
    # Contributions are 0.25 long over 24,002 parameters: what is seen is noise.
    assert moved(study, outcome).std() == pytest.approx(0.5 * 0.25 / 4, rel=0.03)


@pytest.mark.parametrize("plan", [RECORD, CLIENT], ids=["record", "client"])
def test_10_over_a_link_nothing_but_the_update_leaves(plan):
    study = tiny_study(*plan, "rounds=2")
    seen: list[events.Event] = []
    updates: list[Update] = []

    def keep(_, reply):
        updates.append(reply.update)
        return reply

    _, backend = run(study, keep, seen, rehearsal=False)
    assert updates
    assert {(u.examples, tuple(u.facts), tuple(u.private)) for u in updates} == {(1, (), (DELTA,))}
    assert backend.scored == [], "no client is asked for a metric"
    assert not [e for e in seen if isinstance(e, events.Evaluated)]


@dataclass(frozen=True)
class Batchy(TinyTask):
    """A model that normalises over the batch."""

    kind: str = "running"
    name: ClassVar[str] = "tests.unit.privacy.test_mistakes_in_studies:Batchy"

    def model(self):
        return nn.Sequential(
            nn.Linear(3, 4),
            nn.BatchNorm1d(4, affine=False, track_running_stats=self.kind == "running"),
            nn.Linear(4, 2),
        )


@pytest.mark.parametrize("plan", [RECORD, CLIENT], ids=["record", "client"])
def test_10_running_statistics_are_refused(plan):
    with pytest.raises(FedlearnError, match="running statistics"):
        simulate(tiny_study(*plan, f"task.name={Batchy.name}"))


def test_10_statistics_of_the_batch_alone_are_refused_for_records():
    """BatchNorm(affine=False, track_running_stats=False) has neither parameters nor buffers to be found by."""
    seen: list[events.Event] = []
    with pytest.raises(RunFailedError):
        simulate(tiny_study(*RECORD, f"task.name={Batchy.name}", "task.options.kind=batch"), emit=seen.append)
    reasons = [e.reason for e in seen if isinstance(e, events.ClientDropped)]
    assert reasons
    assert all("examples are not separate" in reason for reason in reasons)


def test_11_every_statement_owns_up_to_floating_point():
    for plan in (RECORD, CLIENT):
        found = planned(tiny_study(*plan), rehearsal=False)
        assert found is not None
        readers = [a["caveat"] for a in found["against"] if a["epsilon"] != "infinite"]
        assert readers
        assert all(REAL_NUMBERS in caveat for caveat in readers)


def test_a_rehearsal_promises_no_number():
    found = planned(tiny_study(*CLIENT), rehearsal=True)
    assert found is not None
    assert found["epsilon"] == "not private"
