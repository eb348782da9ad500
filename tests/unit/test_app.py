"""An app's folder: which one is loaded, what it holds, and what its digest covers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlearn.app import APP_FOLDERS, App, app_of, load_app, own_root
from fedlearn.errors import StudyError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """Loading an app changes `sys.path`; the test's changes go with it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_checkouts_own_app_is_its_root():
    app = load_app()
    assert (app.root, app.native) == (ROOT, True)
    assert own_root() == ROOT
    assert sys.path[0] == str(ROOT)


def test_loading_again_adds_no_entry():
    load_app()
    before = list(sys.path)
    load_app()
    assert sys.path == before


def test_an_app_of_a_module_is_where_it_was_loaded_from():
    import client.app
    import server.app

    assert app_of(server.app.__file__) == app_of(client.app.__file__) == App(ROOT)


def copied(tmp_path: Path) -> App:
    for folder in APP_FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "app" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return App(tmp_path / "app")


def test_digests_name_the_code_and_not_the_place(tmp_path):
    app = copied(tmp_path)
    digest = app.digest
    assert digest == App(ROOT).digest
    (app.root / "server" / "__pycache__").mkdir()
    (app.root / "server" / "__pycache__" / "app.pyc").write_bytes(b"x")
    (app.root / "notes.py").write_text("outside the app folders")
    assert app.digest == digest
    (app.root / "client" / "extra.py").write_text("")
    added = app.digest
    (app.root / "client" / "extra.py").rename(app.root / "client" / "other.py")
    renamed = app.digest
    (app.root / "client" / "other.py").write_text(" ")
    assert len({digest, added, renamed, app.digest}) == 4


def test_strategies_come_from_the_registry():
    assert App(ROOT).strategy("fedprox", {"mu": 0.5}).options == {"mu": 0.5}
    with pytest.raises(StudyError, match="strategy: got 'fedporx'"):
        App(ROOT).strategy("fedporx", {})


def test_a_study_is_found_as_it_stands_or_among_the_apps_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = App(ROOT)
    assert app.study("simulations/heart.toml") == ROOT / "simulations" / "heart.toml"
    Path("simulations").mkdir()
    Path("simulations/heart.toml").write_text("")
    assert app.study("simulations/heart.toml") == Path("simulations/heart.toml")
    Path("mine.toml").write_text("")
    for name, hint in (
        ("nothing", "the app's own: simulations/blood_smear.toml"),
        ("keybord", "did you mean simulations/keyboard.toml?"),
        ("mine", "did you mean mine.toml?"),
    ):
        with pytest.raises(StudyError, match="no such study file") as caught:
            app.study(name)
        assert hint in caught.value.hint


def test_a_folder_of_tasks_goes_first_on_the_path_of_our_own_app(tmp_path):
    assert load_app(tmp_path) == App(ROOT)
    assert sys.path[:2] == [str(tmp_path), str(ROOT)]


def test_a_foreign_flower_app(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "theirs.server:main"\nclientapp = "theirs.client:main"\n'
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").touch()
    (tmp_path / "theirs" / "server.py").write_text("main = 'a ServerApp'")
    (tmp_path / "theirs" / "client.py").write_text("import no_such_module")
    app = load_app(tmp_path)
    assert (app.root, app.native) == (tmp_path, False)
    assert app.server_app == "a ServerApp"
    with pytest.raises(StudyError, match=r"'theirs\.client:main' cannot be loaded: No module named 'no_such_module'"):
        _ = app.client_app
    before = app.digest
    (tmp_path / "theirs" / "server.py").write_text("main = 'another'")
    assert app.digest != before
    for name in ("theirs", "theirs.server"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    "settings",
    ["", "[tool.flwr]\napp = 3\n", "[tool.flwr.app.components]\nserverapp = 'x:y'\n", "[project]\nname = 'x'\n"],
)
def test_settings_without_a_flower_app_leave_our_own(tmp_path, settings):
    (tmp_path / "pyproject.toml").write_text(settings)
    assert load_app(tmp_path) == App(ROOT)


@pytest.mark.parametrize("settings", [b"[tool", b"\xff\xfe"])
def test_settings_that_cannot_be_read_are_refused(tmp_path, settings):
    (tmp_path / "pyproject.toml").write_bytes(settings)
    with pytest.raises(StudyError, match="cannot be read"):
        load_app(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StudyError, match="no such folder"):
        load_app(tmp_path / "none")


def test_our_own_apps_parts_load():
    assert type(App(ROOT).server_app).__name__ == "ServerApp"
    assert type(App(ROOT).client_app).__name__ == "ClientApp"


def test_importing_fedlearn_loads_nothing_heavy():
    code = "import fedlearn, fedlearn.app, fedlearn.study, sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "flwr", "grpc", "matplotlib", "sklearn"} & set(out.stdout.split())
