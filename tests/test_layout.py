"""The shape of the house: imports point one way, files are short, and the settings say what they should.

simulations, server, client -> strategies -> fedlearn
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "fedlearn": {"fedlearn"},
    "strategies": {"fedlearn", "strategies"},
    "server": {"fedlearn", "strategies", "server"},
    "client": {"fedlearn", "strategies", "client"},
    "simulations": {"fedlearn", "strategies", "simulations"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks", "protos"}
LONGEST = 450
SOURCES = sorted(p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py") if "_pb2" not in p.name)


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0]
    assert imported(path) & OURS <= MAY_IMPORT[part]


def test_the_check_sees_an_import_that_hides_in_a_function(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from server.app import app\n    import client.agent as agent\n")
    assert imported(file) == {"server", "client"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_wheel_holds_one_package_and_the_apps_as_files():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["packages"] == ["fedlearn"]
    assert set(build["force-include"]) == {"server", "client", "strategies", "simulations"}
    assert all(where.startswith("fedlearn/_app/") for where in build["force-include"].values())


def test_no_dependency_group_is_called_dev():
    # Flower's SuperLink installs a group of that name by itself.
    assert "dev" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]


def test_every_requirement_is_pinned_by_name_and_version_alone():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.]+", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    wanted = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["test"],
        *(r for e in extras for r in e),
    ]
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= {name.lower().replace("_", "-") for name in pins}


def test_ci_runs_what_a_person_runs():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_target_of_the_makefile_stands_in_its_help():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert set(phony) >= {"demo", "test", "check", "bench", "chaos", "protos", "docs", "clean"}
    assert all(f"make {name} " in text for name in phony if name not in {"help", "install"})
