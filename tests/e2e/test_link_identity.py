"""The real apps over the real link, mutual TLS on loopback: the simulation's bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import fedlearn
from client.app import app as client_app
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.learning.runtime import RunRuntime
from fedlearn.release.journal import DictJournal
from server.app import app as server_app
from tests.support.link_net import LinkNet, link_net
from tests.support.runs import Run, to_toml

ROOT = Path(__file__).resolve().parents[2]
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LinkNet]:
    with link_net(tmp_path_factory.mktemp("link"), HOSPITALS, client_app) as net:
        yield net


@pytest.mark.parametrize(
    ("run_id", "overrides"),
    [
        (1, ["rounds=3"]),
        (2, ["rounds=3", "strategy.name=scaffold"]),
        (3, ["rounds=3", "strategy.name=fedadam"]),
        (4, ["rounds=2", "strategy.name=ditto"]),
        (5, ["rounds=3", "strategy.name=median", "cohort.size=3", "update.clip_l2=0.2"]),
        (6, ["rounds=2", "train.precision=float64", "train.optimizer=adam", "train.lr=0.01"]),
    ],
    ids=lambda value: "-".join(value).replace("strategy.name=", "") if isinstance(value, list) else None,
)
def test_the_link_ends_with_the_simulations_bytes(link: LinkNet, run_id, overrides):
    study = fedlearn.load_study(ROOT / "simulations" / "heart.toml", tuple(overrides))
    run, grid = Run(), link.grid(run_id)
    grid.runtime = RunRuntime(
        f"run-{run_id}",
        to_toml(study),
        (),
        run.finished,
        run.events.append,
        DictJournal(),
        lambda: False,
        link.name_of,
    )
    server_app(grid, Context(run_id, 1, {}, RecordDict(), {}))
    expected = fedlearn.simulate(study)
    assert not run.of(events.ClientDropped)
    assert digest(run.model) == digest(expected.weights)
    assert run.of(events.Evaluated)[-1].mean["auc"] == expected.history.final()
    link.server.close_grid(run_id)
