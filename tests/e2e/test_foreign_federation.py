"""Somebody else's Flower App in our processes: a coordinator and two sites started with --app, submitted by an operator."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedlearn import events
from fedlearn.errors import StudyError
from tests.support.federation import ENV, FEDLEARN, Federation
from tests.support.processes import family

FOREIGN = Path(__file__).parent / "foreign_app"

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(params=["plain", "server"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The app; once more with a package that is called as one of ours."""
    folder = tmp_path / "app"
    shutil.copytree(FOREIGN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "plain").rename(folder / request.param)
    # Its clients read the run's config, as most of Flower's examples do, and see in a message what was put there alone.
    client = folder / request.param / "client_app.py"
    asked = 'float(message.content["config"]["lr"])'
    assert asked in client.read_text()
    client.write_text(
        client.read_text().replace(
            asked, 'float(context.run_config["lr"])\n    assert set(message.content) == {"arrays", "config"}'
        )
    )
    settings = folder / "pyproject.toml"
    settings.write_text(settings.read_text().replace('"plain.', f'"{request.param}.'))
    return folder


def test_a_foreign_app_is_submitted_watched_and_run(app: Path, tmp_path: Path):
    out = tmp_path / "result.json"
    with family(tmp_path, ENV) as processes:
        federation = Federation(processes, tmp_path, app=app)
        federation.coordinator()
        for name in ("cleveland", "hungary"):
            federation.site(name)
        with federation.control() as control:
            with pytest.raises(StudyError, match="unknown key 'rounds'"):
                control.submit("rounds = 3", ())
            run = control.submit("num-server-rounds = 2", (f"out={out}", "lr=0.2"))
        found = federation.follow(run)
        assert isinstance(found[-1], events.RunFinished), federation.running["coordinator"].output
        config = tmp_path / "config.toml"
        config.write_text("num-server-rounds = 1\n")
        words = ("--app", str(app), "--server", federation.address, "--tls", str(federation.tls["operator"]))
        submitted = processes.start(*FEDLEARN, "run", str(config), *words)
        assert submitted.wait(60) == 0, submitted.output
        assert "Traceback" not in federation.running["coordinator"].output
        processes.stop()
        assert processes.alive() == []
    result = json.loads(out.read_text())
    assert sorted(result["rounds"]) == ["1", "2"]
    assert result["a"] > 1.9, "the sites were told lr = 0.2; with the app's own 0.1 they come less far"
    assert [result["calls"][n] for n in ("1", "2")] == [1, 2], "a site's state survives between messages"
