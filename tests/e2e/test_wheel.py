"""The wheel by itself: built, installed into an empty environment, and used from another folder.

What fedlearn depends on is borrowed from the environment that runs the tests, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import fedlearn

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder


def used(environment: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed console script, in a folder that has nothing of ours."""
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    return subprocess.run(
        [str(environment / "bin" / "fedlearn"), *arguments],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_fedlearn_lands_in_site_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fedlearn", f"fedlearn-{fedlearn.__version__}.dist-info"}
    assert "fedlearn/_app/server/app.py" in names
    assert "fedlearn/_app/client/app.py" in names
    assert "fedlearn/_app/strategies/fedavg.py" in names
    assert "fedlearn/_app/simulations/heart.toml" in names
    assert "fedlearn/data/files/heart_disease_uci.csv" in names
    assert "fedlearn/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_the_installed_program_simulates_from_any_folder(environment, tmp_path):
    done = used(environment, tmp_path, "simulate", "simulations/heart.toml", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rounds"] == 2
    assert (tmp_path / report["folder"] / "model.safetensors").is_file()
    from fedlearn import arrays

    here = fedlearn.simulate(ROOT / "simulations" / "heart.toml", rounds=2)
    assert report["model_digest"] == arrays.digest(here.weights)


def test_the_installed_program_is_the_wheels(environment, tmp_path):
    python = str(environment / "bin" / "python")
    code = "import fedlearn, fedlearn.app; print(fedlearn.__file__); print(fedlearn.app.own_root())"
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(line.startswith(str(environment)) for line in done.stdout.splitlines()), done.stdout
    assert used(environment, tmp_path, "--version").stdout == f"fedlearn {fedlearn.__version__}\n"
    assert "fedavg" in used(environment, tmp_path, "strategies").stdout


def test_a_task_of_ones_own_needs_a_file_and_a_folder(environment, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.py").write_text(
        "from fedlearn.tasks.digits import DigitsTask\nclass SmallTask(DigitsTask):\n    name = 'small'\n"
    )
    study = 'name = "s"\nrounds = 1\n[task]\nname = "small:SmallTask"\n[data]\npartition = "iid"\nclients = 3\n'
    (tmp_path / "s.toml").write_text(study + "[train]\nmax_steps = 1\n")
    done = used(environment, tmp_path, "simulate", "s.toml", "--app", "mine", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["study"] == "s"
