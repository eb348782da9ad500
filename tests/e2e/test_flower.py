"""The repository's root as a Flower App: built with `flwr build`, run with `flwr run` on a stock SuperLink and four SuperNodes.

Everything happens in a neutral folder: the app is a copy of the app folders alone, `fedlearn` is what is installed (or the checkout, by
PYTHONPATH), each of Flower's processes has a home of its own, and nothing is installed at run time.
"""

from __future__ import annotations

import json
import os
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

ROOT = Path(__file__).resolve().parents[2]
APP_FOLDERS = ("server", "client", "strategies", "simulations")
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
CONNECTION = "rehearsal"

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
        listing = self.flwr("list", CONNECTION, "--format", "json")
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
    """A bare environment: no network use of Flower's own, no installs, one thread."""
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
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    """A SuperLink and one SuperNode a hospital, on loopback, without TLS."""
    folder = tmp_path_factory.mktemp("flower")
    copy_app(folder / "fedlearn-app")
    home = folder / "home"
    (home / "flwr").mkdir(parents=True)
    port, *node_ports = free_ports(1 + len(HOSPITALS))
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with family(folder, environment(home)) as processes:
        superlink = processes.start(
            program("flower-superlink"),
            "--insecure",
            "--disable-runtime-dependency-installation",
            *("--host", "127.0.0.1", "--port", str(port)),
        )
        superlink.wait_for("Uvicorn running on", timeout_s=60)
        for hospital, node_port in zip(HOSPITALS, node_ports, strict=True):
            processes.start(
                program("flower-supernode"),
                "--insecure",
                *("--superlink", f"127.0.0.1:{port}", "--port", str(node_port)),
                *("--node-config", f'client-id="{hospital}"'),
                FLWR_HOME=str(folder / hospital),
            )
        superlink.wait_for("Activated node_id", count=len(HOSPITALS), timeout_s=60)
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
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".toml"}
    }
    assert names == expected | {"pyproject.toml"}


@pytest.mark.timeout(280)
def test_flower_ends_with_the_simulations_bytes(flower: Flower):
    """Three runs at once, so that their messages interleave: one with scores, one whose clients keep state, one with cohorts."""
    studies = {
        "fedavg": "rounds=1",
        "scaffold": "rounds=2 evaluate.every=0 strategy.name=scaffold",
        "fedadam": "rounds=2 evaluate.every=0 strategy.name=fedadam cohort.size=2",
    }
    commands = {
        name: flower.flwr(
            "run", ".", CONNECTION, "--stream", "--run-config", f'overrides="{overrides}" out="{flower.folder / name}"'
        )
        for name, overrides in studies.items()
    }
    for name, command in commands.items():
        assert command.wait(240) == 0, command.output
        assert '"event":"RunFinished"' in command.output, f"{name}: {command.output}\n{flower.superlink.output}"
    assert set(flower.runs().values()) == {"finished:completed"}
    for name, overrides in studies.items():
        folder = RunFolder(flower.folder / name)
        expected = fedlearn.simulate(ROOT / "simulations" / "heart.toml", overrides=overrides.split())
        assert folder.study() == expected.study
        assert digest(folder.weights()) == digest(expected.weights), name
        manifest = json.loads((folder.path / "manifest.json").read_text())
        assert "rehearsal" in manifest["runtime"]
    rows = json.loads((flower.folder / "fedavg" / "history.json").read_text())
    simulated = fedlearn.simulate(ROOT / "simulations" / "heart.toml", overrides=studies["fedavg"].split())
    assert rows[-1]["auc"] == simulated.history.final()


def test_the_app_ran_from_its_bundle(flower: Flower):
    """What ran was the bundle's copy of the app folders, and the package beside it was the installed one."""
    bundles = list((flower.folder / "home" / "flwr" / "apps").glob("fedlearn.fedlearn.*/server/app.py"))
    assert bundles, "the SuperLink unpacked no bundle"
    assert not any((bundle.parents[1] / "fedlearn").exists() for bundle in bundles)


@pytest.mark.timeout(120)
def test_a_wrong_study_fails_the_run_with_its_message(flower: Flower):
    command = flower.flwr("run", ".", CONNECTION, "--stream", "--run-config", 'overrides="trian.lr=1"')
    command.wait(90)
    assert "unknown key 'trian'" in command.output
    assert "finished:failed" in flower.runs().values()
