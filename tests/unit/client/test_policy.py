"""The site's policy: what it names is admitted, everything else is refused with the rule's name."""

import re
import textwrap
from pathlib import Path

import pytest

from client.policy import MaskRules, SiteRules, load_rules
from fedlearn.errors import PolicyRefusedError, StudyError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import Request
from fedlearn.privacy.budget import Budget
from fedlearn.study import Study, parse_study

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


PRIVATE = """
[privacy]
unit = "record"
epsilon = 2.5
delta = 1e-5
"""
BUDGET = "[budgets.record]\nepsilon = 3.0\ndelta = 1e-5\n"


def private(more: str = "") -> Study:
    return parse_study(f'name = "s"\nrounds = 3\n[task]\nname = "hospital/heart"\n{PRIVATE}{more}')


def grouped(column: str) -> Study:
    more = PRIVATE.replace('"record"', f'"group"\ngroup = "{column}"')
    return parse_study(f'name = "s"\nrounds = 3\n[task]\nname = "hospital/heart"\n{more}')


def rules_of(tmp_path, text: str) -> SiteRules:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return load_rules(path).with_defaults("hospital/heart", "a" * 64)


def test_a_plan_without_a_budget_is_refused_with_lines_that_admit_it(tmp_path):
    with pytest.raises(PolicyRefusedError, match="no budget") as caught:
        rules_of(tmp_path, "").admit(asked(private()))
    lines = caught.value.hint.partition("\n")[2]
    assert rules_of(tmp_path, textwrap.dedent(lines)).admit(asked(private())) == private()
    assert load_rules(tmp_path / "policy.toml").budgets.record.epsilon == 2.5


def test_a_budget_of_another_unit_is_none(tmp_path):
    with pytest.raises(PolicyRefusedError, match="protects each record of 'hospital/heart'"):
        rules_of(tmp_path, BUDGET.replace("record", "client")).admit(asked(private()))


def test_a_server_does_not_choose_what_a_group_is(tmp_path):
    """A study for groups of `visit` protects visits. Charged to the people's account, its epsilon would be of something else."""
    budget = BUDGET.replace("record", "group")
    with pytest.raises(StudyError, match=r"budgets\.group\.column"):
        rules_of(tmp_path, budget)
    rules = rules_of(tmp_path, budget + 'column = "patient"\n')
    people, visits = (grouped(column) for column in ("patient", "visit"))
    assert rules.admit(asked(people)) == people
    with pytest.raises(PolicyRefusedError, match="groups of 'visit', this site's budget is for those of 'patient'"):
        rules.admit(asked(visits))
    with pytest.raises(PolicyRefusedError, match="no budget") as caught:
        rules_of(tmp_path, BUDGET).admit(asked(visits))
    lines = caught.value.hint.partition("\n")[2]
    assert rules_of(tmp_path, textwrap.dedent(lines)).admit(asked(visits)) == visits


def test_a_site_with_a_budget_refuses_what_is_not_counted(tmp_path):
    for seeded in ("", "seeded = true\n"):
        with pytest.raises(PolicyRefusedError, match=r"no \[privacy\]"):
            rules_of(tmp_path, seeded + BUDGET).admit(asked())


def test_rehearsals_are_admitted_where_the_policy_says_so(tmp_path):
    rehearsal = private("seeded = true\n")
    with pytest.raises(PolicyRefusedError, match="rehearsals"):
        rules_of(tmp_path, BUDGET).admit(asked(rehearsal))
    rules = rules_of(tmp_path, "seeded = true\n" + BUDGET)
    assert rules.admit(asked(rehearsal)) == rehearsal
    assert rules.account(rehearsal.privacy) == "hospital/heart/record/seeded"
    assert rules.account(private().privacy) == "hospital/heart/record"
    assert set(rules.accounts()) == {"hospital/heart/record", "hospital/heart/record/seeded"}


def test_the_data_set_names_the_account(tmp_path):
    rules = rules_of(tmp_path, 'dataset = "clinic-7"\n' + BUDGET)
    assert rules.accounts() == {"clinic-7/record": Budget(3.0, 1e-5)}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[budgets.records]\nepsilon = 1.0\ndelta = 1e-5\n", "unknown key 'budgets.records'"),
        ("[budgets.record]\nepsilon = 1.0\ndelta = 1e-5\nsigma = 1.0\n", "unknown key 'budgets.record.sigma'"),
        ("[budgets.record]\nepsilon = 1.0\n", "budgets.record.delta"),
        ("[budgets.record]\nepsilon = 0.0\ndelta = 1e-5\n", "budgets.record.epsilon"),
        ("[budgets.record]\nepsilon = inf\ndelta = 1e-5\n", "budgets.record.epsilon"),
        ("[budgets.record]\nepsilon = 1.0\ndelta = 1.0\n", "budgets.record.delta"),
        ("[budgets.record]\nepsilon = 1.0\ndelta = 0.0\n", "budgets.record.delta"),
        ('[budgets.record]\nepsilon = 1.0\ndelta = 1e-5\nrule = "best"\n', "budgets.record.rule"),
        ("[budgets.record]\nepsilon = 1.0\ndelta = 1e-5\norder = 1.0\n", "budgets.record.order"),
        ("[budgets.record]\nepsilon = 0.001\ndelta = 1e-9\n", "too little for a bound"),
        ('dataset = ""\n', "dataset"),
        ('dataset = "../etc"\n', "dataset"),
        ("budgets = 3\n", "budgets"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_when_it_is_read(tmp_path, text, word):
    with pytest.raises(StudyError, match=re.escape(word)):
        rules_of(tmp_path, text)


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


def masked(more: str = "") -> Study:
    return parse_study(
        f'name = "s"\nrounds = 3\n[task]\nname = "hospital/heart"\n[secure_aggregation]\nenabled = true\n{more}'
    )


@pytest.mark.parametrize("text", ["secure_aggregation = true\n", "[secure_aggregation]\n"])
def test_masks_may_be_insisted_on_by_a_word_or_a_table(tmp_path, text):
    rules = rules_of(tmp_path, text)
    assert rules.secure_aggregation == MaskRules()
    assert rules.admit(asked(masked())) == masked()
    with pytest.raises(PolicyRefusedError, match="under masks only"):
        rules.admit(asked())


@pytest.mark.parametrize("text", ["", "secure_aggregation = false\n", "[secure_aggregation]\nrequired = false\n"])
def test_masks_need_not_be_insisted_on(tmp_path, text):
    rules = rules_of(tmp_path, text)
    for study in (STUDY, masked()):
        assert rules.admit(asked(study)) == study


def test_a_site_may_ask_for_more_than_a_study_assumes(tmp_path):
    rules = rules_of(tmp_path, '[secure_aggregation]\nprofile = "malicious"\nadversarial = 0.2\n')
    with pytest.raises(PolicyRefusedError, match='profile: the study has "semi-malicious"'):
        rules.admit(asked(masked()))
    with pytest.raises(PolicyRefusedError, match=r"adversarial: the study assumes 0.1, this site at least 0.2"):
        rules.admit(asked(masked('profile = "malicious"\n')))
    agreed = masked('profile = "malicious"\nadversarial = 0.25\n')
    assert rules.admit(asked(agreed)) == agreed


def test_reopening_is_the_gates(tmp_path):
    assert not rules_of(tmp_path, "secure_aggregation = true\n").gate().reopen
    assert rules_of(tmp_path, "[secure_aggregation]\nreopen = true\nrequired = false\n").gate().reopen


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[secure_aggregation]\nprofil = 1\n", "did you mean 'profile'?"),
        ("[secure_aggregation]\nx = 1\n", "valid keys: required, profile, adversarial, reopen"),
        (
            "[budgets.record]\nepsillon = 3.0\ndelta = 1e-5\n",
            "did you mean 'epsilon'?",
        ),  # not only that epsilon is missing
        ('[secure_aggregation]\nprofile = "honest"\n', "secure_aggregation.profile"),
        ("[secure_aggregation]\nadversarial = 1.0\n", "secure_aggregation.adversarial"),
        ('secure_aggregation = "yes"\n', "secure_aggregation"),
    ],
)
def test_a_table_of_masks_is_strict(tmp_path, text, word):
    with pytest.raises(StudyError) as caught:
        rules_of(tmp_path, text)
    assert word in f"{caught.value.message} {caught.value.hint}"


def test_the_pages_table_of_masks_is_a_policy(tmp_path):
    page = (Path(__file__).resolve().parents[3] / "docs" / "secure-aggregation.md").read_text()
    (table,) = (block for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "reopen" in block)
    assert rules_of(tmp_path, table).secure_aggregation == MaskRules(profile="malicious", adversarial=0.25)


def test_units_are_not_mixed_unless_the_policy_says_so(tmp_path):
    both = "[budgets.record]\nepsilon = 1.0\ndelta = 1e-5\n[budgets.client]\nepsilon = 1.0\ndelta = 1e-5\n"
    path = tmp_path / "policy.toml"
    path.write_text(both)
    with pytest.raises(StudyError, match="record and client: what a study spends of one unit"):
        load_rules(path)
    path.write_text("mixed_units = true\n" + both)
    assert load_rules(path).budgets.units == ("record", "client")
