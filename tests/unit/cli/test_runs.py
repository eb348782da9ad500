"""What an operator asks of a coordinator, over the real control service."""

import json
import os
import signal
import subprocess
import sys

import pytest

import fedlearn
from fedlearn import arrays
from fedlearn.cli import main
from fedlearn.errors import INTERRUPTED_EXIT_CODE
from fedlearn.report.folder import RunFolder
from tests.support.rehearsal import rehearsal

STUDY = "simulations/heart.toml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with rehearsal(tmp_path_factory.mktemp("rehearsal")) as found:
        yield found


def ask(capsys, place, *argv, code=0):
    got = main([*argv, *place.arguments])
    out, err = capsys.readouterr()
    assert got == code, err
    return err if code else out


def test_a_run_is_watched_and_its_model_fetched(capsys, place, tmp_path):
    out = ask(capsys, place, "run", STUDY, "--rounds", "2", "--out", str(tmp_path / "model"))
    rows = [line.split()[:2] for line in out.splitlines()]
    assert ["1", "4"] in rows
    assert ["2", "4"] in rows
    assert "va-long-beach" in out
    folder = RunFolder(tmp_path / "model")
    expected = fedlearn.simulate(STUDY, rounds=2)
    assert arrays.digest(folder.weights()) == arrays.digest(expected.weights)
    assert folder.study() == expected.study
    assert (tmp_path / "model" / "history.csv").read_text() == _without_seconds(expected, tmp_path)


def _without_seconds(expected, tmp_path):
    """The expected history with the seconds of the one that was fetched: they are not the same run's."""
    from fedlearn.report.history import History

    fetched = json.loads((tmp_path / "model" / "history.json").read_text())
    rows = [dict(row) | {"seconds": got["seconds"]} for row, got in zip(expected.outcome.history, fetched, strict=True)]
    return History(rows, "auc").to_csv()


def test_json_says_how_it_ended(capsys, place):
    report = json.loads(ask(capsys, place, "run", STUDY, "--rounds", "1", "--json"))
    assert (report["status"], report["rounds"], len(report["history"])) == ("finished", 1, 1)
    assert set(report["clients"]) == {"cleveland", "hungary", "switzerland", "va-long-beach"}


def test_a_detached_run_is_listed_shown_and_watched(capsys, place):
    run_id = ask(capsys, place, "run", STUDY, "--rounds", "1", "--detach").strip()
    watched = ask(capsys, place, "watch", run_id)
    assert "1 rounds in" in watched
    assert run_id in ask(capsys, place, "runs")
    listed = json.loads(ask(capsys, place, "runs", "--json"))
    assert listed[0] | {"run_id": run_id, "status": "finished", "round": 1, "rounds": 1} == listed[0]
    assert "finished, round 1 of 1" in ask(capsys, place, "show", run_id)
    assert json.loads(ask(capsys, place, "show", run_id, "--json"))["submitter"] == "operator"


def test_overrides_travel_with_the_study(capsys, place, tmp_path):
    folder = tmp_path / "model"
    ask(capsys, place, "run", STUDY, "--rounds", "1", "--set", "train.lr=0.05", "--out", str(folder))
    assert RunFolder(folder).study().train.lr == 0.05


def test_a_simulated_environment_is_ignored_aloud(capsys, place):
    assert main(["run", STUDY, "--set", "environment.dropout=0.5", "--rounds", "1", "--detach", *place.arguments]) == 0
    assert "[environment] is for simulations and is ignored" in capsys.readouterr().err


def test_a_study_is_refused_before_anything_is_sent(capsys, place):
    known = len(place.handlers.runs_by_id)
    assert "unknown key" in ask(capsys, place, "run", STUDY, "--set", "train.epoch=1", code=3)
    assert len(place.handlers.runs_by_id) == known


def test_an_unknown_run_is_the_coordinators_own_error(capsys, place):
    err = ask(capsys, place, "show", "run-999", code=12)
    assert err == "error: no run 'run-999'\nhint:  fedlearn runs lists them\n"


def test_no_site_yet(capsys, place):
    assert ask(capsys, place, "nodes") == "no site has connected yet\n"
    assert json.loads(ask(capsys, place, "nodes", "--json")) == []


def test_a_certificate_of_another_authority_is_refused(capsys, place, tmp_path):
    from fedlearn.cli.certs import coordinator_bundles

    coordinator_bundles(tmp_path, ())
    code = main(["runs", "--server", place.address, "--tls", str(tmp_path / "tls" / "operator")])
    assert code == 6
    assert "certificate" in capsys.readouterr().err


def test_a_sites_certificate_may_not_submit(capsys, place, tmp_path):
    assert main(["certs", "issue", "cleveland", "--state", str(place.state), "--out", str(tmp_path / "c")]) == 0
    assert main(["run", STUDY, "--server", place.address, "--tls", str(tmp_path / "c")]) == 10
    assert "operator" in capsys.readouterr().err


def test_nobody_there(capsys, place):
    code = main(["runs", "--server", "127.0.0.1:1", "--tls", str(place.state / "tls" / "operator")])
    assert (code, "cannot be reached" in capsys.readouterr().err) == (7, True)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none(capsys, place, address):
    code = main(["runs", "--server", address, "--tls", str(place.state / "tls" / "operator")])
    assert (code, "expected HOST:PORT" in capsys.readouterr().err) == (7, True)


def test_ctrl_c_detaches_and_the_run_goes_on(capsys, tmp_path):
    with rehearsal(tmp_path, hold_after=3) as place:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedlearn.cli", "run", STUDY, "--rounds", "2", *place.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for line in process.stdout:
            if line.split()[:1] == ["round"]:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == INTERRUPTED_EXIT_CODE
        assert err == "detached: run run-1 goes on; `fedlearn watch run-1` shows it again\n"
        place.handlers.let_go()
        assert "2 rounds in" in ask(capsys, place, "watch", "run-1")


def test_a_stopped_run_says_so(capsys, tmp_path):
    with rehearsal(tmp_path, hold_after=3) as place:
        run_id = ask(capsys, place, "run", STUDY, "--rounds", "2", "--detach").strip()
        assert "stopped" in ask(capsys, place, "stop", run_id)
        assert f"run {run_id} was stopped" in ask(capsys, place, "watch", run_id)
        assert "no model" in ask(capsys, place, "model", "get", run_id, "--out", str(tmp_path / "m"), code=12)
