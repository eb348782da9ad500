"""The coordinator's process: the link, the store, and one thread for each run under way.

Runs outlive the process: whatever ends it, the next one on the same state folder goes on with them from their journals.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# Before Flower is imported: a coordinator calls nobody but its clients.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from fedlearn import logs
from fedlearn.app import APP_FOLDERS, App, load_app
from fedlearn.errors import INTERRUPTED_EXIT_CODE, LinkError, StateError
from fedlearn.events import RunStopped
from fedlearn.link import events as link_events
from fedlearn.link.server import LinkServer
from fedlearn.link.tls import TlsBundle
from fedlearn.lock import FolderLock
from server.active import ActiveRun
from server.event_log import EventLog
from server.foreign import send_run_config
from server.handlers import Handlers
from server.records import RunRow, RunStatus
from server.store import Store
from server.submission import read_submission

if TYPE_CHECKING:
    from server.options import CoordinatorOptions

log = logging.getLogger("fedlearn.server")

DATABASE_FILE: Final = "state.db"
MODELS_FOLDER: Final = "models"
SUSPEND_S: Final = 10.0
"""How long the end waits for runs to notice it."""


class Coordinator:
    """A coordinator on the running asyncio loop.

    Args:
        options: see `CoordinatorOptions`.
        app: whose ServerApp runs.
        tls: a bundle of the role server.
        store: open.
    """

    def __init__(self, options: CoordinatorOptions, app: App, tls: TlsBundle, store: Store) -> None:
        self._options, self._app, self._store = options, app, store
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._active: dict[str, ActiveRun] = {}
        self._stopping = False
        self._done = asyncio.Event()
        self.failure: StateError | None = None
        self.event_log = EventLog(store, self._failed)
        handlers = Handlers(self, store, options.state_dir / MODELS_FOLDER)
        self._link = LinkServer(options.listen, tls, emit=_log_link, control=handlers)

    async def start(self) -> str:
        """Listen, and go on with the runs of the last process; the bound `host:port`.

        Raises:
            AddressInUseError: the port is taken.
        """
        address = await self._link.start()
        log.info("listening on %s", address)
        if self._options.address_file is not None:
            await asyncio.to_thread(_write_address, self._options.address_file, address)
        self._schedule()
        if self._app.native:
            # The first run would wait for it.
            self._loop.run_in_executor(None, importlib.import_module, "torch")
        return address

    async def wait(self) -> None:
        """Until `stop` was called from a signal, or the disk failed."""
        await self._done.wait()

    def ask_to_end(self) -> None:
        """End the process; from the loop."""
        self._done.set()

    async def stop(self) -> bool:
        """Suspend the runs and close everything; False when a ServerApp did not notice in time."""
        self._stopping = True
        active = list(self._active.values())
        for run in active:
            run.suspend()
        await self._link.stop()
        ended = await asyncio.to_thread(lambda: [run.ended.wait(SUSPEND_S) for run in active])
        await asyncio.to_thread(self.event_log.close)
        return all(ended)

    async def submit(self, text: str, overrides: Sequence[str], submitter: str) -> str:
        """Check a study and queue its run; the run's id.

        Raises:
            StudyError: what is wrong with it.
        """
        submission = await asyncio.to_thread(read_submission, self._app, text, tuple(overrides))
        run = f"{secrets.randbits(63) or 1:016x}"
        await asyncio.to_thread(
            self._store.add_run, run, submission.name, text, tuple(overrides), submission.rounds, submitter
        )
        log.info("run %s: %s submitted by %s", run, submission.name, submitter)
        self._schedule()
        return run

    async def stop_run(self, run: str, wait_s: float) -> RunRow:
        """Stop a run after the round that it is in; how it stands after at most `wait_s` seconds."""
        row = await asyncio.to_thread(self._store.run, run)
        active = self._active.get(run)
        if active is not None:
            await asyncio.to_thread(self._store.ask_to_stop, run)
            active.stop()
            await asyncio.to_thread(active.ended.wait, wait_s)
        elif row.status is RunStatus.QUEUED:
            await asyncio.to_thread(self.event_log.end, run, RunStatus.STOPPED, RunStopped(run, 0))
        return await asyncio.to_thread(self._store.run, run)

    def _schedule(self) -> None:
        """Start what may start: interrupted runs first, then queued ones in order of submission."""
        if self._stopping:
            return
        for status in (RunStatus.RUNNING, RunStatus.QUEUED):
            for row in reversed(self._store.runs(status)):
                if len(self._active) >= self._options.max_runs:
                    return
                if row.run not in self._active:
                    self._start(row)

    def _start(self, row: RunRow) -> None:
        if row.status is RunStatus.QUEUED:
            row = self._store.move(row.run, RunStatus.RUNNING)
            log.info("run %s: %s starts", row.run, row.name)
        else:
            log.info("run %s: %s resumes after round %d", row.run, row.name, row.round)
        run_config: dict[str, Any] = {"run-id": row.run}
        grid = self._link.grid(int(row.run, 16))
        if not self._app.native:
            run_config = dict(read_submission(self._app, row.study, row.overrides).run_config)
            send_run_config(grid, run_config)
        active = ActiveRun(
            row,
            lambda: self._app.server_app,
            run_config,
            grid,
            self._store,
            self.event_log,
            self._client_name,
            self._tls,
            self._ended,
        )
        self._active[row.run] = active
        active.start()

    def _client_name(self, node_id: int) -> str:
        for node in self._link.nodes():
            if node.node_id == node_id:
                return node.client_id
        raise LinkError(f"node {node_id}: no client of this id has connected")

    def _ended(self, run: str) -> None:
        def forget() -> None:
            self._active.pop(run, None)
            self._link.close_grid(int(run, 16))
            self._schedule()

        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(forget)

    def _failed(self, error: StateError) -> None:
        self.failure = error
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._done.set)


def serve(options: CoordinatorOptions) -> int:
    """Run a coordinator until it is told to stop.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        AddressInUseError: the port is taken.
        StateError: the state folder is in use, or the database cannot be used.
        TlsError: a certificate is missing or does not fit.
        StudyError: the app cannot be loaded.
    """
    logs.configure(json_lines=options.json_logs, debug=options.debug)
    app = load_app(options.app_dir)
    if not app.native:
        _make_way()
    tls = TlsBundle.load(options.tls_dir)
    with FolderLock(options.state_dir, "a coordinator"):
        url = options.database_url or f"sqlite:///{(options.state_dir / DATABASE_FILE).resolve()}"
        store = Store(url)
        try:
            code, clean = asyncio.run(_serve(options, app, tls, store))
        finally:
            store.close()
    if not clean:
        # A ServerApp that computes cannot be interrupted; its run is suspended all the same.
        logging.shutdown()
        os._exit(code)
    return code


def _make_way() -> None:
    """Forget this package's name, which a foreign app may have for its own; what is loaded of ours works on without it."""
    for name in [name for name in sys.modules if name.partition(".")[0] in APP_FOLDERS]:
        del sys.modules[name]


async def _serve(options: CoordinatorOptions, app: App, tls: TlsBundle, store: Store) -> tuple[int, bool]:
    loop = asyncio.get_running_loop()
    coordinator = Coordinator(options, app, tls, store)
    code = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal code
        code = INTERRUPTED_EXIT_CODE if number is signal.SIGINT else 0
        log.info("stopping: runs go on when a coordinator starts on this state folder again")
        coordinator.ask_to_end()
        # Whoever asks again is in a hurry; nothing is lost by it.
        loop.remove_signal_handler(number)
        loop.add_signal_handler(number, os._exit, code)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    clean = True
    try:
        await coordinator.start()
        await coordinator.wait()
    finally:
        clean = await coordinator.stop()
    if coordinator.failure is not None:
        raise coordinator.failure
    return code, clean


def _write_address(path: Path, address: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(address + "\n", encoding="ascii")
    partial.replace(path)


def _log_link(event: link_events.LinkEvent) -> None:
    match event:
        case link_events.LinkConnected(peer=peer, resumed=resumed):
            log.info("%s %s", peer, "is back" if resumed else "connected")
        case link_events.LinkLost(peer=peer, reason=reason):
            log.info("%s disconnected: %s", peer, reason)
        case link_events.PeerRefused(peer=peer, reason=reason):
            log.warning("%s was refused: %s", peer, reason)
        case link_events.LinkListening():
            pass
        case _:
            log.debug("%s", event)
