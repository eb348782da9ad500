"""Runs side by side: groups, means and deviations over seeds, curves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import fedlearn
from fedlearn.cli import main
from fedlearn.errors import DataError, StateError
from fedlearn.privacy.statement import planned
from fedlearn.report.runs import Run, SideBySide
from tests.support.tiny_task import tiny_study

SCORES = {("fedavg", 0): [0.5, 0.7], ("fedavg", 1): [0.6, 0.9], ("fedprox", 0): [0.8, 0.6]}


def run(strategy, seed, scores, metric="accuracy", **columns):
    rows = [
        {"round": i, metric: score, "train_loss": 1.0 / i, "seconds": 0.5, **{k: v * i for k, v in columns.items()}}
        for i, score in enumerate(scores, start=1)
    ]
    return Run(f"{strategy}-{seed}", tiny_study(f"strategy.name={strategy}", f"seed={seed}"), rows, metric)


def test_groups_are_the_runs_that_differ_in_their_seed_alone():
    both = SideBySide.of([run(*key, scores) for key, scores in SCORES.items()])
    assert both.keys == ("strategy.name",)
    first, second = both.table()
    assert (first["strategy.name"], first["runs"], first["rounds"]) == ("fedavg", 2, 2)
    assert first["accuracy"] == pytest.approx(0.8)
    assert first["deviation"] == pytest.approx(np.std([0.7, 0.9], ddof=1))
    assert (second["accuracy"], second["best"], second["seconds"]) == (0.6, 0.8, 1.0)
    assert math.isnan(second["deviation"])
    assert both.groups[0].curve("accuracy", "round")[1] == pytest.approx((2.0, 0.8, np.std([0.7, 0.9], ddof=1)))


def test_the_axis_is_virtual_time_where_every_run_has_it():
    timed = [run(*key, scores, virtual_seconds=10.0 * (key[1] + 1)) for key, scores in SCORES.items()]
    both = SideBySide.of(timed)
    assert both.along == "virtual_time_s"
    assert [point[0] for point in both.groups[0].curve("accuracy", both.along)] == [15.0, 45.0]
    assert both.plot().axes[0].get_xlabel().startswith("virtual time, s")
    mixed = SideBySide.of([*timed, run("fedadam", 0, [0.1])])
    assert mixed.along == "round"
    assert [line.get_label() for line in mixed.plot().axes[0].lines] == ["fedavg", "fedprox", "fedadam"]


def test_runs_without_scores_and_of_another_metric():
    never = SideBySide.of([run("fedavg", 0, [None, None])])
    assert math.isnan(never.table()[0]["accuracy"])
    assert math.isnan(never.table()[0]["best"])
    never.plot()
    with pytest.raises(DataError, match="metrics are accuracy, auc"):
        SideBySide.of([run("fedavg", 0, [0.5]), run("fedprox", 0, [0.5], metric="auc")])


def test_compare_reads_run_folders(tmp_path, capsys):
    for strategy in ("fedavg", "scaffold"):
        fedlearn.simulate(tiny_study(f"strategy.name={strategy}"), out=tmp_path / strategy)
    plot = tmp_path / "both.png"
    argv = ["compare", str(tmp_path / "fedavg"), str(tmp_path / "scaffold"), "--plot", str(plot)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["strategy", "fedavg", "scaffold"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["metric"], report["along"]) == ("accuracy", "round")
    assert report["groups"][0]["accuracy"] == Run.read(tmp_path / "fedavg").last("accuracy")
    assert main(["compare", str(tmp_path), "--plot", str(plot)]) == 12
    assert main([*argv[:-1], str(tmp_path / "x.what")]) == 12
    (tmp_path / "fedavg" / "history.json").unlink()
    with pytest.raises(StateError, match="history cannot be read"):
        Run.read(tmp_path / "fedavg")


def test_runs_with_and_without_privacy_differ_in_what_it_may_cost():
    plan = ("privacy.unit=record", "privacy.delta=1e-3")
    studies = [(*plan, "privacy.noise_multiplier=1.0"), (*plan, "privacy.noise_multiplier=2.0"), ()]
    found = []
    for over in studies:
        study = tiny_study(*over)
        said = planned(study, rehearsal=True)
        found.append(
            Run("run", study, [{"round": 1, "accuracy": 0.5, "train_loss": None, "seconds": 1.0}], "accuracy", said)
        )
    both = SideBySide.of(found)
    assert both.keys == ("privacy.noise_multiplier",)
    assert [group.values["privacy.noise_multiplier"] for group in both.groups] == [1.0, 2.0, "none"]
    (line,) = both.privacy
    assert all(part in line for part in ("delta 0.001", "unit record", "NOT PRIVATE"))
    one_plan = SideBySide.of([found[0], found[2]])
    assert one_plan.keys == ("privacy.noise_multiplier",), "a reader sees which run is the private one"
    assert SideBySide.of([found[2]]).privacy == ()
