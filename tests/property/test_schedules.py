"""Random schedules: updates lost, replies in any order, the coordinator dying at any write. The end is the undisturbed run's."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.data.population import build_population
from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Exchange, Failed
from fedlearn.learning.federation import Federation
from fedlearn.learning.local import initial_weights
from fedlearn.learning.messages import RequestEncoder, decode_request
from fedlearn.release.journal import DictJournal
from fedlearn.simulation.sequential import SequentialBackend
from server.rounds import GridBackend
from tests.support.memory_grid import MemoryGrid, nodes_of
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study

LOST = st.sets(st.tuples(st.sampled_from(CLIENTS), st.integers(1, 3), st.integers(1, 3)), max_size=10)
CRASHES = st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=4)


class Crash(BaseException):
    """The coordinator dies."""


class Journal(DictJournal):
    """Dies after so many writes from each start, before or after the last of them is durable."""

    def __init__(self, crashes) -> None:
        super().__init__()
        self._crashes = list(crashes)
        self.restart()

    def restart(self) -> None:
        self._left, self._applied = self._crashes.pop(0) if self._crashes else (0, False)

    def write(self, changes):
        self._left -= 1
        if self._left or self._applied:
            super().write(changes)
        if not self._left:
            raise Crash


def federation(study, backend, journal) -> Federation:
    return Federation(
        study,
        "run",
        load_app().strategy(study.strategy.name, study.strategy.options),
        initial_weights(TinyTask(), study),
        backend,
        journal,
        metric="accuracy",
        emit=lambda event: None,
    )


def end_of(run) -> tuple:
    try:
        outcome = run()
    except RunFailedError as error:
        return ("failed", error.message)
    rows = [{k: v for k, v in row.items() if k not in {"seconds", "dropped"}} for row in outcome.history]
    return digest(outcome.state.model), digest(outcome.state.shared), rows


def undisturbed(study, lost):
    strategy = load_app().strategy(study.strategy.name, study.strategy.options)

    class Losing(SequentialBackend):
        def fit(self, work):
            for reply in super().fit(work):
                gone = (reply.client, work.round, work.attempt) in lost
                yield Failed(reply.client, "lost") if gone else reply

    backend = Losing(study, build_population(study, TinyTask()), strategy)
    return end_of(federation(study, backend, DictJournal()).run)


def disturbed(study, lost, crashes, order):
    name_of = {node: str(one.config["client-id"]) for node, one in nodes_of(CLIENTS).items()}

    def fault(request, reply):
        asked = decode_request(request.content)
        here = (name_of[request.metadata.dst_node_id], asked.round, asked.attempt)
        if asked.exchange is Exchange.TRAIN and here in lost:
            return Message(Error(1, "lost"), reply_to=request)
        return reply

    grid = MemoryGrid(nodes_of(CLIENTS), order, fault)
    journal = Journal(crashes)
    while True:
        backend = GridBackend(grid, RequestEncoder("run", study.to_json(), "app"))
        try:
            return end_of(federation(study, backend, journal).run)
        except Crash:
            journal.restart()


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "ditto", "fedavgm", "median"])
@given(lost=LOST, crashes=CRASHES, order=st.integers(0, 99), size=st.sampled_from([None, 3]))
@settings(max_examples=12, deadline=None)
def test_losses_crashes_and_order(strategy, lost, crashes, order, size):
    limits = ["cohort.minimum=2", "runtime.max_attempts=3", *([] if size is None else [f"cohort.size={size}"])]
    study = tiny_study(f"strategy.name={strategy}", *limits)
    assert disturbed(study, lost, crashes, order) == undisturbed(study, lost)
