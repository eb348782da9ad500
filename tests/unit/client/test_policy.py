"""The site's policy: what it names is admitted, everything else is refused with the rule's name."""

import re
from pathlib import Path

import pytest

from client.policy import SiteRules, load_rules
from fedlearn.errors import PolicyRefusedError, StudyError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import Request
from fedlearn.study import parse_study

STUDY = parse_study('name = "s"\nrounds = 3\n[task]\nname = "hospital/heart"\n')


def asked(study=STUDY, app="a" * 64):
    return Request("run", Exchange.TRAIN, study.to_json(), app)


def test_the_defaults_admit_the_named_task_and_the_installed_app_only():
    rules = SiteRules().with_defaults("hospital/heart", "a" * 64)
    assert rules.admit(asked()) == STUDY


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        (SiteRules(tasks=("bank/fraud",)), "tasks"),
        (SiteRules(strategies=("scaffold",)), "strategies"),
        (SiteRules(apps=("b" * 64,)), "apps"),
        (SiteRules(max_rounds=2), "max_rounds"),
        (SiteRules(seeded=False), "seeded"),
    ],
)
def test_each_rule_refuses_by_name(rules, word):
    with pytest.raises(PolicyRefusedError, match=word):
        rules.with_defaults("hospital/heart", "a" * 64).admit(asked())


def test_a_manifest_that_is_no_study_is_refused():
    with pytest.raises(StudyError):
        SiteRules().with_defaults("t", "a").admit(Request("run", Exchange.TRAIN, "{}", "a"))


def test_a_policy_file_is_strict(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('tasks = ["hospital/heart"]\nmax_rounds = 50\n')
    assert load_rules(path) == SiteRules(tasks=("hospital/heart",), max_rounds=50)
    path.write_text("max_round = 50\n")
    with pytest.raises(StudyError, match="unknown key 'max_round'"):
        load_rules(path)
    path.write_text("max_rounds = 0\n")
    with pytest.raises(StudyError, match="max_rounds"):
        load_rules(path)
    with pytest.raises(StudyError, match="cannot be read"):
        load_rules(tmp_path / "none.toml")


def test_the_operators_page_lists_every_key():
    page = (Path(__file__).resolve().parents[3] / "docs" / "operating.md").read_text()
    section = page.split("### The site's policy")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(SiteRules.model_fields)
