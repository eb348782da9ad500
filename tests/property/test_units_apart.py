"""One unit more or less changes nothing of the others' rows: not in which half they are, not in what they are made into, to the bit.

This is what the proof of a plan for records or groups assumes of the code. Every task that accepts such a plan stands here: a site's data with and
without one unit is read, split and prepared, and all rows that are in both must come out alike.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedlearn.data.population import site_population
from fedlearn.learning.task import Batch, ClientData
from fedlearn.study import Study, parse_study
from fedlearn.tasks import task_class, task_names, task_of

# Shrinking writes files for minutes; a failing case is small as it is.
FEW = hypothesis_settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
RECORD = 'unit = "record"'
Rows = list[dict[str, Any]]


def study_of(task: str, options: str = "", privacy: str = RECORD, data: str = "folds = 3") -> Study:
    table = f"[privacy]\n{privacy}\nnoise_multiplier = 1.0\ndelta = 1e-6" if privacy else ""
    return parse_study(f"""
        name = "apart"
        rounds = 1
        seed = 3
        [task]
        name = "{task}"
        [task.options]
        {options}
        [data]
        {data}
        {table}
    """)


def prepared(study: Study, file: Path) -> ClientData:
    return site_population(study, task_of(study), "me", file).client("me")


def counted(batch: Batch) -> Counter[bytes]:
    groups = np.zeros(len(batch)) if batch.groups is None else batch.groups
    rows = zip(batch.x, batch.y, groups, strict=True)
    return Counter(x.tobytes() + b"|" + y.tobytes() + b"|" + str(group).encode() for x, y, group in rows)


def check(study: Study, one: Path, other: Path) -> None:
    """`other` is `one` with one unit more."""
    fewer, more = prepared(study, one), prepared(study, other)
    added = [counted(b) - counted(a) for a, b in ((fewer.train, more.train), (fewer.test, more.test))]
    assert not counted(fewer.train) - counted(more.train), "a training row changed, or went"
    assert not counted(fewer.test) - counted(more.test), "a test row changed, or went"
    assert not all(added), "a unit is in one half"


def csv(path: Path, rows: Rows) -> Path:
    header = list(rows[0])
    path.write_text("\n".join([",".join(header), *(",".join(str(row[key]) for key in header) for row in rows)]) + "\n")
    return path


def with_unit(rows: Rows, unit: Rows, places: list[int]) -> Rows:
    """The unit's rows put in among the others."""
    mixed = list(rows)
    for row, place in zip(unit, places, strict=False):
        mixed.insert(place % (len(mixed) + 1), row)
    return mixed


def number(low: float, high: float) -> st.SearchStrategy[Any]:
    return st.one_of(st.just("?"), st.floats(low, high).map(lambda v: f"{v:.3f}"))


PATIENT = st.fixed_dictionaries(
    {
        "age": st.integers(20, 90),
        "sex": st.sampled_from(["Male", "Female"]),
        "cp": st.sampled_from(["typical angina", "asymptomatic"]),
        "trestbps": number(0, 300),
        "chol": number(0, 1000),
        "fbs": st.sampled_from(["TRUE", "FALSE", "?"]),
        "restecg": st.sampled_from(["normal", "lv hypertrophy", "?"]),
        "thalch": number(0, 300),
        "exang": st.sampled_from(["TRUE", "FALSE", "?"]),
        "oldpeak": number(-10, 20),
        "num": st.integers(0, 4),
    }
)
PLACES = st.lists(st.integers(0, 99), min_size=8, max_size=8)


@FEW
@given(st.lists(PATIENT, min_size=1, max_size=8), PATIENT, PLACES, st.sampled_from(["full", "flamby"]))
def test_heart(rows, row, places, variant):
    study = study_of("hospital/heart", f'variant = "{variant}"')
    with tempfile.TemporaryDirectory() as folder:
        rows = [PATIENT_WITHOUT_GAPS, *rows]  # FLamby's variant refuses a file without a complete row
        one = csv(Path(folder) / "one.csv", rows)
        check(study, one, csv(Path(folder) / "other.csv", with_unit(rows, [row], places)))


PATIENT_WITHOUT_GAPS = {
    "age": 50, "sex": "Male", "cp": "asymptomatic", "trestbps": 120, "chol": 230, "fbs": "FALSE", "restecg": "normal",
    "thalch": 150, "exang": "FALSE", "oldpeak": 1.0, "num": 1,
}  # fmt: skip
CSV = """
label = "sick"
features = ["age", "dose"]
categorical = { ward = ["north", "south"] }
ranges = { age = [0.0, 100.0], dose = [0.0, 10.0] }
classes = ["no", "yes"]
"""
CELL = st.fixed_dictionaries(
    {
        "age": number(0, 100),
        "dose": number(0, 20),
        "ward": st.sampled_from(["north", "south", "?"]),
        "sick": st.sampled_from(["no", "yes"]),
    }
)


@FEW
@given(st.lists(CELL, min_size=1, max_size=8), CELL, PLACES)
def test_a_table(rows, row, places):
    with tempfile.TemporaryDirectory() as folder:
        one = csv(Path(folder) / "one.csv", rows)
        check(study_of("tabular/csv", CSV), one, csv(Path(folder) / "other.csv", with_unit(rows, [row], places)))


@FEW
@given(
    st.lists(st.tuples(CELL, st.sampled_from(["a", "bb", "c"])), min_size=1, max_size=8),
    st.lists(CELL, min_size=1, max_size=4),
    PLACES,
)
def test_a_table_with_groups(rows, unit, places):
    study = study_of("tabular/csv", CSV, 'unit = "group"\ngroup = "patient"')
    known = [{**row, "patient": patient} for row, patient in rows]
    new = [{**row, "patient": "a much longer name"} for row in unit]
    with tempfile.TemporaryDirectory() as folder:
        one = csv(Path(folder) / "one.csv", known)
        check(study, one, csv(Path(folder) / "other.csv", with_unit(known, new, places)))


PAYMENT = st.fixed_dictionaries(
    {
        "time_s": st.integers(0, 40 * 86_400),
        "terminal": st.sampled_from(["t1", "t2"]),
        "amount": st.integers(0, 10_000_000).map(lambda cents: f"{cents / 100:.2f}"),
        "fraud": st.integers(0, 1),
    }
)


@FEW
@given(
    st.lists(st.tuples(PAYMENT, st.sampled_from(["ada", "bob"])), min_size=1, max_size=12),
    st.lists(PAYMENT, min_size=1, max_size=6),
)
def test_payments(rows, unit):
    study = study_of("bank/fraud", privacy='unit = "group"\ngroup = "customer"')
    known = [{**row, "customer": customer} for row, customer in rows]
    new = [{**row, "customer": "0"} for row in unit]  # the first name: everybody else's number changes
    with tempfile.TemporaryDirectory() as folder:
        check(study, csv(Path(folder) / "one.csv", known), csv(Path(folder) / "other.csv", [*known, *new]))


TEXT = st.text(st.sampled_from("abc d"), min_size=1, max_size=30).filter(str.strip)


@FEW
@given(
    st.lists(st.tuples(TEXT, st.sampled_from(["ada", "bob"])), min_size=2, max_size=8),
    st.lists(TEXT, min_size=1, max_size=4),
    PLACES,
)
def test_messages(rows, unit, places):
    study = study_of("device/keyboard", "context = 8", 'unit = "group"\ngroup = "user"')
    known = [{"user": user, "text": text * 9} for text, user in rows]
    mixed = with_unit(known, [{"user": "aaa", "text": text} for text in unit], places)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.jsonl" for name in ("one", "other")]
        for file, lines in zip(files, (known, mixed), strict=True):
            file.write_text("\n".join(map(json.dumps, lines)))
        check(study, *files)


@FEW
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32), st.booleans())
def test_images(count, more, seed, grouped):
    study = study_of("image/npz", "classes = 3", 'unit = "group"\ngroup = "patient"' if grouped else RECORD)
    rng = np.random.default_rng(seed)
    more = more if grouped else 1
    images = rng.integers(0, 256, (count + more, 4, 4, 3), dtype=np.uint8)
    labels, order = rng.integers(0, 3, count + more), rng.permutation(count + more)
    patients = np.array([*rng.integers(0, 3, count), *[7] * more])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.npz" for name in ("one", "other")]
        for file, rows in zip(files, (np.arange(count), order), strict=True):
            np.savez(file, train_images=images[rows], train_labels=labels[rows], train_patient=patients[rows])
        check(study, *files)


def test_without_a_plan_they_are_not_and_this_test_would_tell(tmp_path):
    """Medians, stratified halves and histories: each moves the rows of others, which is fine where nobody promised that it does not."""
    rows = [{**PATIENT_WITHOUT_GAPS, "age": 40 + i, "chol": 200 + i} for i in range(9)]
    gaps = [*rows, {**PATIENT_WITHOUT_GAPS, "age": 80, "chol": "?"}]
    one, other = (
        csv(tmp_path / "one.csv", gaps),
        csv(tmp_path / "other.csv", [*gaps, {**PATIENT_WITHOUT_GAPS, "chol": 900}]),
    )
    check(study_of("hospital/heart", data="folds = 1"), one, other)
    for folds in (1, 3):
        with pytest.raises(AssertionError, match="changed"):
            check(study_of("hospital/heart", privacy="", data=f"folds = {folds}"), one, other)
    known = [{"time_s": day * 86_400, "terminal": "t", "amount": 5, "fraud": 0, "customer": "b"} for day in (9, 19, 29)]
    new = {"time_s": 86_400, "terminal": "t", "amount": 5, "fraud": 1, "customer": "a"}
    one, other = csv(tmp_path / "one.csv", known), csv(tmp_path / "other.csv", [*known, new])
    with pytest.raises(AssertionError, match="changed"):
        check(study_of("bank/fraud", privacy="", data="folds = 1"), one, other)


HERE = {"hospital/heart", "tabular/csv", "bank/fraud", "device/keyboard", "image/npz"}


def test_every_task_stands_here_or_prepares_as_one_that_does():
    """A task that is new must come here, or its claim under a plan is tested by nobody."""
    for name in set(task_names()) - HERE:
        assert task_class(name).prepare is task_class("image/npz").prepare, name
