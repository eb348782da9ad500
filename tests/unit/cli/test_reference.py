"""The generated parts of the documentation are what the program says now: `make docs` writes them."""

import pytest

from fedlearn.cli import reference
from fedlearn.study import Study


@pytest.mark.parametrize("path", sorted(reference.pages()), ids=lambda path: path.name)
def test_a_page_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == reference.pages()[path], "run `make docs`"


def test_every_key_of_a_study_is_listed_with_a_text():
    listed = {key: text for key, _, _, text in reference.study_keys()}

    def leaves(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict) and name != "options":
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    environment = {"devices": {"NAME": {}}}
    privacy = {"unit": "record", "epsilon": 1.0, "delta": 1e-5}
    tree = {"name": "x", "rounds": 1, "task": {"name": "y"}, "environment": environment, "privacy": privacy}
    study = Study.model_validate(tree)
    assert set(leaves(study.model_dump())) == set(listed)
    assert [key for key, text in listed.items() if not text] == []
    assert not any("\n" in text for text in listed.values()), "a row of a table is one line"


def test_every_command_has_examples_that_start_with_its_name():
    groups = {(), ("model",), ("data",), ("certs",), ("secagg",), ("privacy",), ("ledger",)}
    for path in reference.command_paths():
        text = reference.help_text(path)
        if path in groups:
            assert "Commands:" in text
            continue
        _, _, examples = text.partition("Examples:\n")
        lines = examples.strip().splitlines()
        assert lines, path
        assert all(line.strip().startswith(f"fedlearn {' '.join(path)}") for line in lines), path
