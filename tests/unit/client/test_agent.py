"""What an agent refuses before it starts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client.agent import client_bundle, open_accounts, site_rules
from client.options import AgentOptions
from fedlearn.app import load_app, own_root
from fedlearn.errors import StateError, StudyError
from fedlearn.link import Role, create_authority, issue
from fedlearn.privacy.ledger_file import LedgerFolder
from tests.support.private_site import KEY

BUDGET = "[budgets.record]\nepsilon = 1.0\ndelta = 1e-5\n"
FOREIGN = own_root() / "tests" / "e2e" / "foreign_app"


@pytest.fixture
def options(tmp_path: Path) -> AgentOptions:
    tls = issue(create_authority(tmp_path / "ca"), "cleveland", Role.CLIENT, tmp_path / "tls")
    (tmp_path / "policy.toml").write_text(BUDGET)
    return AgentOptions(
        "127.0.0.1:9", tls, tmp_path / "state", "hospital/heart", policy=tmp_path / "policy.toml", device="cpu"
    )


def opened(options: AgentOptions):
    return open_accounts(options, client_bundle(options), site_rules(options, load_app()))


def test_a_foreign_app_is_not_run_on_data_with_a_budget(options, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(StudyError, match="nothing of a foreign app is charged"):
        site_rules(replace(options, app_dir=FOREIGN), load_app(FOREIGN))


def test_a_foreign_app_is_not_run_where_updates_leave_under_masks_only(options, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    options.policy.write_text("secure_aggregation = true\n")
    with pytest.raises(StudyError, match="what a foreign app answers leaves as it is"):
        site_rules(replace(options, app_dir=FOREIGN), load_app(FOREIGN))


def test_a_ledger_of_another_site_keeps_the_agent_from_starting(options):
    LedgerFolder(options.state_dir / "ledgers" / "hospital-heart", "hungary", "hospital/heart", KEY).close()
    with pytest.raises(StateError, match="of site 'hungary'"):
        opened(options)


def test_a_ledger_that_another_agent_holds_keeps_this_one_from_starting(options):
    held = LedgerFolder(options.state_dir / "ledgers" / "hospital-heart", "cleveland", "hospital/heart", KEY)
    try:
        with pytest.raises(StateError, match="ledger's agent"):
            opened(options)
    finally:
        held.close()


def test_without_a_budget_there_is_no_ledger_and_what_was_charged_before_is_said(options, caplog):
    with opened(options) as accounts:
        assert accounts is not None
    with opened(replace(options, policy=None)) as accounts:
        assert accounts is None
    assert "what is asked from now on is not counted" in caplog.text
