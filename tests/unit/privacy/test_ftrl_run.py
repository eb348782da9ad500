"""DP-FTRL in a study: what is refused, who is asked again, and that no round's noise is ever drawn twice, whatever crashes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fedlearn.errors import RunFailedError, StateError, StudyError
from fedlearn.learning.local import initial_weights
from fedlearn.learning.rows import NumberedIds
from fedlearn.learning.update import DELTA
from fedlearn.privacy.accounting import account, pld_epsilon
from fedlearn.privacy.claims import Adversary, claims
from fedlearn.privacy.events import Gaussian, Repeated
from fedlearn.privacy.ftrl import Banded, inverse_coefficients
from fedlearn.privacy.ftrl_run import KEY_BYTES, FtrlRun
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import AdaptiveClip, Everyone, PoissonSampling, Spaced, Unit
from fedlearn.privacy.statement import planned, released
from fedlearn.privacy.study import plan_of
from fedlearn.privacy.what_if import alternatives
from fedlearn.release.journal import DictJournal
from fedlearn.release.keys import record_key
from fedlearn.simulation.run import simulate
from fedlearn.study import parse_study
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study
from tests.unit.learning.test_federation import Backend, Crash, CrashingJournal, comparable, fail, federation

FTRL = (
    "privacy.unit=client",
    "privacy.mechanism=ftrl",
    "privacy.noise_multiplier=0.5",
    "privacy.delta=1e-3",
    f"privacy.units={len(CLIENTS)}",
    "cohort.size=1",
    "privacy.min_separation=3",
    "rounds=6",
    "evaluate.every=0",
)


def study_of(*more):
    return tiny_study(*FTRL, *more)


# What is refused when a study is read.


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("privacy.unit=record", "privacy.min_separation=3"), "unit"),
        (("privacy.clipping=adaptive",), "adaptive does not go with ftrl"),
    ],
)
def test_a_table_that_cannot_hold_is_refused(overrides, says):
    with pytest.raises(StudyError, match=says):
        study_of(*overrides)


@pytest.mark.parametrize("key", ["min_separation=3", "max_participations=2", "matrix=banded"])
def test_ftrls_keys_are_for_ftrl(key):
    plain = ("privacy.unit=client", "privacy.epsilon=3", "privacy.delta=1e-3", "privacy.units=4")
    with pytest.raises(StudyError, match=r'only for mechanism = "ftrl"'):
        tiny_study(*plain, f"privacy.{key}")


def test_the_separation_must_be_said():
    with pytest.raises(StudyError, match="min_separation: missing"):
        tiny_study(*(key for key in FTRL if "min_separation" not in key))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("privacy.min_separation=5",), "rounds of 1 clients need 5 of them, privacy.units says 4"),
        (("privacy.max_participations=1",), "need 6 of them"),
        (("cohort.size=2",), "need 6 of them"),
    ],
)
def test_too_few_clients_for_the_constraints_are_refused(overrides, says):
    with pytest.raises(StudyError, match=says):
        federation(study_of(*overrides), Backend(study_of()))


def test_coins_and_everybody_do_not_go_with_it():
    text = """
        name = "x"
        rounds = 6
        task.name = "tests.support.tiny_task:TinyTask"
        {cohort}
        [privacy]
        unit = "client"
        mechanism = "ftrl"
        epsilon = 3
        delta = 1e-3
        units = 4
        min_separation = {separation}
    """
    with pytest.raises(StudyError, match="amplifies nothing by coins"):
        plan_of(parse_study(text.format(cohort="cohort.rate = 0.1", separation=1)))
    with pytest.raises(StudyError, match=r"cohort.size: missing"):
        plan_of(parse_study(text.format(cohort="", separation=2)))
    everybody = plan_of(parse_study(text.format(cohort="", separation=1)))
    assert everybody is not None
    assert everybody.sampling == Spaced(4, 1)


def test_a_plan_that_does_not_fit_itself_is_refused():
    plan = plan_of(study_of())
    assert plan is not None
    for change in (
        {"sampling": Everyone()},
        {"matrix": None},
        {"clipping": AdaptiveClip(1.0)},
        {"unit": Unit.RECORD},
        {"unit": Unit.RECORD, "sampling": PoissonSampling(0.1)},
    ):
        with pytest.raises(StudyError, match="correlated noise"):
            replace(plan, **change)


# What it costs.


def test_the_whole_run_is_charged_with_its_first_round():
    plan = plan_of(study_of("privacy.noise_multiplier=2.0"))
    assert plan is not None
    assert plan.cost().event == Repeated(Gaussian(2.0), 1)
    assert plan.cost(1) == plan.cost(6) == plan.cost()
    assert pld_epsilon(plan.cost(0), 1e-3) == 0.0
    others = {one.what: one for one in alternatives(plan)}
    assert others.keys() == {"the plan", "rounds x 0.5", "rounds x 2", "noise x 0.5", "noise x 2"}, (
        "there is no draw to change"
    )
    longer = replace(plan, rounds=12, noise_multiplier=others["rounds x 2"].noise_multiplier)
    assert longer.ftrl.noise_std == pytest.approx(plan.ftrl.noise_std), "the same noise on a round's sum"
    assert others["rounds x 0.5"].epsilon < others["the plan"].epsilon < others["rounds x 2"].epsilon


def test_epsilon_is_met_by_the_least_noise_and_needs_less_of_it_than_independent_rounds():
    other = (key for key in FTRL if "noise_multiplier" not in key)
    plan = plan_of(tiny_study(*other, "privacy.epsilon=3"))
    assert plan is not None
    assert account(plan.cost(), 1e-3).reported.epsilon == pytest.approx(3.0, abs=1e-4)
    assert pld_epsilon(plan.cost(), 1e-3) <= 3.0
    independent = replace(plan.ftrl, strategy=Banded(1))
    assert plan.ftrl.error() < independent.error()


def test_the_server_is_promised_nothing_and_the_caveat_names_the_neighbours():
    plan = plan_of(study_of())
    assert plan is not None
    found = {claim.adversary: claim for claim in claims(plan, 1.0, "a", seeded=False, unsampled=1.0)}
    assert found[Adversary.SERVER].epsilon == math.inf
    assert found[Adversary.MODEL_READER].epsilon == 1.0
    assert "zero or are not" in found[Adversary.MODEL_READER].caveat
    assert "hidden" in found[Adversary.MODEL_READER].caveat


# Who is asked.


@pytest.mark.parametrize("rehearsal", [True, False])
@pytest.mark.parametrize("applied", [True, False])
def test_nobody_is_asked_too_soon_or_too_often_whatever_crashes(rehearsal, applied):
    study = study_of("privacy.max_participations=2")
    k = 0
    while True:
        k += 1
        journal, backend = CrashingJournal(k, applied=applied), Backend(study, {("bob", n, 1): fail for n in range(7)})
        try:
            federation(study, backend, journal, rehearsal=rehearsal).run()
        except Crash:
            federation(study, backend, journal, rehearsal=rehearsal).run()
            died = True
        else:
            died = False
        asked: dict[str, set[int]] = {}
        for work in backend.works:
            for client in work.cohort:
                asked.setdefault(client, set()).add(work.round)
        assert set.union(*asked.values()) == set(range(1, 7))
        for client, rounds in asked.items():
            assert len(rounds) <= 2, f"{client}: write {k}"
            ordered = sorted(rounds)
            assert all(b - a >= 3 for a, b in itertools.pairwise(ordered)), f"{client}: write {k}"
        if not died:
            break
    assert k > 10


def test_whoever_answers_is_no_part_of_who_is_asked():
    """A client whose updates are refused is asked as if they were not: what it holds decides nothing."""
    study = study_of()
    rosters = []
    for replies in ({}, {("bob", n, 1): fail for n in range(7)}):
        backend = Backend(study, replies)
        federation(study, backend, rehearsal=True).run()
        rosters.append([work.cohort for work in backend.works])
    assert rosters[0] == rosters[1]


def test_clients_come_when_they_can_and_nobody_at_all_ends_the_run():
    study = study_of("cohort.wait_for=1")
    backend = Backend(study, here=("ada",))
    with pytest.raises(RunFailedError, match="none of the 1 clients here may be asked") as failed:
        federation(study, backend, journal := DictJournal()).run()
    assert "start more" in failed.value.hint
    backend.here = CLIENTS
    assert federation(study, backend, journal).run().state.round == 6


# The noise.


class Silent(Backend):
    """Nobody has anything to say, so that what the model moves by is noise alone."""

    def fit(self, work):
        for reply in super().fit(work):
            private = {
                n: {k: np.zeros_like(a) for k, a in arrays.items()} for n, arrays in reply.update.private.items()
            }
            yield replace(reply, update=replace(reply.update, private=private))


class Remembering(CrashingJournal):
    """Keeps the key that the last round erases, and every checkpoint."""

    def __init__(self, at, *, applied):
        super().__init__(at, applied=applied)
        self.key, self.models = None, {}

    def write(self, changes):
        super().write(changes)
        self.key = self.get(record_key("noise-key", "run")) or self.key


def moves(backend, outcome, size):
    """What each round moved the model by, times the cohort's size; shape (rounds, parameters), float64."""
    models = {work.round: work.model for work in backend.works}
    models[len(models) + 1] = outcome.state.model
    flat = [np.concatenate([np.float64(a).reshape(-1) for a in models[n].values()]) for n in sorted(models)]
    return np.diff(np.stack(flat), axis=0) * size


@pytest.mark.parametrize("matrix", ["blt", "banded"])
def test_c_times_the_released_noise_is_independent_at_every_crash(matrix):
    """The private mode: what a resumed run releases is C^-1 Z of the one key, as if it had never died."""
    study = study_of(f"privacy.matrix={matrix}", "train.precision=float64")
    plan = plan_of(study)
    assert plan is not None
    column = plan.ftrl.strategy.coefficients(6)
    c = np.array([[column[i - j] if i >= j else 0.0 for j in range(6)] for i in range(6)])
    k, keys = 0, set()
    while True:
        k += 1
        journal, backend = Remembering(k, applied=k % 2 == 0), Silent(study)
        try:
            outcome = federation(study, backend, journal).run()
        except Crash:
            outcome = federation(study, backend, journal).run()
            died = True
        else:
            died = False
        released = moves(backend, outcome, 1)
        assert journal.key is not None
        one = FtrlRun(plan, Keyed(journal.key), "run", None)
        expected = np.stack([one._chance_of(n).normal(8, plan.ftrl.noise_std) for n in range(1, 7)])
        np.testing.assert_allclose(c @ released, expected, rtol=2e-6, err_msg=f"write {k}")
        assert journal.get(record_key("noise-key", "run")) is None, "erased with the last round"
        keys.add(journal.key)
        if not died:
            break
    assert len(keys) == k, "every run has its own key"
    assert all(len(key) == KEY_BYTES for key in keys)


class Keyed(DictJournal):
    """Only a key is left."""

    def __init__(self, key):
        super().__init__()
        self.write({record_key("noise-key", "run"): key})


def test_what_is_released_has_the_plans_variance():
    # Contributions are no longer than the clip, over 24,002 parameters: what moves the model is noise.
    study = study_of("task.options.hidden=4000", "train.precision=float64", "privacy.clip_l2=0.25", "cohort.size=1")
    plan = plan_of(study)
    assert plan is not None
    before = initial_weights(TinyTask(hidden=4000), study)
    after = simulate(study).weights
    moved = np.concatenate([(after[name] - before[name]).reshape(-1) for name in before])
    assert moved.shape == (24_002,)
    row = np.cumsum(inverse_coefficients(plan.ftrl.strategy.coefficients(6)))  # the last one of A C^-1
    assert plan.ftrl.noise_std == pytest.approx(0.5 * 0.25 * plan.ftrl.sensitivity)
    assert moved.std() == pytest.approx(plan.ftrl.noise_std * np.linalg.norm(row), rel=0.02)


@pytest.mark.parametrize("applied", [True, False])
def test_a_crash_at_any_write_changes_nothing(applied):
    study = study_of("strategy.name=scaffold")
    journal = CrashingJournal(10**9, applied=False)
    expected = comparable(federation(study, Backend(study), journal, rehearsal=True).run())
    for k in range(1, 10**9 - journal.left + 1):
        dying, backend = CrashingJournal(k, applied=applied), Backend(study)
        with pytest.raises(Crash):
            federation(study, backend, dying, rehearsal=True).run()
        assert comparable(federation(study, backend, dying, rehearsal=True).run()) == expected, f"write {k}"


def test_another_attempt_at_a_round_has_the_same_noise():
    plan = plan_of(study_of())
    assert plan is not None
    run = FtrlRun(plan, DictJournal(), "run", 5)
    sums = {DELTA: {"w": np.zeros(3), "b": np.zeros((2, 2))}}
    first, second, again = run.means(1, sums), run.means(2, sums), run.means(2, sums)
    assert np.array_equal(second[DELTA]["w"], again[DELTA]["w"])
    assert not np.array_equal(first[DELTA]["w"], second[DELTA]["w"])
    assert np.array_equal(FtrlRun(plan, DictJournal(), "run", 5).means(2, sums)[DELTA]["b"], second[DELTA]["b"])
    assert np.array_equal(run.means(1, sums)[DELTA]["w"], first[DELTA]["w"])


def test_a_run_goes_on_under_its_own_plan_only():
    study, journal = study_of(), DictJournal()
    stop = iter([False, False, True])
    federation(study, Backend(study), journal, should_stop=lambda: next(stop)).run()
    for change in ("rounds=7", "privacy.noise_multiplier=0.4", "privacy.min_separation=4"):
        with pytest.raises(StateError, match="was begun under"):
            federation(study_of(change), Backend(study), journal)
    assert federation(study, Backend(study), journal).run().state.round == 6


def test_a_lost_key_ends_the_run_and_is_not_made_anew():
    study, journal = study_of(), DictJournal()
    stop = iter([False, False, True])
    federation(study, Backend(study), journal, should_stop=lambda: next(stop)).run()
    assert len(journal.get(record_key("noise-key", "run")) or b"") == KEY_BYTES
    journal.write({record_key("noise-key", "run"): None})
    with pytest.raises(StateError, match="key of its noise"):
        federation(study, Backend(study), journal).run()


def test_rehearsals_write_no_key_and_records_name_the_clients():
    study, journal = study_of(), DictJournal()
    federation(study, Backend(study), journal, rehearsal=True).run()
    assert journal.get(record_key("noise-key", "run")) is None
    asked = [json.loads(data) for _, data in journal.scan(record_key("asked", "run", ""))]
    assert sum(count for _, count, _ in asked) == 6
    assert {client for client, _, _ in asked} <= set(CLIENTS)


def test_those_asked_least_are_asked_first():
    plan = plan_of(study_of())
    assert plan is not None
    run = FtrlRun(replace(plan, sampling=Spaced(2, 1), rounds=6), DictJournal(), "run", 5)
    for number in range(1, 7):
        run.closing(number, run.pick(CLIENTS, number, seeded_chance(number)))
    assert {count for count, _ in run._asked.values()} == {3}


def test_a_statement_names_the_constraints_and_counts_the_whole_run():
    found = released(study_of(), committed=1, attempts=1, rehearsal=False)
    assert found is not None
    assert found["epsilon"] == planned(study_of(), rehearsal=False)["epsilon"]
    assert "none twice in 3 rounds or more than 2 times" in found["sampling"]
    assert "from the first one on" in found["counted"]


def test_a_large_population_is_not_looked_through():
    class Ids(NumberedIds):
        looked = 0

        def at(self, number):
            self.looked += 1
            return super().at(number)

    plan, ids = plan_of(study_of()), Ids(10**7)
    assert plan is not None
    run = FtrlRun(replace(plan, sampling=Spaced(50, 3), rounds=6), DictJournal(), "run", 5)
    asked: set[str] = set()
    for number in range(1, 7):
        cohort = run.pick(ids, number, seeded_chance(number))
        run.closing(number, cohort)
        assert list(cohort) == sorted(set(cohort))
        asked |= set(cohort)
    assert len(asked) == 300, "nobody twice while there are others"
    assert ids.looked < 6 * 150


def test_the_sum_may_be_masked():
    more = ("cohort.size=4", "privacy.min_separation=1", "rounds=2")
    plain, masked = (simulate(study_of(*more, *extra)).weights for extra in ((), ("secure_aggregation.enabled=true",)))
    assert all(np.allclose(plain[name], masked[name], atol=1e-4) for name in plain)
