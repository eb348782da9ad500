"""Runs of the ServerApp with everything that a coordinator lends it, in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, RecordDict

from fedlearn.arrays import Array, from_bytes
from fedlearn.events import Event
from fedlearn.learning.runtime import RunRuntime
from fedlearn.link import LinkGrid
from fedlearn.release.journal import DictJournal, Journal
from fedlearn.study import Study, study_from_json
from server.app import app as server_app
from tests.support.link_net import LinkNet
from tests.support.memory_grid import RUN_ID, MemoryGrid


@dataclass
class Finished:
    """`Checkpoints` that only keep the end."""

    model: dict[str, Array] | None = None
    study: Study | None = None

    def load(self):
        return None

    def save(self, round_, attempt, arrays, facts):
        raise AssertionError("the loop checkpoints through its journal")

    def finish(self, model, facts):
        self.model, self.study = from_bytes(model), study_from_json(facts["study"])


@dataclass
class Run:
    """What a run left behind."""

    finished: Finished = field(default_factory=Finished)
    events: list[Event] = field(default_factory=list)

    @property
    def model(self) -> dict[str, Array]:
        assert self.finished.model is not None, "the run ended without a model"
        return self.finished.model

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


def run_server_app(
    study: Study,
    grid: MemoryGrid,
    journal: Journal | None = None,
    client_name: Callable[[int], str] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    run: Run | None = None,
    authority_pem: bytes = b"",
) -> Run:
    """Run the real ServerApp on a study to its end."""
    run = run if run is not None else Run()
    named = {node: str(one.config["client-id"]) for node, one in grid.nodes.items()}
    grid.runtime = RunRuntime(
        "run-1",
        to_toml(study),
        (),
        run.finished,
        run.events.append,
        journal if journal is not None else DictJournal(),
        should_stop,
        client_name if client_name is not None else named.__getitem__,
        authority_pem=authority_pem,
    )
    server_app(grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
    return run


def run_on_link(
    link: LinkNet,
    number: int,
    study: Study,
    seen: Callable[[Event], object] | None = None,
    *,
    journal: Journal | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    run: Run | None = None,
    grid: LinkGrid | None = None,
    **lent: Any,
) -> Run:
    """Run the ServerApp over a link in this thread.

    Args:
        seen: is told each event.
        run: takes events and model, for who looks at them when the run fails.
        grid: of that number, for who has it already.
        lent: more of `RunRuntime`.
    """
    run, grid = run if run is not None else Run(), grid if grid is not None else link.grid(number)

    def emit(event: Event) -> None:
        run.events.append(event)
        if seen is not None:
            seen(event)

    journal = journal if journal is not None else DictJournal()
    grid.runtime = RunRuntime(
        *(f"run-{number}", to_toml(study), (), run.finished, emit, journal, should_stop, link.name_of), **lent
    )
    try:
        server_app(grid, Context(number, 1, {}, RecordDict(), {}))
    finally:
        link.server.close_grid(number)
    return run


def to_toml(study: Study) -> str:
    """A study as TOML text: every value of its JSON but null is TOML too."""
    lines = []
    for key, value in json.loads(study.to_json()).items():
        lines += _lines(key, value)
    return "\n".join(sorted(lines, key=lambda line: line.count(".")))


def _lines(key: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [line for name, item in value.items() for line in _lines(f"{key}.{name}", item)]
    return [f"{key} = {json.dumps(value)}"]
