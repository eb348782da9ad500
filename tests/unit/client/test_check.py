"""`fedlearn client --check`: what a site would answer, before anything is promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from client import check
from client.accounts import Accounts, ledger_folder, signing_key
from client.agent import client_bundle
from client.options import AgentOptions, Finding
from client.policy import load_rules
from fedlearn.link import Role, create_authority, issue
from fedlearn.privacy.budget import spent_epsilon
from fedlearn.privacy.claims import shown
from fedlearn.privacy.events import Cost, Gaussian
from fedlearn.privacy.study import plan_of
from fedlearn.release import TRAIN, Charge, ReleaseKey
from fedlearn.study import load_study
from tests.support.processes import free_ports

POLICY = "[budgets.record]\nepsilon = 1.5\ndelta = 1e-5\n"
STUDY = 'name = "heart"\nrounds = {rounds}\n[task]\nname = "hospital/heart"\n'
RECORD = '[privacy]\nunit = "record"\nnoise_multiplier = 2.0\ndelta = 1e-5\n'
ACCOUNT = "hospital/heart/record"


@pytest.fixture
def options(tmp_path: Path) -> AgentOptions:
    authority = create_authority(tmp_path / "ca")
    tls = issue(authority, "cleveland", Role.CLIENT, tmp_path / "tls")
    (port,) = free_ports(1)
    (tmp_path / "policy.toml").write_text(POLICY)
    return AgentOptions(
        f"127.0.0.1:{port}",
        tls,
        tmp_path / "state",
        "hospital/heart",
        policy=tmp_path / "policy.toml",
        study=tmp_path / "study.toml",
    )


def found(options: AgentOptions, what: str) -> Finding:
    return next(one for one in check.check(options) if one.what == what)


def write(options: AgentOptions, text: str, rounds: int = 2) -> None:
    assert options.study is not None
    options.study.write_text(STUDY.format(rounds=rounds) + text)


def spend(options: AgentOptions, cost: Cost, times: int = 1) -> None:
    bundle, rules = client_bundle(options), load_rules(options.policy).with_defaults("hospital/heart", "a")
    folder = ledger_folder(options.state_dir, "hospital/heart")
    with Accounts(folder, "cleveland", "hospital/heart", signing_key(bundle), rules.accounts()) as accounts:
        for number in range(times):
            accounts.ledger.charge(ReleaseKey("r", number, 1, TRAIN, "m"), Charge(ACCOUNT, cost.to_text()))


def test_the_budget_and_what_is_left_of_it(options):
    assert found(options, "budget").detail == f"{ACCOUNT}: epsilon 0.0000 of 1.5 spent (delta 1e-05)"
    spend(options, Cost(Gaussian(20.0)), 3)
    detail = found(options, "budget").detail
    assert "epsilon 0.000" not in detail
    assert "of 1.5 spent" in detail


def test_a_study_that_fits_and_one_that_the_budget_ends(options):
    write(options, RECORD)
    fits = found(options, "study")
    assert fits.ok
    assert "heart: admitted" in fits.detail
    assert "ends" not in fits.detail
    write(options, RECORD, rounds=50)
    assert "the budget ends it after 2 of its 50 rounds" in found(options, "study").detail


def test_a_study_that_does_not_fit_is_refused_with_the_numbers(options):
    write(options, RECORD)
    spend(options, Cost(Gaussian(3.2)))
    refused = found(options, "study")
    assert not refused.ok
    assert f"its first round would take {ACCOUNT!r} from epsilon" in refused.detail
    assert "the budget is 1.5" in refused.detail


@pytest.mark.parametrize(
    ("text", "word"),
    [("", "no [privacy]"), ('[privacy]\nunit = "client"\nepsilon = 1.0\ndelta = 1e-5\nunits = 10\n', "no budget")],
)
def test_what_the_policy_refuses_is_said(options, text, word):
    write(options, text)
    refused = found(options, "study")
    assert not refused.ok
    assert word in refused.detail
    assert refused.hint


def test_a_delta_that_the_data_forbids(options):
    assert found(options, "data").ok
    assert options.policy is not None
    options.policy.write_text(POLICY.replace("1e-5", "0.004"))
    assert "303 records: expected less than 1/303" in found(options, "data").detail


def test_evaluations_count_and_the_sites_own_rows_are_read_as_the_plan_asks(options):
    write(options, RECORD + "evaluation_noise = 8.0\n")
    assert options.study is not None
    plan = plan_of(load_study(options.study))
    budget = load_rules(options.policy).with_defaults("hospital/heart", "a").accounts()[ACCOUNT]
    assert plan.whole_cost() != plan.cost()
    assert f"to {shown(spent_epsilon([plan.whole_cost()], budget))} of 1.5" in found(options, "study").detail
    options.study.write_text(options.study.read_text() + "units = 2\n")
    assert found(options, "study").ok
    write(options, RECORD.replace("1e-5", "6e-3"))  # met by publishing one training row of 240 at random
    assert "records need less than 1 over their number" in found(options, "study").detail


def test_a_damaged_ledger_is_said(options):
    spend(options, Cost(Gaussian(20.0)), 3)
    file = ledger_folder(options.state_dir, "hospital/heart") / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b"20.0", b"40.0"))
    assert not found(options, "budget").ok
    file.unlink()
    assert not found(options, "budget").ok


def test_what_several_checks_stand_on_is_said_once(options):
    options.policy.write_text("datasett = 'heart'\n")
    wrong = [one for one in check.check(options) if not one.ok]
    assert [one.what for one in wrong if "datasett" in one.detail] == ["policy"]
    assert {one.detail for one in wrong if one.what in {"budget", "study"}} == {"not checked: policy is not in order"}
    assert all(one.exit_code for one in wrong)
