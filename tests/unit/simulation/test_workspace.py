"""The run folder while its run goes on: what it refuses, what it says, and what it goes on with."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fedlearn
from fedlearn.arrays import digest
from fedlearn.cli import main
from fedlearn.errors import StateError, StudyError, UnsupportedError
from fedlearn.simulation.workspace import Recorded, Setting, Workspace, mark_of
from tests.support.tiny_task import tiny_study


def stopping_after(rounds):
    asked = iter(range(10_000))
    return lambda: next(asked) >= rounds


def plain(result):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "ditto", "fedadam", "median"])
@pytest.mark.parametrize("extra", [(), ("environment.server_s=2.0", "environment.dropout=0.2")])
def test_a_stopped_run_goes_on_to_the_same_bytes(strategy, extra, tmp_path):
    study = tiny_study(f"strategy.name={strategy}", "rounds=5", *extra)
    alone = fedlearn.simulate(study)
    stopped = fedlearn.simulate(study, out=tmp_path, should_stop=stopping_after(2))
    assert stopped.stopped
    assert len(stopped.history) == 2
    assert json.loads((tmp_path / "manifest.json").read_text())["stopped"] is True
    resumed = fedlearn.simulate(resume=tmp_path)
    assert not resumed.stopped
    assert digest(resumed.weights) == digest(alone.weights)
    assert plain(resumed) == plain(alone)


def test_a_finished_run_gives_its_result_again_and_goes_on_to_more_rounds(tmp_path):
    study = tiny_study("evaluate.every=0", "strategy.name=scaffold")
    first = fedlearn.simulate(study, out=tmp_path)
    seen = []
    again = fedlearn.simulate(resume=tmp_path, emit=seen.append)
    assert digest(again.weights) == digest(first.weights)
    assert [type(event).__name__ for event in seen] == ["RunStarted", "RunFinished"]
    more = fedlearn.simulate(resume=tmp_path, rounds=6)
    assert digest(more.weights) == digest(fedlearn.simulate(study, rounds=6).weights)
    assert Recorded.read(tmp_path).study.rounds == 6


def test_another_study_run_or_folder_is_refused(tmp_path):
    study = tiny_study()
    fedlearn.simulate(study, out=tmp_path / "a")
    with pytest.raises(StateError, match="holds a run already") as caught:
        fedlearn.simulate(study, out=tmp_path / "a")
    assert "--resume" in caught.value.hint
    with pytest.raises(
        StateError, match=r"holds another study: seed is 5, asked for 6, train\.lr is 0\.3, asked for 0\.1"
    ):
        fedlearn.simulate(study, overrides=["seed=6", "train.lr=0.1"], resume=tmp_path / "a")
    with pytest.raises(StateError, match=r"no run\.json"):
        fedlearn.simulate(resume=tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    with pytest.raises(StateError, match="cannot be read"):
        fedlearn.simulate(resume=tmp_path / "b")
    tree = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "b" / "run.json").write_text(json.dumps(tree | {"format": 99}))
    with pytest.raises(StateError, match="its format is 99, expected 1"):
        fedlearn.simulate(resume=tmp_path / "b")


def test_two_processes_do_not_share_a_run(tmp_path):
    with (
        Workspace(tmp_path, tiny_study(), Setting(), "", fresh=True),
        pytest.raises(StateError, match="another process has it open"),
    ):
        Workspace(tmp_path, tiny_study(), Setting(), "", fresh=False)


def test_other_data_is_noticed(tmp_path, monkeypatch):
    from tests.support.tiny_task import TinyTask

    study = tiny_study()
    fedlearn.simulate(study, out=tmp_path, should_stop=stopping_after(1))
    load = TinyTask.load

    def edited(self, source=None):
        examples = load(self, source)
        examples.x[3, 1] += 1
        return examples

    monkeypatch.setattr(TinyTask, "load", edited)
    with pytest.raises(StateError, match="the data is not what the run was started on"):
        fedlearn.simulate(resume=tmp_path)


def test_a_mark_is_of_shapes_types_and_rows():
    from fedlearn.data.population import build_population
    from fedlearn.learning.population import Population
    from fedlearn.learning.task import Examples
    from tests.support.tiny_task import TinyTask

    population = build_population(tiny_study(), TinyTask())
    marks = {mark_of(population)}
    x = np.arange(6.0)
    for one in (x, x.astype(np.float32), x.reshape(3, 2)[:, 0], np.array(list("abcdef"), dtype=object), x[:0]):
        marks.add(mark_of(Population(TinyTask(), Examples(one, np.zeros(len(one))), {}, 0)))
    assert len(marks) == 6


def test_what_never_began_leaves_nothing(tmp_path):
    for study, error in ((tiny_study("cohort.minimum=9"), StudyError), (tiny_study(), UnsupportedError)):
        device = "cuda:99" if error is UnsupportedError else None
        with pytest.raises(error):
            fedlearn.simulate(study, out=tmp_path / "run", device=device)
        assert not list((tmp_path / "run").iterdir())


def test_other_versions_are_said_and_do_not_stop_a_run(tmp_path, capsys):
    fedlearn.simulate(tiny_study(), out=tmp_path, should_stop=stopping_after(1))
    tree = json.loads((tmp_path / "run.json").read_text())
    tree["made_with"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(tree))
    assert main(["simulate", "--resume", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "note: equal bytes are not promised any more: torch 1.0, now" in err
    assert "2 rounds in" in out
    assert main(["simulate", "--resume", str(tmp_path)]) == 0
    assert "it was finished already, after 3 rounds; --rounds N goes on to more" in capsys.readouterr().out
    assert main(["simulate", "--resume", str(tmp_path), "--out", "x"]) == 12
