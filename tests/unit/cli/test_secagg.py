"""`fedlearn secagg plan`."""

from __future__ import annotations

import json

import pytest

from fedlearn.cli import main
from fedlearn.cli.secagg import _time

PLAN = ["secagg", "plan", "--clients", "100", "--adversarial", "0.1", "--dropout", "0.1", "--parameters", "1.7e6"]


def test_the_plan_of_the_documentation(capsys):
    assert main(PLAN) == 0
    shown = capsys.readouterr().out
    for line in ("56 of 100", "44 of 100", "6.81 MB (1.00 of float32", "server and 12 clients, lying", "complete"):
        assert line in shown


def test_times_are_numbers_that_people_read():
    assert [_time(t) for t in (0.0000012, 0.0044, 0.131, 0.999, 1.24, 640.2)] == [
        "0.0012 ms",
        "4.4 ms",
        "131 ms",
        "999 ms",
        "1.2 s",
        "640 s",
    ]


def test_json(capsys):
    assert main([*PLAN, "--ring-bits", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == {"clients": 100, "degree": 99, "holders": 100, "threshold": 56, "adversarial": 10}
    assert found["bits"]["ring"] == 24
    assert found["sizes"]["vector"] == 3 * 1_700_001
    assert found["coalitions"] == {"allowed": 10, "lying": 12, "looking": 56}
    assert all(value > 0 for value in found["seconds"].values())


@pytest.mark.parametrize("suite", ["x25519-aes256", "x25519-chacha20", "p256-aes256"])
@pytest.mark.parametrize("profile", ["semi-malicious", "malicious"])
def test_every_suite_and_profile(capsys, suite, profile):
    argv = ["secagg", "plan", "--clients", "4", "--parameters", "100", "--suite", suite, "--profile", profile]
    assert main(argv) == 0
    assert "3 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (["--clients", "2"], 3, "nothing to protect"),
        (["--clients", "20000"], 3, "10000"),
        (["--parameters", "1.5"], 3, "whole number"),
        (["--ring-bits", "16", "--value-bits", "16"], 3, "could wrap"),
        (["--weight-cap", "100000000"], 3, "weights up to"),
        (["--adversarial", "1.5"], 3, "adversarial"),
        (["--dropout", "0.6"], 14, "not possible"),
        (["--profile", "honest"], 2, "semi-malicious"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(capsys, changes, code, says):
    assert main([*PLAN, *changes]) == code
    shown = capsys.readouterr().err
    assert says in shown


def test_a_sparse_graph_always_has_its_agreement(capsys):
    assert main(["secagg", "plan", "--clients", "300", "--parameters", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exchanges"] == 4
    assert found["parameters"]["degree"] < 299
