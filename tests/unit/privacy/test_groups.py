"""Whole people at a site: read, kept whole in one half, drawn and charged as one, from the file to the last round; and what is refused."""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np
import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.data.population import build_population, site_population
from fedlearn.errors import DataError, FedlearnError, StudyError, UnsupportedError
from fedlearn.learning.task import Batch
from fedlearn.privacy.plan import Unit
from fedlearn.privacy.site import site_plan
from fedlearn.privacy.steps import NoisySteps
from fedlearn.privacy.study import plan_of
from fedlearn.study import Study, parse_study
from fedlearn.tasks import task_of
from fedlearn.tasks.heart import HeartTask
from tests.support.memory_grid import MemoryGrid, nodes_of
from tests.support.runs import run_server_app
from tests.support.tiny_task import tiny_study

CLINICS = ("east", "north", "west")
GROUP = 'unit = "group"\ngroup = "patient"\nnoise_multiplier = 0.8\ndelta = 1e-3\nunits = 20\nsteps = 3\nevaluation_noise = 2.0'


def table(seed: int = 0, rows: int = 180) -> str:
    rng = np.random.default_rng(seed)
    lines = ["clinic,patient,age,dose,sick"]
    for _ in range(rows):
        clinic, patient = CLINICS[rng.integers(3)], rng.integers(20)
        age = 20 + 3 * patient + rng.integers(3)
        lines.append(f"{clinic},p{patient},{age},{rng.random():.3f},{'yes' if age > 50 else 'no'}")
    return "\n".join(lines) + "\n"


def study_of(path, privacy: str = GROUP, task: str = "tabular/csv", options: str | None = None) -> Study:
    csv = f"""
        label = "sick"
        features = ["age", "dose"]
        ranges = {{ age = [20.0, 80.0], dose = [0.0, 1.0] }}
        client = "clinic"
        classes = ["no", "yes"]
        hidden = [4]
        path = "{path}"
    """
    return parse_study(f"""
        name = "grouped"
        rounds = 2
        [task]
        name = "{task}"
        [task.options]
        {csv if options is None else options}
        [data]
        folds = 4
        [cohort]
        wait_for = 3
        [runtime]
        wait_s = 5.0
        [privacy]
        {privacy}
    """)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(table())
    return file


def test_people_travel_from_the_file_to_the_batches(path):
    study = study_of(path)
    population = build_population(study, task_of(study))
    for clinic in CLINICS:
        data = population.client(clinic)
        for batch in (data.train, data.test):
            assert len(batch.groups) == len(batch)
            ages = batch.x[:, 0] * 30 + 50  # the file's: a patient's age says who it is
            assert [f"p{int((age - 20) // 3)}" for age in np.rint(ages)] == batch.groups.tolist()
        assert not set(data.train.groups) & set(data.test.groups)
        (block,) = population.block([clinic])
        assert block.groups.tolist() == data.train.groups.tolist()
        alone = site_population(study, task_of(study), clinic, path).client(clinic)
        assert alone.train.groups.tolist() == data.train.groups.tolist()
    halves = [set(population.client(clinic).test.groups) for clinic in CLINICS]
    trained = set.union(*(set(population.client(clinic).train.groups) for clinic in CLINICS))
    assert not set.union(*halves) & trained, "who is at two clinics is in the same half at both"


def test_one_row_of_each_person_is_drawn(path):
    study = study_of(path)
    train = build_population(study, task_of(study)).client("east").train
    site = site_plan(study, 1, "east", train, rehearsal=True)
    assert site.plan.unit is Unit.GROUP
    steps = NoisySteps(len(train), site.plan, site.chance, groups=site.groups)
    for _ in range(30):
        drawn = train.groups[steps.draw()]
        assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize("partition", ["natural", "dirichlet", "bootstrap"])
def test_simulations_of_every_backend_agree(path, partition):
    study = study_of(path)
    if partition != "natural":
        study = study.with_overrides([f"data.partition={partition}", "data.clients=9"])
    results = [fedlearn.simulate(study, backend=backend) for backend in ("sequential", "batched")]
    one, other = results
    for name, array in one.weights.items():
        assert np.linalg.norm(array - other.weights[name]) <= 1e-4 * max(1.0, np.linalg.norm(array))
    assert one.privacy["unit"] == "group"
    assert one.privacy["evaluations"] == 2


def test_a_seeded_federation_gives_the_simulations_bytes_and_its_noisy_metrics(path):
    study = study_of(path).with_overrides(["privacy.seeded=true"])
    expected = fedlearn.simulate(study)
    run = run_server_app(study, MemoryGrid(nodes_of(CLINICS)))
    assert digest(run.model) == digest(expected.weights)
    last = run.of(events.Evaluated)[-1]
    assert last.mean["accuracy"] == pytest.approx(expected.history.final("accuracy"), nan_ok=True)
    secret = run_server_app(study_of(path), MemoryGrid(nodes_of(CLINICS)))
    assert digest(secret.model) != digest(expected.weights), "unless it asks to be seeded, nobody can repeat it"


def test_delta_is_of_people_not_of_rows(path):
    """Sixty rows of a dozen people: a delta of 1/30 is too large for rows, and small enough for people."""
    study = study_of(path).with_overrides(["privacy.delta=0.033"])
    train = build_population(study, task_of(study)).client("east").train
    assert len(np.unique(train.groups)) < 30 < len(train)
    assert site_plan(study, 1, "east", train, rehearsal=True) is not None
    many = Batch(train.x, train.y, np.array([f"p{i}" for i in range(len(train))]))
    with pytest.raises(DataError, match="groups need less than 1 over their number"):
        site_plan(study, 1, "east", many, rehearsal=True)


@pytest.mark.parametrize("missing", ["", "?", "NA", "nan"])
def test_a_row_that_is_nobodys_is_refused_and_left_out_where_a_server_asks(path, missing):
    """Were it a failure there, options that make it fit or not would ask what is in it."""
    before = site_population(study_of(path), task_of(study_of(path)), "east", path).examples
    lines = path.read_text().splitlines()
    lines[5] = re.sub(r",p\d+,", f",{missing},", lines[5])
    path.write_text("\n".join(lines) + "\n")
    study = study_of(path)
    for read in (
        lambda: build_population(study, task_of(study)),
        lambda: site_population(study, task_of(study), "east", path, strict=True),
    ):
        with pytest.raises(DataError, match="1 of 180 rows have no id, the first is row 5"):
            read()
    others = np.delete(np.arange(len(before)), 4)
    found = site_population(study, task_of(study), "east", path).examples
    assert found.left_out is not None
    assert found.left_out.rows == 1
    for name in ("x", "y", "client", "groups"):
        assert np.array_equal(getattr(found, name), getattr(before, name)[others])


def test_a_column_that_is_not_there_is_refused(path):
    study = study_of(path, GROUP.replace('"patient"', '"person"'))
    with pytest.raises(DataError, match="no group column 'person', which"):
        build_population(study, task_of(study))


RECORD = 'unit = "record"\nnoise_multiplier = 1.0\ndelta = 1e-3'
REFUSED = {
    "heart has no groups": ("hospital/heart", "", GROUP, "does not say whose each row is"),
    "a payment is no unit": ("bank/fraud", "", RECORD, 'group = "customer"'),
    "a bank's groups are customers": ("bank/fraud", "", GROUP, "only whole customers"),
    "a message is no unit": ("device/keyboard", "", RECORD, 'group = "user"'),
    "a column without a range": (
        "tabular/csv",
        'label = "sick"\nfeatures = ["age"]\nclasses = ["no", "yes"]',
        RECORD,
        "column 'age' has no public range",
    ),
    "a prepare that learns": ("tests.unit.learning.test_population:Centred", "", RECORD, "learns from several rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_task_that_cannot_is_refused_when_the_study_is_read(case, tmp_path):
    from fedlearn.app import load_app
    from server.submission import read_submission

    name, options, privacy, says = REFUSED[case]
    study = study_of(tmp_path, privacy, name, options)
    text = f'name = "x"\nrounds = 1\n[task]\nname = "{name}"\n[task.options]\n{options}\n[privacy]\n{privacy}\n'
    for read in (
        lambda: task_of(study),
        lambda: fedlearn.simulate(study),
        lambda: read_submission(load_app(), text, ()),
    ):
        with pytest.raises(FedlearnError) as caught:
            read()
        assert isinstance(caught.value, StudyError | UnsupportedError)
        assert says in str(caught.value)


def test_a_promise_of_rows_one_by_one_is_enough_for_records():
    for name in (
        "tests.unit.learning.test_population:Halved",
        "vision/digits",
        "hospital/blood-smear",
        "hospital/heart",
    ):
        assert task_of(study_of("", RECORD, name, "")) is not None
    assert plan_of(tiny_study("privacy.unit=record", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3")) is not None


class OtherPreparation(HeartTask):
    """Inherits an answer that was given for another prepare."""

    name: ClassVar[str] = "tests.unit.privacy.test_groups:OtherPreparation"

    def prepare(self, train, test):
        return super().prepare(train, test)


class OwnAnswer(OtherPreparation):
    name: ClassVar[str] = "tests.unit.privacy.test_groups:OwnAnswer"

    def for_units(self, group=""):
        return super().for_units(group)


def test_a_promise_is_of_the_class_that_reads_and_prepares():
    with pytest.raises(UnsupportedError, match="OtherPreparation has its own prepare, and for_units is HeartTask's"):
        task_of(study_of("", RECORD, OtherPreparation.name, ""))
    assert task_of(study_of("", RECORD, OwnAnswer.name, "")).imputation == "public"


def test_without_a_plan_tasks_are_as_they_were(path):
    study = study_of(path)
    plain = study.model_copy(update={"privacy": None})
    assert task_of(plain).scaling == "own"
    assert task_of(plain).group == ""
    assert build_population(plain, task_of(plain)).client("east").train.groups is None
    client = study.with_overrides(["privacy={unit='client', noise_multiplier=1.0, delta=1e-3, units=3}"])
    assert task_of(client).scaling == "own", "a client-level plan protects clients, whatever they make of their rows"


def test_payments_of_customers_train_and_are_scored_as_one():
    study = study_of(
        "",
        GROUP.replace("patient", "customer"),
        "bank/fraud",
        "customers = 60\nterminals = 300\ndays = 14\nbanks = 2",
    )
    result = fedlearn.simulate(study.with_overrides(["cohort.wait_for=2", "rounds=1"]))
    assert result.privacy["unit"] == "group"
    assert result.task.histories == "customer"
    population = build_population(study, task_of(study))
    banks = [population.client(bank) for bank in population.client_ids]
    people = [set(part.groups) for bank in banks for part in (bank.train, bank.test)]
    assert sum(map(len, people)) == len(set.union(*people)) > 40, "each is in one half of one bank"
