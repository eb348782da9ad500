from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedlearn.errors import StateError
from fedlearn.lock import FolderLock

ROOT = Path(__file__).resolve().parents[2]


def test_one_holder_at_a_time_and_the_other_is_told_who(tmp_path: Path):
    with (
        FolderLock(tmp_path / "state", "a coordinator"),
        pytest.raises(StateError, match="in use by a coordinator, process"),
    ):
        FolderLock(tmp_path / "state", "an agent")
    FolderLock(tmp_path / "state", "an agent").release()


def test_a_killed_holder_holds_nothing(tmp_path: Path):
    code = "import sys, os, signal\nfrom pathlib import Path\nfrom fedlearn.lock import FolderLock\nFolderLock(Path(sys.argv[1]), 'x')\nos.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    FolderLock(tmp_path, "the next one").release()


def test_a_folder_that_cannot_be_made_is_a_state_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used"):
        FolderLock(tmp_path / "file" / "state", "x")


def test_the_folder_is_its_owners_alone(tmp_path: Path):
    FolderLock(tmp_path / "state", "x").release()
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
