"""A client whose code raises: the round goes on without it, and everything that is known of it is written down."""

from __future__ import annotations

import json
import logging

import pytest

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.cli import main
from fedlearn.errors import RunFailedError, WorkerCrashedError
from fedlearn.report.folder import RunFolder
from fedlearn.simulation.failures import ClientFailure
from tests.support.raising_task import NAME, ROWS_OF_BOB, RaisingTask
from tests.support.tiny_task import tiny_study

BACKEND = "sequential"


def raising(where: str, *overrides: str):
    # fold 1: bob's marked row is one of its training rows
    fold = "data.fold=0" if where == "metrics" else "data.fold=1"
    return tiny_study(f"task.name={NAME}", f"task.options={{where='{where}'}}", fold, *overrides)


@pytest.fixture(scope="module")
def bob_is_in(request):
    """The folds in which bob's marked row trains, and in which it tests."""
    from fedlearn.data.population import build_population

    found = {}
    for fold in range(3):
        study = tiny_study(f"data.fold={fold}")
        data = build_population(study, RaisingTask(where="nowhere")).client("bob")
        found.setdefault("train" if 77.0 in data.train.x else "test", fold)
    return found


@pytest.mark.parametrize("backend", ["sequential", "batched"])
@pytest.mark.parametrize(("where", "error"), [("loss", "ZeroDivisionError"), ("prepare", "KeyError")])
def test_the_others_go_on_and_the_client_is_described(backend, where, error, bob_is_in, tmp_path):
    seen, told = [], []
    study = raising(where, f"data.fold={bob_is_in['train']}")
    result = fedlearn.simulate(study, out=tmp_path, backend=backend, emit=seen.append, told=told.append)
    assert result.history.column("clients") == [3, 3, 3]
    dropped = [event for event in seen if isinstance(event, events.ClientDropped)]
    assert {event.client for event in dropped} == {"bob"}
    file = tmp_path / "errors" / "round-0002-train-bob.txt"
    assert error in dropped[1].reason
    assert str(file) in dropped[1].reason
    report = file.read_text()
    assert "client    bob\nround     2\nexchange  train\n" in report
    assert f"rows      {len(ROWS_OF_BOB)}: {', '.join(map(str, ROWS_OF_BOB))}\n" in report
    assert "raising_task.py" in report
    assert [one.client for one in told if one.exchange == "train"] == ["bob"] * 3
    assert error in told[0].excerpt()


def test_scoring_may_raise_too(bob_is_in, tmp_path):
    told: list[ClientFailure] = []
    study = raising("metrics", f"data.fold={bob_is_in['test']}", "rounds=1")
    result = fedlearn.simulate(study, out=tmp_path, backend=BACKEND, told=told.append)
    assert "bob" not in result.history.clients
    assert [(one.client, one.exchange, one.inline_round) for one in told] == [("bob", "evaluate", 2)]


def test_strict_ends_the_run_and_without_a_folder_the_log_says_it(bob_is_in, caplog):
    study = raising("loss", f"data.fold={bob_is_in['train']}")
    with pytest.raises(WorkerCrashedError, match="client 'bob' raised in round 1: ZeroDivisionError: bob's loss"):
        fedlearn.simulate(study, backend=BACKEND, strict=True)
    with caplog.at_level(logging.ERROR, logger="fedlearn.simulation"):
        fedlearn.simulate(study, backend=BACKEND, rounds=1)
    assert "raising_task.py" in caplog.text


def test_a_strict_run_goes_on_when_the_code_is_mended(bob_is_in, tmp_path, monkeypatch):
    study = raising("nowhere", f"data.fold={bob_is_in['train']}")
    loss, calls = RaisingTask.loss, iter(range(100))

    def late(self, outputs, y):
        if next(calls) > 15:
            raise RuntimeError("a late defect")
        return loss(self, outputs, y)

    monkeypatch.setattr(RaisingTask, "loss", late)
    with pytest.raises(WorkerCrashedError, match="in round 2"):
        fedlearn.simulate(study, out=tmp_path, backend=BACKEND, strict=True)
    monkeypatch.setattr(RaisingTask, "loss", loss)
    mended = fedlearn.simulate(resume=tmp_path, strict=True)
    assert digest(mended.weights) == digest(fedlearn.simulate(study, backend=BACKEND).weights)


def test_a_run_that_fails_leaves_the_model_that_it_had(bob_is_in, tmp_path, monkeypatch):
    study = raising("nowhere", f"data.fold={bob_is_in['train']}", "cohort.minimum=4", "runtime.max_attempts=1")
    loss, calls = RaisingTask.loss, iter(range(100))

    def late(self, outputs, y):
        if next(calls) > 15:
            raise RuntimeError("a late defect")
        return loss(self, outputs, y)

    monkeypatch.setattr(RaisingTask, "loss", late)
    with pytest.raises(RunFailedError) as caught:
        fedlearn.simulate(study, out=tmp_path / "run", backend=BACKEND)
    assert caught.value.hint.endswith(f"the model of round 1, the last that was committed, is in {tmp_path / 'run'}")
    monkeypatch.setattr(RaisingTask, "loss", loss)
    first = fedlearn.simulate(study, rounds=1, backend=BACKEND)
    folder = RunFolder(tmp_path / "run")
    assert digest(folder.weights()) == digest(first.weights)
    assert "round 2 was void" in json.loads((tmp_path / "run" / "manifest.json").read_text())["failed"]


def test_a_client_with_many_rows_and_any_name_has_a_bounded_report():
    failure = ClientFailure("../x", 1, "train", "E: e", "trace", tuple(range(200)), 1000)
    assert failure.report().count(",") == 200
    assert "and 800 more" in failure.report()


def study_file(folder, study):
    lines = [f'name = "{study.name}"', f"seed = {study.seed}", f"rounds = {study.rounds}"]
    for table in ("task", "data", "train", "strategy"):
        lines.append(f"[{table}]")
        for key, value in study.model_dump()[table].items():
            if isinstance(value, dict):
                lines.append(f"{key} = {{ {', '.join(f'{k} = {json.dumps(v)}' for k, v in value.items())} }}")
            elif value is not None:
                lines.append(f"{key} = {json.dumps(value)}")
    path = folder / "study.toml"
    path.write_text("\n".join(lines))
    return str(path)


def test_the_terminal_shows_where_and_strict_has_its_exit_code(bob_is_in, tmp_path, capsys):
    path = study_file(tmp_path, raising("loss", f"data.fold={bob_is_in['train']}"))
    argv = ["simulate", path, "--backend", BACKEND, "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "round 1: bob is out: ZeroDivisionError: bob's loss (traceback in" in out
    assert "client bob raised in round 1 (train):" in err
    assert "raising_task.py" in err
    assert main([*argv[:-1], str(tmp_path / "strict"), "--strict"]) == 13
    assert "--inline bob --round 1 runs it under a debugger" in capsys.readouterr().err


def test_inline_opens_a_debugger_where_the_client_raises(bob_is_in, tmp_path, capsys, monkeypatch):
    import io

    path = study_file(tmp_path, raising("loss", f"data.fold={bob_is_in['train']}"))
    monkeypatch.setattr("sys.stdin", io.StringIO("p y.shape\nq\n"))
    assert main(["simulate", path, "--backend", BACKEND, "--inline", "bob", "--round", "2"]) == 13
    out, err = capsys.readouterr()
    assert "ZeroDivisionError: bob's loss" in err
    assert "running rounds 1 to 1 again for the model of round 2" in err
    assert "torch.Size" in out


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_inline_trains_as_the_run_does(strategy, tmp_path, capsys):
    """The same loss as the run's own event says, with the model from the run folder, or made again."""
    study, losses = tiny_study(f"strategy.name={strategy}", "rounds=3", "cohort.wait_for=1"), {}

    def note(event):
        if isinstance(event, events.ClientFinished):
            losses[event.round, event.client] = event.facts["loss"]

    fedlearn.simulate(study, emit=note, backend=BACKEND)
    fedlearn.simulate(study, rounds=2, out=tmp_path / "run", backend=BACKEND)
    path = study_file(tmp_path, study)
    capsys.readouterr()
    for argv in (["--resume", str(tmp_path / "run")], [path, "--round", "3"]):
        assert main(["simulate", *argv, "--backend", BACKEND, "--inline", "cyd"]) == 0
        out, err = capsys.readouterr()
        assert f"trained  loss {losses[3, 'cyd']:.4g}" in out
        assert ("again" in err) == ("--round" in argv)
    assert main(["simulate", path, "--inline", "cid"]) == 4
    assert "did you mean 'cyd'?" in capsys.readouterr().err
