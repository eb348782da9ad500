"""Whatever goes wrong is one message, a hint and an exit code of its own; a traceback only for who asks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fedlearn import errors
from fedlearn.cli import main
from fedlearn.cli.catalogue import exit_code_table
from fedlearn.cli.entry import BROKEN_PIPE_EXIT_CODE
from fedlearn.errors import INTERRUPTED_EXIT_CODE, USAGE_EXIT_CODE, FedlearnError

STUDY = "simulations/heart.toml"
FEDLEARN = [sys.executable, "-m", "fedlearn.cli"]


def run(capsys, *argv):
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "code", "says", "hint"),
    [
        (["simulate", "simulations/hart.toml"], 3, "simulations/hart.toml: no such study", "heart"),
        (["simulate", STUDY, "--set", "train.epoch=3"], 3, "unknown key 'train.epoch'", "did you mean 'epochs'?"),
        (["simulate", STUDY, "--set", "strategy.name=fedprx"], 3, "'fedprx'", "did you mean 'fedprox'?"),
        (["simulate", STUDY, "--data", "nowhere.csv"], 4, "nowhere.csv: no such file", ""),
        (["simulate", STUDY, "--device", "cuda:7"], 14, "'cuda:7' is not on this machine", "--device auto"),
        (["simulate", STUDY, "--app", "nowhere"], 3, "nowhere: no such folder", ""),
        (["simulate", STUDY, "--out", "pyproject.toml"], 12, "is a file, expected a folder", ""),
        (["simulate"], USAGE_EXIT_CODE, "Missing argument 'STUDY'", "fedlearn simulate --help"),
        (["simulate", STUDY, "--rounds", "0"], USAGE_EXIT_CODE, "--rounds", ""),
        (["simulat"], USAGE_EXIT_CODE, "No such command 'simulat'", ""),
        (["runs", "--server", "127.0.0.1:1"], 6, "no certificate given", "FEDLEARN_TLS"),
        (["runs", "--server", "127.0.0.1:1", "--tls", "nowhere"], 6, "nowhere", ""),
        (["data", "show", "hospital/hart"], 3, "unknown task 'hospital/hart'", "hospital/heart"),
        (["data", "show", "vision/digits", "--study", STUDY], 3, "is about task 'hospital/heart'", ""),
        (["data", "show", "tabular/csv", "--plot", "x.png"], 4, "is not here", "bring a CSV"),
        (["model", "predict", "nowhere", "--data", "x.csv"], 12, "nowhere", "fedlearn simulate"),
        (["certs", "issue", "x", "--state", "nowhere"], 6, "no development authority", "fedlearn server"),
    ],
)
def test_bad_input_is_a_message_and_a_code(capsys, monkeypatch, argv, code, says, hint):
    monkeypatch.delenv("FEDLEARN_TLS", raising=False)
    got, out, err = run(capsys, *argv)
    assert got == code
    assert err.startswith("error: ")
    assert says in err
    assert hint in err
    assert "Traceback" not in out + err
    assert not out


def test_a_broken_study_file_names_its_line(capsys, tmp_path):
    study = tmp_path / "bad.toml"
    study.write_text('name = "x"\nrounds = 3\n[task]\nname = "hospital/heart"\n[train]\nepoch = 2\n')
    code, _, err = run(capsys, "simulate", str(study))
    assert code == 3
    assert f"{study}:6: unknown key 'train.epoch'" in err


def test_a_traceback_for_who_asks(capsys):
    code, _, err = run(capsys, "simulate", "nowhere.toml", "--debug")
    assert code == 3
    assert "Traceback" in err
    assert "error: nowhere.toml" in err


def test_a_defect_is_said_without_a_traceback(capsys, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("fedlearn.simulation.run.simulate", broken)
    code, _, err = run(capsys, "simulate", STUDY)
    assert (code, "ZeroDivisionError: boom" in err, "Traceback" in err) == (1, True, False)
    assert "--debug" in err


def test_every_error_class_has_a_row_in_the_table():
    table = {code: kind for code, kind, _ in exit_code_table()}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FedlearnError)]
    assert {c.exit_code for c in classes} <= set(table)
    roots = {c.exit_code: c.kind for c in classes if c.__bases__ == (FedlearnError,)}
    assert len(roots) == len([c for c in classes if c.__bases__ == (FedlearnError,)]), "two kinds share a code"
    assert {table[code] for code in roots} == set(roots.values())


def test_no_arguments_show_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == USAGE_EXIT_CODE
    assert out.startswith("Usage: fedlearn")


def test_help_is_quick_and_loads_nothing_heavy():
    heavy = "torch", "numpy", "matplotlib", "sklearn", "flwr", "grpc", "sqlalchemy", "pydantic", "cryptography"
    code = (
        f"import sys; from fedlearn.cli import main; main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    # 0.1 s on an idle machine; the limit is generous because test machines are not idle
    assert time.monotonic() - start < 2


def test_ctrl_c_finishes_the_round_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [*FEDLEARN, "simulate", STUDY, "--rounds", "100000", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.strip().startswith("2 "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED_EXIT_CODE, err
    first, second = filter(None, err.splitlines())
    assert first == "finishing this round; Ctrl-C again stops at once"
    assert second.startswith("stopped after round")
    assert second.endswith(f"; fedlearn simulate --resume {tmp_path / 'out'} goes on")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    process = subprocess.Popen(
        [*FEDLEARN, "simulate", STUDY, "--rounds", "100000", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in {1, BROKEN_PIPE_EXIT_CODE}
    assert err == b""
