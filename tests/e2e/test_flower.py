"""The repository's root as a Flower App: built with `flwr build`, run with `flwr run` on a stock SuperLink and four SuperNodes.

Everything happens in a neutral folder: the app is a copy of the app folders alone, `fedlearn` is what is installed (or the checkout, by
PYTHONPATH), each SuperNode has a home of its own, and nothing is installed at run time. The commands are those of docs/flower.md.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fedlearn
from fedlearn.arrays import digest
from fedlearn.report.folder import RunFolder
from tests.support.processes import Family, Logged, family, free_ports
from tests.test_readme import blocks

ROOT = Path(__file__).resolve().parents[2]
APP_FOLDERS = ("server", "client", "strategies", "simulations")
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
PAGE = ROOT / "docs" / "flower.md"

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@dataclass(frozen=True)
class Flower:
    """A stock Flower deployment that runs."""

    folder: Path
    processes: Family
    superlink: Logged

    @property
    def app(self) -> Path:
        return self.folder / "fedlearn-app"

    def flwr(self, *arguments: str) -> Logged:
        """Start the `flwr` command as a user would, in the app's folder."""
        return self.processes.start(program("flwr"), *arguments, cwd=self.app)

    def runs(self) -> dict[str, str]:
        """Status by run id."""
        listing = self.flwr("list", "--format", "json")
        assert listing.wait(60) == 0, listing.output
        return {run["run-id"]: run["status"] for run in json.loads(listing.output)["runs"]}


def program(name: str) -> str:
    """A command of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def copy_app(target: Path) -> Path:
    """The app folders and pyproject.toml, as a user would copy them."""
    target.mkdir(parents=True)
    for folder in APP_FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


def environment(home: Path) -> dict[str, str]:
    """A bare environment: no network use of Flower's own, no installs, one thread. Flower's home is ~/.flwr."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "PYTHONPATH": str(Path(fedlearn.__file__).parents[1]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def session(folder: Path, block: int, ports: dict[str, str]) -> list[tuple[dict[str, str], list[str]]]:
    """(variables, command) of each line of a console block of docs/flower.md, on free ports and in a folder of the test's own."""
    found = []
    for line in blocks(PAGE, "console")[block].splitlines():
        text = line.removeprefix("$ ").replace("/tmp/", f"{folder}/")
        for shown, free in ports.items():
            text = text.replace(shown, free)
        words = shlex.split(text)
        if words[0] == "export":
            assert all(environment(folder)[name] == value for name, _, value in (w.partition("=") for w in words[1:]))
            continue
        count = next(i for i, word in enumerate(words) if "=" not in word)
        found.append((dict(word.split("=", 1) for word in words[:count]), words[count:]))
    return found


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """The page's console session: a SuperLink and one SuperNode a hospital, on loopback, without TLS."""
    folder = tmp_path_factory.mktemp("flower")
    copy_app(folder / "fedlearn-app")
    shown = ["8000", *(str(9094 + i) for i in range(len(HOSPITALS)))]
    ports = dict(zip(shown, map(str, free_ports(len(shown))), strict=True))
    (config,) = blocks(PAGE, "toml")
    (folder / "home" / ".flwr").mkdir(parents=True)
    (folder / "home" / ".flwr" / "config.toml").write_text(config.replace("8000", ports["8000"]))
    with family(folder, environment(folder / "home")) as processes:
        ((_, command),) = session(folder, 0, ports)
        superlink = processes.start(program(command[0]), *command[1:])
        superlink.wait_for("Uvicorn running on", timeout_s=60)
        nodes = session(folder, 1, ports)
        assert len(nodes) == len(HOSPITALS)
        for variables, command in nodes:
            processes.start(program(command[0]), *command[1:], **variables)
        superlink.wait_for("Activated node_id", count=len(nodes), timeout_s=60)
        yield Flower(folder, processes, superlink)


def test_build_takes_the_app_folders_and_nothing_else(tmp_path):
    """From the whole repository: `flwr build` refuses a pattern without a file, and what is bundled is exactly the app."""
    home = tmp_path / "home"
    home.mkdir()
    with family(tmp_path, environment(home)) as processes:
        build = processes.start(program("flwr"), "build", "--app", str(ROOT))
        assert build.wait(60) == 0, build.output
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.name.startswith(f"fedlearn.fedlearn.{fedlearn.__version__.replace('.', '-')}.")
    names = {name for name in zipfile.ZipFile(bundle).namelist() if not name.startswith(".info/")}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in APP_FOLDERS
        for path in (ROOT / folder).rglob("*.toml" if folder == "simulations" else "*.py")
    }
    assert names == expected | {"pyproject.toml"}


@pytest.mark.timeout(280)
def test_flower_ends_with_the_simulations_bytes(flower: Flower):
    """Three runs at once, so that their messages interleave: the page's, one whose clients keep state, one with cohorts."""
    from_page, simulated, compared = (command for _, command in session(flower.folder, 2, {}))
    others = {
        "scaffold": "rounds=2 evaluate.every=0 strategy.name=scaffold",
        "fedadam": "rounds=2 evaluate.every=0 strategy.name=fedadam cohort.size=2",
    }
    commands = [flower.flwr(*from_page[1:])]
    for name, overrides in others.items():
        config = f'overrides="{overrides}" out="{flower.folder / name}"'
        commands.append(flower.flwr("run", ".", "--stream", "--run-config", config))
    for command in commands:
        assert command.wait(250) == 0, command.output
        assert '"event":"RunFinished"' in command.output, f"{command.output}\n{flower.superlink.output}"
    assert set(flower.runs().values()) == {"finished:completed"}
    for name, overrides in others.items():
        folder = RunFolder(flower.folder / name)
        expected = fedlearn.simulate(ROOT / "simulations" / "heart.toml", overrides=overrides.split())
        assert folder.study() == expected.study
        assert digest(folder.weights()) == digest(expected.weights), name
    fedlearn_command = flower.processes.start(sys.executable, "-m", "fedlearn.cli", *simulated[1:], cwd=flower.app)
    assert fedlearn_command.wait(60) == 0, fedlearn_command.output
    cmp = flower.processes.start(*compared)
    assert (cmp.wait(10), cmp.output) == (0, "")
    folders = [RunFolder(flower.folder / name) for name in ("heart", "heart-simulated")]
    rows = [json.loads((folder.path / "history.json").read_text())[-1] for folder in folders]
    assert rows[0]["auc"] == rows[1]["auc"]
    assert "rehearsal" in json.loads((folders[0].path / "manifest.json").read_text())["runtime"]


@pytest.mark.timeout(280)
def test_masked_rounds_on_flower_end_with_the_simulations_bytes(flower: Flower):
    """Each exchange finds other processes: a node's keys are in its state between them."""
    overrides = "rounds=2 evaluate.every=0 secure_aggregation.enabled=true"
    config = f'overrides="{overrides}" out="{flower.folder / "masked"}"'
    command = flower.flwr("run", ".", "--stream", "--run-config", config)
    assert command.wait(250) == 0, command.output
    assert command.output.count('"event":"RoundFinished"') == 2, f"{command.output}\n{flower.superlink.output}"
    assert '"event":"ClientDropped"' not in command.output
    expected = fedlearn.simulate(ROOT / "simulations" / "heart.toml", overrides=overrides.split())
    assert digest(RunFolder(flower.folder / "masked").weights()) == digest(expected.weights)


def test_the_app_ran_from_its_bundle(flower: Flower):
    """What ran was the bundle's copy of the app folders, and the package beside it was the installed one."""
    bundles = list((flower.folder / "home" / ".flwr" / "apps").glob("fedlearn.fedlearn.*/server/app.py"))
    assert bundles, "the SuperLink unpacked no bundle"
    assert not any((bundle.parents[1] / "fedlearn").exists() for bundle in bundles)


@pytest.mark.timeout(120)
def test_a_wrong_study_fails_the_run_with_its_message(flower: Flower):
    command = flower.flwr("run", ".", "--stream", "--run-config", 'overrides="trian.lr=1"')
    command.wait(90)
    assert "unknown key 'trian'" in command.output
    assert "finished:failed" in flower.runs().values()
