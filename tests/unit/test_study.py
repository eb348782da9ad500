"""Strict study files: what they mean, how they travel, and every way in which they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedlearn.errors import FedlearnError, StudyError
from fedlearn.study import MAX_OPTION_DEPTH, MAX_STUDY_BYTES, load_study, parse_study, study_from_json
from fedlearn.tasks import load_task

STUDIES = sorted((Path(__file__).parents[2] / "simulations").glob("*.toml"))
LEAST = 'name = "s"\nrounds = 3\n[task]\nname = "t"\n'


def refusal(text: str, *overrides: str) -> StudyError:
    with pytest.raises(StudyError) as caught:
        parse_study(text, overrides, origin="s.toml")
    return caught.value


def test_the_least_study_has_defaults_for_the_rest():
    study = parse_study(LEAST)
    assert (study.name, study.rounds, study.task.name, study.seed) == ("s", 3, "t", 0)
    assert (study.strategy.name, study.data.partition, study.train.optimizer, study.cohort.size) == (
        "fedavg",
        "natural",
        "sgd",
        None,
    )


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_our_own_studies_are_read_and_come_back_from_their_json(path):
    study = load_study(path)
    assert study_from_json(study.to_json()) == study
    assert study.with_overrides(()) == study


def test_a_study_cannot_be_changed():
    study = parse_study(LEAST)
    with pytest.raises(ValidationError):
        study.rounds = 4


def test_json_is_canonical():
    a = parse_study('name="s"\nrounds=3\ntask={name="t", options={b=1, a=[1, 2.5, "x", true, {c=0}]}}\n')
    b = parse_study('rounds=3\nname="s"\n[task.options]\na=[1, 2.5, "x", true, {c=0}]\nb=1\n[task]\nname="t"\n')
    assert a.to_json() == b.to_json()
    assert a.digest == b.digest
    assert '"wait_s":600.0' in a.to_json(), "defaults are written out"
    assert parse_study(LEAST).digest != parse_study(LEAST, ("seed=1",)).digest


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.integers(0, 2**63 - 1), st.floats(1e-6, 1e6))
def test_options_seeds_and_rates_come_back_from_json(options, seed, lr):
    study = parse_study(LEAST)
    changed = study.model_copy(
        update={
            "seed": seed,
            "train": study.train.model_copy(update={"lr": lr}),
            "strategy": study.strategy.model_copy(update={"options": options}),
        }
    )
    assert study_from_json(changed.to_json()) == changed
    assert study_from_json(changed.to_json()).digest == changed.digest


# Places.


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        (LEAST + "[tran]\nlr = 1\n", "s.toml:5", "unknown key 'tran'", "did you mean 'train'?"),
        (LEAST + "[train]\n\nmomentm = 0.9\n", "s.toml:7", "unknown key 'train.momentm'", "did you mean 'momentum'?"),
        (LEAST + "[train]\nxyz = 1\n", "s.toml:6", "unknown key 'train.xyz'", "valid keys here: optimizer, lr"),
        ("sed = 1\n" + LEAST, "s.toml:1", "unknown key 'sed'", "did you mean 'seed'?"),
        (LEAST + "train.lrr = 1\n", "s.toml:5", "unknown key 'task.train'", "valid keys here: name, options"),
        ("train.lrr = 1\n" + LEAST, "s.toml:1", "unknown key 'train.lrr'", "did you mean 'lr'?"),
        ("train = {lrr = 1}\n" + LEAST, "s.toml:1", "unknown key 'train.lrr'", "did you mean 'lr'?"),
        (LEAST + '["train"]\n"lrr" = 1\n', "s.toml:6", "unknown key 'train.lrr'", "did you mean 'lr'?"),
        (LEAST + " [ train ] # how\n  lrr= 1\n", "s.toml:6", "unknown key 'train.lrr'", "did you mean 'lr'?"),
        (LEAST + "[train.more]\nx = 1\n", "s.toml:5", "unknown key 'train.more'", "valid keys here"),
        ('name = "s"\n[task]\nname = "t"\n', "s.toml", "missing key 'rounds'", "add rounds to the study"),
        ('name = "s"\nrounds = 1\n[task]\n', "s.toml:3", "missing key 'task.name'", "add task.name to the study"),
        ("", "s.toml", "missing key 'name'", "add name"),
        (LEAST.replace("rounds", "roundss"), "s.toml:2", "unknown key 'roundss'", "did you mean 'rounds'?"),
        (LEAST + '[privacy]\nunit = "recrd"\n', "s.toml:6", "privacy.unit: Input should be", "did you mean 'record'?"),
    ],
)
def test_a_wrong_key_is_placed_and_the_nearest_is_named(text, place, message, hint):
    error = refusal(text)
    assert error.message.startswith(f"{place}: {message}")
    assert hint in error.hint
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ("[train]\nlr = 0", ":6: train.lr: Input should be greater than 0 (got 0)"),
        ('[train]\nlr = "0.1"', ":6: train.lr: Input should be a valid number (got '0.1')"),
        ("[train]\nlr = true", ":6: train.lr: "),
        ("[train]\nlr = nan", ":6: train.lr: Input should be a finite number (got nan)"),
        ("[train]\nlr = inf", ":6: train.lr: "),
        ("[train]\nmomentum = 1", ":6: train.momentum: "),
        ("[train]\nbatch_size = 2.5", ":6: train.batch_size: "),
        ("[train]\nbatch_size = 2.0", ":6: train.batch_size: Input should be a valid integer"),
        ('[train]\nbatch_size = "2"', ":6: train.batch_size: "),
        ("[train]\nepochs = 0", ":6: train.epochs: "),
        ('[train]\nprecision = "float16"', ":6: train.precision: Input should be 'float32', 'float64' or 'bfloat16'"),
        ('[train]\noptimizer = "sdg"', ":6: train.optimizer: Input should be 'sgd', 'adam' or 'adamw' (got 'sdg')"),
        ("[data]\nclients = 3", ":5: data: clients: the natural partition takes the clients that the data names"),
        ('[data]\npartition = "iid"', ":5: data: clients: missing; the iid partition needs a number of clients"),
        ("[data]\nfolds = 2\nfold = 2", ":5: data: fold: got 2, expected less than folds = 2"),
        ("[cohort]\nsize = 2\nminimum = 3", ":5: cohort: minimum: got 3, more than size = 2"),
        ("[update]\nclip_l2 = -1.0", ":6: update.clip_l2: "),
        ("[runtime]\nthreads = 257", ":6: runtime.threads: "),
        ("[strategy]\nname = 3", ":6: strategy.name: Input should be a valid string (got 3)"),
        ('[strategy]\nname = ""', ":6: strategy.name: "),
        ("[strategy]\noptions = 3", ":6: strategy.options: "),
        ("[task.options]\nwhen = 1979-05-27", ":5: task.options: got datetime.date(1979, 5, 27), expected text"),
        ("[task.options]\nrate = nan", ":5: task.options: got nan, expected text, a finite number"),
        ("[task.options]\nx = [1, {y = -inf}]", ":5: task.options: got -inf"),
        ("[evaluate]\nevery = -1", ":6: evaluate.every: "),
    ],
)
def test_a_wrong_value_is_placed_and_shown(lines, where):
    assert f"s.toml{where}" in refusal(LEAST + lines).message


@pytest.mark.parametrize(
    "line",
    [
        "seed = -1",
        "seed = 9223372036854775808",
        "rounds = 0",
        "rounds = 1000001",
        'name = "a/b"',
        'name = ""',
        'name = "../x"',
    ],
)
def test_values_out_of_range_are_refused(line):
    key = line.partition(" ")[0]
    kept = "".join(f"{one}\n" for one in LEAST.splitlines() if not one.startswith(f"{key} ") or "t" in one[-3:])
    assert f"{key}: " in refusal(f"{line}\n{kept}").message


def test_a_long_value_is_not_repeated_whole():
    assert len(refusal(LEAST + f'[train]\nlr = "{"x" * 10_000}"').message) < 200


@pytest.mark.parametrize("text", ["rounds =", "a = 1\na = 2\n", "\x00", "a = " + "[" * 100_000])
def test_what_is_no_toml_is_refused(text):
    assert "s.toml: not valid TOML" in refusal(text).message


# Overrides.


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("rounds=7", lambda s: s.rounds == 7),
        ("strategy.name=fedprox", lambda s: s.strategy.name == "fedprox"),
        ('strategy.name="fedprox"', lambda s: s.strategy.name == "fedprox"),
        (" train.lr = 1e-3 ", lambda s: s.train.lr == 1e-3),
        ("strategy.options.mu=0.5", lambda s: s.strategy.options == {"mu": 0.5}),
        ("strategy.options={mu=0.5, on=true}", lambda s: s.strategy.options == {"mu": 0.5, "on": True}),
        ("task.name=a.b:C", lambda s: s.task.name == "a.b:C"),
        ("description=x = y", lambda s: s.description == "x = y"),
        ("description=", lambda s: not s.description),
    ],
)
def test_overrides(override, read):
    assert read(parse_study(LEAST, (override,)))
    assert read(parse_study(LEAST).with_overrides((override,)))


PLAN = ("privacy.unit=record", "privacy.delta=1e-5", "privacy.epsilon=3")


@pytest.mark.parametrize("overrides", [("privacy=none",), ("privacy.epsilon=none",)])
def test_none_takes_privacy_away(overrides):
    assert parse_study(LEAST, PLAN).with_overrides(overrides) == parse_study(LEAST)


@pytest.mark.parametrize("order", [1, -1])
def test_none_for_one_budget_leaves_room_for_the_other(order):
    instead = ("privacy.epsilon=none", "privacy.noise_multiplier=1.5")[::order]
    table = parse_study(LEAST, PLAN).with_overrides(instead).privacy
    assert table is not None
    assert (table.epsilon, table.noise_multiplier) == (None, 1.5)


def test_none_is_for_what_may_be_absent_and_a_word_elsewhere():
    assert parse_study(LEAST, ("cohort.size=3",)).with_overrides(("cohort.size=none",)).cohort.size is None
    assert parse_study(LEAST, ("description=none",)).description == "none"
    assert parse_study(LEAST, ("task.options.kind=none",)).task.options == {"kind": "none"}
    assert "rounds" in refusal(LEAST, "rounds=none").message


def test_a_table_that_is_not_there_can_be_filled_in():
    assert parse_study(LEAST).with_overrides(PLAN) == parse_study(LEAST, PLAN)


def test_the_last_override_wins():
    assert parse_study(LEAST, ("rounds=7", "rounds=8")).rounds == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rounds",), "override 'rounds': expected key=value"),
        (("=3",), "override '=3': expected key=value"),
        (("train..lr=3",), "override 'train..lr=3': expected key=value"),
        (("rounds.x=1",), "override 'rounds.x=1': 'rounds' is a value, not a table"),
        (
            ("privacy.unit=group", "privacy.epsilon=3", "privacy.delta=1e-5"),
            "s.toml: privacy: group: missing; name the",
        ),
        (("rounds=0",), "override 'rounds=0': rounds: Input should be greater than or equal to 1 (got 0)"),
        (("trian.lr=1",), "override 'trian.lr=1': unknown key 'trian'"),
        (("train.lr=1", "train.lrr=1"), "override 'train.lrr=1': unknown key 'train.lrr'"),
        (("train.lr=nan",), "override 'train.lr=nan': train.lr: "),
        (("train.lr=0.1\nrounds=9",), "(got '0.1\\nrounds=9')"),
        (("data.partition=iid",), "override 'data.partition=iid': data: clients: missing"),
        (("task=1",), "override 'task=1': task: "),
    ],
)
def test_a_wrong_override_is_named_in_place_of_a_line(overrides, message):
    assert message in refusal(LEAST, *overrides).message


# Files and JSON.


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(LEAST, encoding="utf-8")
    assert load_study(path, ("rounds=4",)).rounds == 4
    assert load_study(str(path)).rounds == 3


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "heart.toml").write_text(LEAST)
    (tmp_path / "large.toml").write_text("#" * (MAX_STUDY_BYTES + 1))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    for name, message in {
        "hart.toml": "no such study file",
        "large.toml": "larger than",
        "latin.toml": "cannot be read as a study",
        ".": "cannot be read as a study",
        "nul\0.toml": "cannot be read as a study",
    }.items():
        with pytest.raises(StudyError, match=message) as caught:
            load_study(tmp_path / name)
        if name == "hart.toml":
            assert "did you mean" in caught.value.hint
            assert "heart.toml" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"x"', '{"name": NaN}', "[" * 100_000, '{"name":' * 5_000, '{"rounds": 1}'],
    ids=lambda text: text[:12],
)
def test_json_that_is_no_study_is_refused(text):
    with pytest.raises(StudyError):
        study_from_json(text)


@pytest.mark.parametrize(("depth", "taken"), [(MAX_OPTION_DEPTH, True), (MAX_OPTION_DEPTH + 1, False), (900, False)])
def test_options_are_nested_to_a_limit(depth, taken):
    text = '{"name":"a","rounds":1,"task":{"name":"x","options":' + '{"a":' * depth + "1" + "}" * depth + "}}"
    if taken:
        assert study_from_json(study_from_json(text).to_json()) == study_from_json(text)
    else:
        with pytest.raises(StudyError, match="nested"):
            study_from_json(text)


@given(st.text(max_size=60))
def test_any_text_is_a_study_or_refused(text):
    for read in (parse_study, study_from_json, lambda t: parse_study(LEAST, (t,))):
        try:
            read(text)
        except FedlearnError:
            continue


def test_options_have_one_order_whatever_the_files():
    """A task may read a table in order (the columns of a model's input); a site and a run folder have the study from its JSON."""
    options = 'label = "y"\nclasses = ["0", "1"]\ncategorical = { z = ["1"], a = ["1"] }'
    study = parse_study(f'name = "x"\nrounds = 1\n[task]\nname = "tabular/csv"\n[task.options]\n{options}\n')
    back = study_from_json(study.to_json())
    names = [load_task(one.task.name, one.task.options).feature_names for one in (study, back)]
    assert names[0] == names[1] == ("a=1", "a=missing", "z=1", "z=missing")
