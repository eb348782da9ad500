"""`fedlearn audit`: what a person and a script see, and the exit code of a refuted claim."""

from __future__ import annotations

import json

import pytest

from fedlearn.cli import main
from fedlearn.cli.audit import _lines
from tests.support.planted import plant_noise
from tests.support.tiny_task import NAME

PRIVATE = """
[privacy]
unit = "record"
noise_multiplier = 2.41
delta = 1e-5
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'name = "tiny"\nseed = 5\nrounds = 3\n[task]\nname = "{NAME}"\n[data]\nfolds = 3\n[train]\nlr = 0.3\n{PRIVATE}'
    )
    return str(path)


def test_an_honest_study(study, capsys, tmp_path):
    picture = tmp_path / "audit.png"
    assert main(["audit", study, "--shadows", "4", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "claim:  epsilon <= 0.9998 at delta 1e-05, unit record" in out
    assert "audit:  epsilon >= 0" in out
    assert "confidence 95.5 %" in out
    assert "the claim is not refuted" in out
    assert "1000 canaries among the records of ada, 30 releases" in out
    assert "membership test on 4 final models, 38 records" in out
    assert "does not prove the claim" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_program_gets_one_object(study, capsys):
    assert main(["audit", study, "--shadows", "0", "--client", "bob", "--json", "--canaries", "200"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["claim"]["epsilon"] == pytest.approx(1.0, abs=1e-3)
    assert found["claim"]["unit"] == "record"
    assert found["audit"]["canaries"] == 200
    assert found["audit"]["confidence"] == 0.95
    assert found["audit"]["epsilon_lower"] < 1.0
    assert found["audit"]["refuted"] is found["refuted"] is False
    assert found["among"] == "bob"
    assert found["membership"] is None
    assert found["no_membership"] == "not asked for"
    assert {row["name"] for row in found["noise"]["by_array"]} == {"weight", "bias", "audit/canaries"}
    assert [row["noise_factor"] for row in found["power"]] == [1.0, 0.5, 0.3, 0.1, 0.0]


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_a_refuted_claim_has_an_exit_code_of_its_own(study, capsys, monkeypatch, tmp_path, factor):
    plant_noise(monkeypatch, factor)
    argv = ["audit", study, "--shadows", "0"]
    assert main([*argv, "--plot", str(tmp_path / "a.png")]) == 16
    out = capsys.readouterr().out
    assert "the claim is REFUTED: these guesses have p = " in out
    assert "too little noise by far more than chance" in out
    assert "audit again with another seed" in out
    assert "found nothing" not in out
    assert main([*argv, "--json"]) == 16
    assert json.loads(capsys.readouterr().out)["audit"]["epsilon_lower"] > 2
    assert main(["exit-codes", "--json"]) == 0
    codes = {row["code"]: row for row in json.loads(capsys.readouterr().out)}
    assert codes[16]["kind"] == "audit"
    assert "refuted" in codes[16]["meaning"]


def test_an_audit_that_can_see_nothing_says_so(study, capsys):
    assert main(["audit", study, "--shadows", "0", "--canaries", "20"]) == 0
    assert "The bound cannot see a build whose noise is ten times too small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--client", "zoe"], 4, "zoe"),
        (["--shadows", "2"], 3, "--shadows"),
        (["--confidence", "1.5"], 3, "--confidence"),
        (["--canaries", "5"], 2, "--canaries"),
        (["--set", "privacy.unit=client", "--set", "privacy.units=4", "--client", "ada"], 14, "--client"),
        (["--plot", "picture.nonsense"], 12, "expected one of .png, .pdf, .svg"),
        (["--plot", "no/such/folder/a.png", "--shadows", "0"], 12, "there is no folder"),
    ],
)
def test_what_cannot_be_audited_is_refused_with_the_reason(study, capsys, options, code, says):
    assert main(["audit", study, *options]) == code
    assert says in capsys.readouterr().err


def test_a_study_without_privacy_has_no_claim(capsys):
    assert main(["audit", "simulations/heart.toml"]) == 3
    err = capsys.readouterr().err
    assert "no privacy" in err
    assert "[privacy]" in err


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys):
    told = _lines(every_s=0.0)
    told(1, 4, "canaries")
    told(4, 4, "canaries")
    assert "canaries: round 1/4; about" in capsys.readouterr().err
