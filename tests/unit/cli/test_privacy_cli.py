"""`fedlearn privacy plan`, `fedlearn check-model` and `fedlearn ledger`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.cli import main
from fedlearn.cli.privacy import ENFORCED, ON_PAPER
from fedlearn.privacy.budget import Budget
from fedlearn.privacy.events import Cost, Gaussian
from fedlearn.privacy.ledger_file import LEDGER_FILE, LedgerFolder
from fedlearn.privacy.ledger_head import HEAD_FILE
from fedlearn.privacy.statement import statement
from fedlearn.privacy.study import plan_of
from fedlearn.release import TRAIN, Charge, ReleaseKey
from fedlearn.study import load_study, parse_study

HEART = "simulations/heart.toml"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SHARED = """
[privacy]
unit = "client"
mechanism = "distributed"
epsilon = 8
delta = 1e-2
units = 4
clip_l2 = 0.5
surplus = true
[secure_aggregation]
enabled = true
max_clients = 4
"""


def answer(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_budget_becomes_noise_and_every_claim_is_whole(capsys):
    found = answer(
        capsys,
        "privacy",
        "plan",
        HEART,
        "--epsilon",
        "3",
        "--units",
        "200",
        "--delta",
        "1e-4",
        "--rate",
        "0.1",
        "--rounds",
        "4",
    )
    assert 3 - 1e-4 <= found["accountants"][0]["epsilon"] <= 3 <= found["accountants"][1]["epsilon"]
    assert found["enforced"] is False
    assert {c["adversary"] for c in found["claims"]} == {"server", "other sites", "reader of the model"}
    assert all(
        c["unit"] == "record" and c["neighbours"] == "add-or-remove-one" and c["delta"] == 1e-4 for c in found["claims"]
    )
    epsilons = [point["epsilon"] for point in found["curve"]]
    assert epsilons == sorted(epsilons)
    assert found["curve"][-1]["round"] == 4
    by = {one["what"]: one["epsilon"] for one in found["what_if"]}
    assert by["noise x 2"] < by["rounds x 0.5"] < by["the plan"] < by["rounds x 2"] < by["noise x 0.5"]


def test_noise_that_clients_add_holds_against_the_server_too(capsys, tmp_path):
    path = tmp_path / "shared.toml"
    path.write_text(f'name = "s"\nrounds = 10\n[task]\nname = "hospital/heart"\n{SHARED}')
    found = answer(capsys, "privacy", "plan", str(path))
    assert {claim["epsilon"] for claim in found["claims"]} == {found["statement"]["epsilon"]}
    assert 8 - 1e-4 <= found["statement"]["epsilon"] <= 8
    assert found["plan"]["shares"] == {
        "clients": 4,
        "survivors": 3,
        "adversarial": 0.1,
        "dropout": 0.1,
        "surplus": True,
        "malicious": False,
    }
    assert main(["privacy", "plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert "against reader of the model, other sites, server: 8.0000" in text
    assert "at least 2 honest clients add their noise" in text
    assert (
        "each client adds 1/2 of its variance before its update is masked, sums of fewer than 3 clients are not opened"
        in text
    )
    assert "4 together leave a variance 1.33 times as large" in text


def test_central_noise_says_infinite_against_the_server(capsys):
    argv = [
        "privacy",
        "plan",
        HEART,
        "--unit",
        "client",
        "--units",
        "1000",
        "--noise",
        "4",
        "--rate",
        "0.01",
        "--rounds",
        "10",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert any(line.startswith("  against server: infinite") for line in out.splitlines())
    assert ON_PAPER in out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--units", "200", "--rate", "0.1"], 2, "--epsilon"),
        (["--units", "200", "--rate", "0.1", "--epsilon", "3", "--noise", "1"], 2, "--epsilon"),
        (["--noise", "3", "--unit", "client"], 3, "privacy.units: missing"),
        (["--noise", "3", "--unit", "group"], 3, "name the column"),
        (["--noise", "3", "--unit", "group", "--group", "ward"], 14, "does not say whose each row is"),
        (["--units", "200", "--epsilon", "0", "--rate", "0.1"], 3, "epsilon"),
        (["--units", "200", "--epsilon", "-1", "--rate", "0.1"], 3, "epsilon"),
        (["--units", "200", "--epsilon", "3", "--rate", "0.1", "--delta", "1"], 3, "delta"),
        (["--units", "200", "--epsilon", "3", "--rate", "0.1", "--delta", "0.01"], 3, "less than 1/200"),
        (["--units", "200", "--epsilon", "3", "--rate", "1.1"], 3, "sampling_rate"),
        (
            ["--units", "200", "--noise", "1", "--rate", "0.1", "--unit", "client", "--set", "strategy.name=median"],
            14,
            "not linear",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(capsys, options, code, says):
    assert main(["privacy", "plan", HEART, *options]) == code
    assert says in capsys.readouterr().err


def test_a_study_without_privacy_is_told_what_to_add(capsys):
    assert main(["privacy", "plan", HEART]) == 3
    told = capsys.readouterr().err
    table = told[told.rindex("[privacy]") : told.index("or ask")].replace("\n    ", "\n")
    assert plan_of(parse_study(Path(HEART).read_text() + "\n" + table)) is not None


PRIVATE = """
name = "own"
rounds = 5
[task]
name = "hospital/heart"
[evaluate]
every = 2
[privacy]
unit = "record"
epsilon = 3
delta = 1e-4
"""


def test_the_studys_own_table_is_the_plan_that_is_enforced(capsys, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(PRIVATE)
    found = answer(capsys, "privacy", "plan", str(path))
    plan = plan_of(load_study(path))
    assert found["enforced"] is True
    assert found["notice"] == ENFORCED
    assert found["plan"]["noise_multiplier"] == plan.noise_multiplier
    assert found["statement"] == json.loads(json.dumps(statement(plan, seeded=False)))
    assert found["alone"].keys() == {"training"}
    other = answer(capsys, "privacy", "plan", str(path), "--noise", "2")
    assert (other["enforced"], other["notice"], other["plan"]["noise_multiplier"]) == (False, ON_PAPER, 2.0)
    assert other["plan"]["delta"] == 1e-4, "what no option says is the study's"


def test_evaluations_are_in_the_epsilon_of_every_round(capsys, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(PRIVATE + "evaluation_noise = 6\n")
    assert main(["privacy", "plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "and 3 evaluations of test rows by noisy sums, noise multiplier 6.0000: in this epsilon too" in out
    assert ENFORCED in out
    found = answer(capsys, "privacy", "plan", str(path), "--rounds", "4")
    alone = found["alone"]
    assert max(alone["training"], alone["2 evaluations"]) < found["accountants"][0]["epsilon"] <= 3
    path.write_text(PRIVATE + "evaluation_noise = 1\n")
    assert main(["privacy", "plan", str(path)]) == 3
    assert "3 evaluations alone cost epsilon" in capsys.readouterr().err


def test_a_picture_is_drawn(capsys, tmp_path):
    argv = [
        "privacy",
        "plan",
        HEART,
        "--noise",
        "3",
        "--units",
        "200",
        "--rate",
        "0.1",
        "--delta",
        "1e-4",
        "--rounds",
        "3",
    ]
    assert main([*argv, "--plot", str(tmp_path / "e.png")]) == 0
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main([*argv, "--plot", str(tmp_path / "nowhere" / "e.png")]) == 12


def test_the_heart_model_can_train_privately(capsys):
    assert answer(capsys, "check-model", HEART)["path"] == "fast"


def test_a_model_that_cannot_says_why_and_how(capsys, tmp_path, monkeypatch):
    (tmp_path / "batchy.py").write_text(
        "from fedlearn.tasks.digits import DigitsTask\n"
        "from torch import nn\n"
        "class Batchy(DigitsTask):\n"
        "    name = 'batchy:Batchy'\n"
        "    def model(self):\n"
        "        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check-model", "simulations/digits.toml", "--set", "task.name=batchy:Batchy"]) == 14
    out = capsys.readouterr().out
    assert "record-level privacy: no" in out
    assert "- BatchNorm2d(4" in out
    assert "+ GroupNorm(4, 4" in out
    assert "other outputs" in out
    assert "rewritten so, it can train" in out


def test_a_fused_model_is_rewritten_and_compared(capsys, tmp_path, monkeypatch):
    (tmp_path / "fused.py").write_text(
        "import torch\n"
        "from fedlearn.tasks.digits import DigitsTask\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.cell, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.cell(x.reshape(len(x), 8, 8))[0][:, -1])\n"
        "class Fused(DigitsTask):\n"
        "    name = 'fused:Fused'\n"
        "    def model(self):\n"
        "        return Net()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["check-model", "simulations/digits.toml", "--set", "task.name=fused:Fused"]
    assert main([*argv, "--out", str(tmp_path / "model.diff")]) == 14
    out = capsys.readouterr().out
    assert "same outputs" in out
    assert "trainable numbers: 1834 before, 1770 after" in out
    assert "return fedlearn.privacy.rewrite(model).model" in out
    diff = (tmp_path / "model.diff").read_text()
    assert "-  (cell): LSTM(8, 16, batch_first=True)" in diff
    assert "+  (cell): Recurrent(" in diff
    assert main([*argv, "--json"]) == 14
    found = json.loads(capsys.readouterr().out)
    assert found["difference_of_equal_changes"] < 1e-6
    assert found["ok_when_rewritten"]
    assert found["findings_when_rewritten"] == []
    assert main([*argv, "--out", str(tmp_path / "nowhere" / "x")]) == 12


@pytest.fixture
def folder(tmp_path):
    with LedgerFolder(tmp_path / "heart", "cleveland", "heart", KEY) as ledger:
        ledger.note_budgets({"heart/record": Budget(3.0, 1e-5)})
        charge = Charge("heart/record", Cost(Gaussian(10.0)).to_text())
        ledger.charge(ReleaseKey("r", 1, 1, TRAIN, "m"), charge)
        ledger.refuse(ReleaseKey("r", 2, 1, TRAIN, "m"), charge, "budget", "no")
        (tmp_path / "head.json").write_text(ledger.head().to_text())
    return tmp_path / "heart"


def test_a_ledger_is_shown_while_its_agent_runs(capsys, folder):
    held = LedgerFolder(folder, "cleveland", "heart", KEY)
    try:
        (account,) = answer(capsys, "ledger", "show", str(folder))["accounts"]
    finally:
        held.close()
    assert (account["account"], account["charges"], account["refusals"]) == ("heart/record", 1, 1)
    assert 0 < account["epsilon"] <= 3.0
    assert account["budget"]["epsilon"] == 3.0
    assert main(["ledger", "show", str(folder)]) == 0
    assert "heart/record" in capsys.readouterr().out


def test_an_agents_state_folder_shows_every_ledger(capsys, tmp_path):
    assert main(["ledger", "show", str(tmp_path)]) == 12
    assert "[budgets]" in capsys.readouterr().err
    for name in ("heart", "blood"):
        with LedgerFolder(tmp_path / "ledgers" / name, "cleveland", name, KEY) as ledger:
            ledger.note_budgets({f"{name}/record": Budget(3.0, 1e-5)})
    found = answer(capsys, "ledger", "show", str(tmp_path))["ledgers"]
    assert [one["data_set"] for one in found] == ["blood", "heart"]
    assert main(["ledger", "show", str(tmp_path)]) == 0
    assert "data set heart" in capsys.readouterr().out
    assert main(["ledger", "verify", str(tmp_path)]) == 12
    places = [str(tmp_path / "ledgers" / name) for name in ("blood", "heart")]
    assert f"name the ledger's folder: {' or '.join(places)}" in " ".join(capsys.readouterr().err.split())


def test_verify_tells_a_sound_ledger_from_another(capsys, folder):
    head = str(folder.parent / "head.json")
    assert main(["ledger", "verify", str(folder), "--head", head]) == 0
    out = capsys.readouterr().out
    assert "4 records" in out
    assert "compared with the remembered head, at record 3 and the agent's own head, at record 3" in out
    file = folder / LEDGER_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.rstrip(b"\n").rfind(b"\n") + 1])
    assert main(["ledger", "verify", str(folder)]) == 12
    assert "records were cut off" in capsys.readouterr().out
    (folder / HEAD_FILE).unlink()
    assert main(["ledger", "verify", str(folder)]) == 0  # shorter, and whole: only a head can tell
    assert "no head to compare with" in capsys.readouterr().out
    assert main(["ledger", "verify", str(folder), "--head", head]) == 12
    file.write_bytes(whole.replace(b"heart/record", b"heart/rekord"))
    assert main(["ledger", "verify", str(folder), "--json"]) == 12
    assert main(["ledger", "show", str(folder)]) == 12
    assert main(["ledger", "verify", str(folder.parent / "nothing")]) == 12
    assert main(["ledger", "verify", str(folder), "--head", str(file)]) == 12


def test_an_auditor_gets_every_record(capsys, folder, tmp_path):
    out = tmp_path / "out.json"
    assert main(["ledger", "export", str(folder), "--out", str(out)]) == 0
    capsys.readouterr()
    document = json.loads(out.read_text())
    assert [r["kind"] for r in document["records"]] == ["open", "budgets", "charge", "refusal"]
    assert document["accounts"][0]["charges"] == 1
    assert main(["ledger", "export", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert main(["ledger", "export", str(folder), "--out", str(tmp_path / "no" / "x")]) == 12
