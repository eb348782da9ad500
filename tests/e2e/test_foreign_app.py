"""Somebody else's Flower App, unmodified, over our link: Flower's own strategy, a ClientApp in numpy, and client state."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedlearn.app import App, load_app
from tests.support.link_net import link_net

FOLDER = Path(__file__).parent / "foreign_app"

pytestmark = pytest.mark.e2e


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """The app, loaded as `--app DIR` loads one; its modules are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield load_app(FOLDER)
    for name in [name for name in sys.modules if name.partition(".")[0] == "plain"]:
        del sys.modules[name]


def test_flowers_fedavg_over_our_link(foreign: App, tmp_path: Path):
    assert not foreign.native
    out = tmp_path / "result.json"
    with link_net(tmp_path, ("ada", "bob", "cyd"), foreign.client_app) as link:
        nodes = link.server.connected()
        context = Context(5, 1, {}, RecordDict(), {"num-server-rounds": 4, "lr": 0.2, "out": str(out)})
        foreign.server_app(link.grid(5), context)
    result = json.loads(out.read_text())
    client = importlib.import_module("plain.client_app")
    a = b = 0.0
    for _ in range(4):
        ends = []
        for node in nodes:
            x, y = client.points(node)
            p, q = a, b
            for _ in range(client.STEPS):
                p, q = p - 0.4 * ((p * x + q - y) * x).mean(), q - 0.4 * (p * x + q - y).mean()
            ends.append((p, q))
        a, b = (sum(e[i] for e in ends) / len(ends) for i in (0, 1))
    assert (result["a"], result["b"]) == pytest.approx((a, b), rel=1e-9)
    assert result["a"] == pytest.approx(2, abs=0.05)
    assert result["b"] == pytest.approx(-1, abs=0.05)
    assert [result["calls"][str(n)] for n in (1, 2, 3, 4)] == [1, 2, 3, 4], "each client's state survived its messages"
    assert result["rounds"]["4"]["mse"] < 1e-3
