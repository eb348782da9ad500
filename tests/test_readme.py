"""The commands that the README and the documentation show are run, and print what is shown, up to numbers.

Blocks marked `federation` need processes that stay: tests/e2e/test_federation.py runs them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from client.policy import SiteRules
from fedlearn.cli import main
from fedlearn.cli.demo import split_by_hospital
from fedlearn.privacy.study import plan_of
from fedlearn.study import parse_study

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```", re.DOTALL)
README = ROOT / "README.md"
WRITING = ROOT / "docs" / "writing-a-task.md"


def blocks(page: Path, kind: str, mark: str | None = None) -> list[str]:
    """Bodies of the fenced blocks of a kind, in order."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [b["body"] for b in found if b["kind"] == kind and (b["mark"] or None) == mark]


def commands(body: str) -> list[tuple[list[str], int, list[str]]]:
    """(arguments, exit code, lines shown) of each `$` line; a comment names an exit code other than 0."""
    found: list[tuple[list[str], int, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            code = re.search(r"# exit code (\d+)", line)
            found.append((shlex.split(line[2:], comments=True), int(code[1]) if code else 0, []))
        else:
            found[-1][2].append(line)
    return found


def skeleton(lines: list[str]) -> list[str]:
    """Text with every number replaced and spaces squeezed, so that times may differ."""
    squeezed = [" ".join(re.sub(r"-?\d+(\.\d+)?", "#", line).split()) for line in lines]
    return [line for line in squeezed if line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as a reader has it after `make demo`, with studies at hand."""
    shutil.copytree(ROOT / "simulations", tmp_path / "simulations")
    files = split_by_hospital(tmp_path / "hospitals")
    shutil.copy(files["cleveland"][0], tmp_path / "patients.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_blocks(capsys, bodies: list[str]) -> int:
    count = 0
    for argv, code, shown in (one for body in bodies for one in commands(body)):
        assert argv[0] == "fedlearn"
        got = main(argv[1:])
        out, err = capsys.readouterr()
        assert got == code, f"{argv}: {err}"
        if shown:
            assert skeleton(shown) == skeleton((err if code else out).splitlines()), argv
        count += 1
    return count


def test_the_readmes_commands(capsys, folder):
    assert run_blocks(capsys, blocks(README, "console")) >= 6
    assert (folder / "runs" / "first" / "model.safetensors").is_file()
    assert (folder / "split.png").is_file()
    assert (folder / "heart.onnx").is_file()


def test_the_numbers_shown_are_the_numbers_printed(capsys, folder):
    """To two digits: other processors round the last ones differently."""
    (argv, _, shown) = commands(blocks(README, "console")[0])[0]
    assert main(argv[1:]) == 0
    printed = capsys.readouterr().out.splitlines()
    for want, got in zip(shown, printed, strict=True):
        if want.startswith("  ") and "." in want:
            keep = slice(3, None) if want.split()[0].isdigit() else slice(1, None)  # a round's seconds may differ
            a, b = ([float(x) for x in line.split()[keep]] for line in (want, got))
            assert a == pytest.approx(b, abs=0.005), (want, got)


def test_the_readmes_python(folder):
    (body,) = blocks(README, "python")
    namespace: dict[str, object] = {}
    exec(body, namespace)
    assert len(namespace["result"].history) == 3
    assert (folder / "runs" / "notebook" / "curve.png").is_file()


def test_the_task_in_the_documentation(capsys, folder):
    for mark, kind in (("file: mytasks/wine.py", "python"), ("file: wine.toml", "toml")):
        path = folder / mark.removeprefix("file: ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(blocks(WRITING, kind, mark)[0])
    assert run_blocks(capsys, blocks(WRITING, "console", "run")) == 2
    assert "accuracy" in (folder / "runs" / "wine" / "history.csv").read_text()


def test_the_commands_of_a_day_of_simulating(capsys, folder):
    """But for the sweep, which tests/e2e/test_sweep.py runs."""
    assert run_blocks(capsys, blocks(ROOT / "docs" / "simulating.md", "console")) == 6
    assert json.loads((folder / "runs" / "profile" / "profile.json").read_text())["clients"] == 30


def test_the_commands_of_privacy(capsys, folder):
    """But for those that need a site, which tests/e2e/test_private_federation.py runs."""
    assert run_blocks(capsys, blocks(ROOT / "docs" / "privacy.md", "console")) == 4
    manifest = json.loads((folder / "runs" / "private" / "manifest.json").read_text())
    assert manifest["privacy"]["epsilon"] == "not private"
    assert (folder / "runs" / "price" / "sweep.json").is_file()


@pytest.mark.parametrize("study", blocks(ROOT / "docs" / "privacy.md", "toml"))
def test_the_tables_of_privacy_are_valid(study):
    if "budgets" in study:
        assert SiteRules.model_validate(tomllib.loads(study)).budgets.record is not None
    else:
        body = f'name = "x"\nrounds = 10\n[task]\nname = "hospital/heart"\n{study}'
        assert plan_of(parse_study(body)) is not None


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_study_in_the_documentation_is_one_and_may_have_the_environment_there():
    from fedlearn.study import parse_study

    study, environment = blocks(ROOT / "docs" / "study.md", "toml")
    assert parse_study(study).strategy.options == {"mu": 0.01}
    both = parse_study(f"{study}\n{environment}".replace("[cohort]\n", "[cohort]\nsize = 3\n"))
    assert both.environment is not None
    assert both.environment.deadline_s == 60.0


def test_every_partition_is_documented():
    from fedlearn.data.partition import partition_names

    text = (ROOT / "docs" / "study.md").read_text()
    assert all(f"| `{name}` |" in text for name in partition_names())
