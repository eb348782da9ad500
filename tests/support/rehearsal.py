"""A coordinator without sites: the real control service over mutual TLS, whose runs are simulations in this process.

For tests of what operators see. What a real coordinator does is tested with real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlearn import arrays, events
from fedlearn.cli.certs import coordinator_bundles
from fedlearn.errors import StateError
from fedlearn.link.control import ModelFile, RunDetail, RunSummary
from fedlearn.link.server import LinkServer
from fedlearn.link.tls import TlsBundle
from fedlearn.simulation.run import simulate
from fedlearn.study import parse_study


@dataclass
class Run:
    """One run and its events as lines."""

    summary: RunSummary
    study: str
    overrides: tuple[str, ...]
    lines: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    model: Path | None = None
    ended: bool = False


class Rehearsal:
    """`ControlHandlers` over simulations.

    Args:
        folder: for models.
        hold_after: a run's events stop coming after so many, until `let_go`; None for never.
    """

    def __init__(self, folder: Path, hold_after: int | None = None) -> None:
        self._folder, self._hold_after = folder, hold_after
        self._free = threading.Event()
        self._changed = asyncio.Condition()
        self.runs_by_id: dict[str, Run] = {}
        self._workers: list[threading.Thread] = []

    def let_go(self) -> None:
        self._free.set()

    def finish(self) -> None:
        """Let every simulation end."""
        self.let_go()
        for worker in self._workers:
            worker.join(60)

    async def submit(self, caller, study, overrides):
        run_id = f"run-{len(self.runs_by_id) + 1}"
        parsed = parse_study(study, tuple(overrides))
        run = Run(RunSummary(run_id, parsed.name, "running", 0, parsed.rounds, 1.0), study, tuple(overrides))
        self.runs_by_id[run_id] = run
        loop = asyncio.get_running_loop()
        self._workers.append(threading.Thread(target=self._work, args=(loop, run, parsed), daemon=True))
        self._workers[-1].start()
        return run_id

    async def stop(self, caller, run_id):
        run = self._run(run_id)
        run.summary = replace(run.summary, status="stopped")
        await self._add(run, events.RunStopped(run_id, run.summary.round))
        return run.summary

    async def runs(self, caller):
        return [run.summary for run in reversed(self.runs_by_id.values())]

    async def show(self, caller, run_id):
        run = self._run(run_id)
        detail = {"study": run.study, "overrides": run.overrides, "submitter": caller.name, "history": run.history}
        return RunDetail(run.summary, json.dumps(detail | {"metric": "auc"}))

    async def watch(self, caller, run_id, start):
        run = self._run(run_id)
        index = start
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(run.lines) > index or run.ended)  # noqa: B023  # awaited here
            while index < len(run.lines):
                yield index, run.lines[index]
                index += 1
            if run.ended:
                return

    async def model(self, caller, run_id):
        run = self._run(run_id)
        if run.model is None:
            raise StateError(f"run {run_id} has no model yet")
        return ModelFile(run.model, "model.safetensors")

    def _run(self, run_id: str) -> Run:
        if run_id not in self.runs_by_id:
            raise StateError(f"no run {run_id!r}", hint="fedlearn runs lists them")
        return self.runs_by_id[run_id]

    def _work(self, loop, run: Run, study) -> None:
        def emit(event: events.Event) -> None:
            if self._hold_after is not None and len(run.lines) >= self._hold_after:
                self._free.wait(60)
            if isinstance(event, events.RunFinished):
                # As at a coordinator: whoever hears that the run has ended can fetch its model.
                last.append(event)
            else:
                asyncio.run_coroutine_threadsafe(self._add(run, event), loop).result()

        last: list[events.Event] = []
        result = simulate(study, emit=emit)
        run.model = self._folder / f"{run.summary.run_id}.safetensors"
        run.model.write_bytes(arrays.to_bytes(result.weights))
        run.history = list(result.outcome.history)
        for event in last:
            asyncio.run_coroutine_threadsafe(self._add(run, event), loop).result()

    async def _add(self, run: Run, event: events.Event) -> None:
        async with self._changed:
            run.lines.append(events.to_json(event, 1.0))
            if isinstance(event, events.RoundFinished):
                run.summary = replace(run.summary, round=event.round)
            if isinstance(event, events.RunFinished):
                run.summary = replace(run.summary, status="finished")
            run.ended = run.ended or isinstance(event, events.RunFinished | events.RunStopped | events.RunFailed)
            self._changed.notify_all()


@dataclass(frozen=True)
class Place:
    """Where a rehearsal listens, and the arguments of who asks it."""

    address: str
    state: Path
    handlers: Rehearsal

    @property
    def arguments(self) -> list[str]:
        return ["--server", self.address, "--tls", str(self.state / "tls" / "operator")]


@contextlib.contextmanager
def rehearsal(folder: Path, hold_after: int | None = None) -> Iterator[Place]:
    """A rehearsal that listens on loopback until the block is left."""
    bundle, _ = coordinator_bundles(folder / "state", ())
    started: list[Place] = []
    ready, leave = threading.Event(), threading.Event()

    async def serve() -> None:
        handlers = Rehearsal(folder, hold_after)
        server = LinkServer("127.0.0.1:0", TlsBundle.load(bundle), control=handlers)
        started.append(Place(await server.start(), folder / "state", handlers))
        ready.set()
        await asyncio.to_thread(leave.wait)
        await asyncio.to_thread(handlers.finish)
        await server.stop(0.1)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield started[0]
    finally:
        leave.set()
        thread.join(30)
