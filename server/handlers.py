"""What people ask of the coordinator, answered from its store."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedlearn import events
from fedlearn.errors import StateError
from fedlearn.learning.checkpoint import checkpoint_key, model_in
from fedlearn.link.control import ModelFile, RunDetail, RunSummary
from fedlearn.link.tls import Identity, Role
from server.history import committed_rounds
from server.records import RunRow, RunStatus
from server.redaction import UNTOLD, event_for_site, hides_cohorts, row_for_site
from server.run_state import RunJournal

if TYPE_CHECKING:
    from server.coordinator import Coordinator
    from server.store import Store

MODEL_FILE: Final = "model.safetensors"
MOST_REFUSED: Final = 100
"""Clients whose refusals are shown of one run."""
STOP_WAIT_S: Final = 5.0
"""How long an answer to `stop` waits for the round to end, so that it can say what became of the run."""
_ENDED_EARLY: Final = (RunStatus.STOPPED, RunStatus.FAILED)
"""What such a run committed is paid for, and is its model."""


class Handlers:
    """`fedlearn.link.control.ControlHandlers`. A client sees the runs that it took part in; an operator sees all."""

    def __init__(self, coordinator: Coordinator, store: Store, models: Path) -> None:
        self._coordinator, self._store, self._models = coordinator, store, models
        self._writing = asyncio.Lock()

    async def submit(self, caller: Identity, study: str, overrides: Sequence[str]) -> str:
        return await self._coordinator.submit(study, overrides, caller.uri)

    async def stop(self, caller: Identity, run_id: str) -> RunSummary:
        row = await self._find(caller, run_id)
        return _summary(await self._coordinator.stop_run(row.run, STOP_WAIT_S))

    async def runs(self, caller: Identity) -> Sequence[RunSummary]:
        return [_summary(row) for row in await asyncio.to_thread(self._visible, caller)]

    async def show(self, caller: Identity, run_id: str) -> RunDetail:
        row = await self._find(caller, run_id)
        return RunDetail(_summary(row), json.dumps(await asyncio.to_thread(self._detail, caller, row)))

    async def watch(self, caller: Identity, run_id: str, start: int) -> AsyncIterator[tuple[int, str]]:
        row = await self._find(caller, run_id)
        hidden = await asyncio.to_thread(self._hides, caller, row.run)
        async for number, line in self._coordinator.event_log.watch(row.run, start):
            if caller.role is not Role.OPERATOR:
                event, wall_s = events.from_json(line)
                hidden |= isinstance(event, events.PrivacyStated) and hides_cohorts(event.statement)
                shown = event_for_site(event) if hidden else event
                if shown is None:
                    continue
                line = events.to_json(shown, wall_s)  # noqa: PLW2901  # what is yielded
            yield number, line

    async def model(self, caller: Identity, run_id: str) -> ModelFile:
        row = await self._find(caller, run_id)
        path = self._models / f"{row.run}.safetensors"
        async with self._writing:
            if not await asyncio.to_thread(path.exists):
                await asyncio.to_thread(self._export, row, path)
        return ModelFile(path, MODEL_FILE)

    async def _find(self, caller: Identity, run_id: str) -> RunRow:
        """The run of that id, or the only one whose id starts so."""
        found = [r for r in await asyncio.to_thread(self._visible, caller) if run_id and r.run.startswith(run_id)]
        if len(found) != 1:
            many = f"{len(found)} runs begin so" if found else "no such run"
            raise StateError(f"run {run_id!r}: {many}", hint="`fedlearn runs` lists them")
        return found[0]

    def _visible(self, caller: Identity) -> list[RunRow]:
        rows = self._store.runs()
        if caller.role is Role.OPERATOR:
            return rows
        mine = self._store.runs_of(caller.name)
        return [row for row in rows if row.run in mine]

    def _hides(self, caller: Identity, run: str) -> bool:
        return caller.role is not Role.OPERATOR and hides_cohorts(self._privacy(run))

    def _detail(self, caller: Identity, row: RunRow) -> dict[str, Any]:
        _, started = next(self._found(row.run, "RunStarted", limit=1), (0, None))
        rows, hidden = committed_rounds(RunJournal(self._store, row.run), row.run), self._hides(caller, row.run)
        return {
            "study": row.study,
            "overrides": list(row.overrides),
            "submitter": row.submitter,
            "reason": UNTOLD if hidden and row.reason else row.reason,
            "ended_at": row.ended_at,
            "stop_asked": row.stop_asked,
            "metric": started.metric if isinstance(started, events.RunStarted) else None,
            "privacy": self._privacy(row.run),
            "refused": {} if hidden else self._refused(row.run),
            "clients": [] if hidden else sorted(self._store.participants(row.run)),
            "history": [row_for_site(one) for one in rows] if hidden else rows,
        }

    def _privacy(self, run: str) -> dict[str, Any] | None:
        """What the run said last of its privacy: its cost, once it has ended, else its promise."""
        _, found = next(self._found(run, "PrivacyStated", newest=True, limit=1), (0, None))
        return dict(found.statement) if isinstance(found, events.PrivacyStated) else None

    def _refused(self, run: str) -> dict[str, str]:
        """Who refused the run, or the rest of it, and why; but for those that refused it first and then began it."""
        found = [
            *self._found(run, "ClientRefused", having='"final":true', limit=MOST_REFUSED),
            *self._found(run, "ClientDropped", having='"refused":true', limit=MOST_REFUSED),
        ]
        start, began_with = 0, frozenset[str]()
        for number, event in self._found(run, "RunStarted", limit=1):
            if isinstance(event, events.RunStarted):
                start, began_with = number, frozenset(event.clients)
        return {
            event.client: event.reason
            for number, event in found
            if isinstance(event, events.ClientRefused | events.ClientDropped)
            and (number > start or event.client not in began_with)
        }

    def _found(
        self, run: str, kind: str, *, limit: int, having: str = "", newest: bool = False
    ) -> Iterator[tuple[int, events.Event]]:
        for number, line in self._store.events_of(run, kind, limit=limit, having=having, newest=newest):
            yield number, events.from_json(line)[0]

    def _export(self, row: RunRow, path: Path) -> None:
        data = self._store.load_model(row.run)
        if data is None and row.status in _ENDED_EARLY:
            state = RunJournal(self._store, row.run).get(checkpoint_key(row.run))
            data = None if state is None else model_in(state)
        if data is None:
            raise StateError(
                f"run {row.run}: it is {row.status.value} and has no model",
                hint="a run that ends has one if it committed a round",
            )
        path.parent.mkdir(exist_ok=True, mode=0o700)
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        os.replace(partial, path)  # noqa: PTH105  # the atomic one, by its usual name


def _summary(row: RunRow) -> RunSummary:
    return RunSummary(row.run, row.name, row.status.value, row.round, row.rounds, row.submitted_at)
