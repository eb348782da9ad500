"""Secure aggregation over the real link, mutual TLS on loopback: the simulation's bytes, whatever drops out or is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.learning.backend import Exchange
from fedlearn.learning.runtime import RunRuntime
from fedlearn.release.journal import DictJournal
from server.app import app as server_app
from tests.support.desk_site import DeskSites
from tests.support.link_net import link_net
from tests.support.runs import Run, to_toml

ROOT = Path(__file__).resolve().parents[2]
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
MASKED = ("secure_aggregation.enabled=true", "rounds=3")

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def sites():
    return DeskSites("hospital/heart")


@pytest.fixture(scope="module")
def link(tmp_path_factory, sites):
    with link_net(tmp_path_factory.mktemp("link"), HOSPITALS, handler_of=sites.handler) as net:
        yield net


@pytest.fixture(autouse=True)
def calm(request):
    if "sites" in request.fixturenames:
        request.getfixturevalue("sites").meets = lambda *_asked: None


RUNS = iter(range(1, 1000))


def run_over(link, *overrides, journal=None, emit=None, run_id=None):
    study = fedlearn.load_study(ROOT / "simulations" / "heart.toml", (*MASKED, *overrides))
    run, number = Run(), run_id or next(RUNS)
    grid = link.grid(number)

    def heard(event):
        run.events.append(event)
        if emit is not None:
            emit(event)

    grid.runtime = RunRuntime(
        f"run-{number}",
        to_toml(study),
        (),
        run.finished,
        heard,
        journal if journal is not None else DictJournal(),
        lambda: False,
        link.name_of,
        authority_pem=link.authority_pem,
    )
    try:
        server_app(grid, Context(number, 1, {}, RecordDict(), {}))
    finally:
        link.server.close_grid(number)
    return run


def simulated(*overrides):
    return fedlearn.simulate(ROOT / "simulations" / "heart.toml", overrides=(*MASKED, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("strategy.name=scaffold",),
        ("strategy.name=fedadam", "update.clip_l2=0.3"),
        ("secure_aggregation.ring_bits=24",),
    ],
    ids=["fedavg", "scaffold", "fedadam", "24 bits"],
)
def test_the_link_ends_with_the_simulations_bytes(link, overrides):
    run = run_over(link, *overrides)
    assert not run.of(events.ClientDropped)
    assert digest(run.model) == digest(simulated(*overrides).weights)
