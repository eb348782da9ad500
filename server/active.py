"""One run under way: the thread that calls the app's ServerApp, and how it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Context, RecordDict

from fedlearn import events
from fedlearn.errors import FedlearnError, StateError
from fedlearn.learning.runtime import RunRuntime
from fedlearn.link import flower
from fedlearn.link.closing import closing
from fedlearn.link.grid import GridCancelledError
from server.heads import StoredHeads
from server.records import RunRow, RunStatus
from server.run_state import RunJournal, RunModel

if TYPE_CHECKING:
    from fedlearn.events import Event
    from fedlearn.link import TlsBundle
    from fedlearn.link.grid import LinkGrid
    from server.event_log import EventLog
    from server.store import Store

log = logging.getLogger("fedlearn.server")

_LAST: Final = (events.RunFinished, events.RunStopped, events.RunFailed)
_BETWEEN_ROUNDS: Final = (events.RoundFinished, events.RoundVoid)


class ActiveRun:
    """A run and its thread.

    Args:
        row: the run.
        server_app: gives the Flower ServerApp; called in the thread, since it may load torch.
        run_config: for the app's context.
        grid: of this run alone.
        store: where its journal and model are.
        event_log: where its events go.
        client_name: node id to the name in that client's certificate.
        tls: this end's; says who certifies clients, and signs the run's end.
        on_end: called in the thread when it is over.
    """

    def __init__(
        self,
        row: RunRow,
        server_app: Callable[[], Any],
        run_config: Mapping[str, Any],
        grid: LinkGrid,
        store: Store,
        event_log: EventLog,
        client_name: Callable[[int], str],
        tls: TlsBundle,
        on_end: Callable[[str], None],
    ) -> None:
        self._row, self._server_app, self._grid = row, server_app, grid
        self._store, self._event_log, self._on_end = store, event_log, on_end
        self._run_config = dict(run_config)
        self._stop = row.stop_asked
        self._suspended = False
        self._in_round = False
        self._lock = threading.Lock()
        self._last: Event | None = None
        self._rounds_done = row.round
        self._participants: set[str] = set()
        self.ended = threading.Event()
        runtime = RunRuntime(
            row.run,
            row.study,
            row.overrides,
            RunModel(store, row.run),
            self._emit,
            RunJournal(store, row.run),
            lambda: self._stop,
            client_name,
            StoredHeads(store),
            tls.ca_pem,
            lambda rounds: closing(tls, row.run, rounds),
        )
        # A Flower grid has no such attribute: apps that know of it look for it, others never see it.
        grid.runtime = runtime  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._main, name=f"run-{row.run}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the round that the run is in; at once when it is in none, or when asked a second time."""
        with self._lock:
            now = self._stop or not self._in_round
            self._stop = True
        if now:
            self._grid.cancel()

    def suspend(self) -> None:
        """The coordinator stops, the run does not: it goes on from its journal in the next process."""
        self._suspended = True
        self._grid.cancel()

    def _main(self) -> None:
        run = self._row.run
        try:
            status, reason = self._serve()
            if status is not None:
                self._event_log.end(run, status, self._last_event(status, reason), reason=reason)
                log.info("run %s: %s%s", run, status.value, f": {reason}" if reason else "")
        except StateError as error:
            log.error("run %s: %s", run, error)  # noqa: TRY400  # a foreseen error has no traceback
        finally:
            self.ended.set()
            self._on_end(run)

    def _serve(self) -> tuple[RunStatus | None, str]:
        """Call the ServerApp; how the run ended, or None when it only was suspended."""
        context = Context(
            run_id=int(self._row.run, 16),
            node_id=flower.SERVER_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=self._run_config,
        )
        try:
            app = self._server_app()
            flower.ensure_identity(context.run_id)
            app(self._grid, context)
        except GridCancelledError:
            if self._suspended:
                return None, ""
            if self._stop:
                return RunStatus.STOPPED, ""
            return RunStatus.FAILED, "its messages were cancelled"
        except FedlearnError as error:
            # What was going on when the coordinator stopped is no failure of the run.
            return (None, "") if self._suspended else (RunStatus.FAILED, error.message)
        except Exception as error:
            if self._suspended:
                return None, ""
            log.error("run %s: the ServerApp raised", self._row.run, exc_info=log.isEnabledFor(logging.DEBUG))  # noqa: TRY400
            return RunStatus.FAILED, f"the ServerApp raised {type(error).__name__}: {error}"
        return (RunStatus.STOPPED if isinstance(self._last, events.RunStopped) else RunStatus.FINISHED), ""

    def _last_event(self, status: RunStatus, reason: str) -> Event:
        """The event that the app ended with, or the one that it owes."""
        wanted: type[Event] = {
            RunStatus.FINISHED: events.RunFinished,
            RunStatus.STOPPED: events.RunStopped,
            RunStatus.FAILED: events.RunFailed,
        }[status]
        last = self._last
        if isinstance(last, wanted):
            return last
        run = self._row.run
        if status is RunStatus.FINISHED:
            return events.RunFinished(run, self._rounds_done, 0.0, "")
        return (
            events.RunStopped(run, self._rounds_done) if status is RunStatus.STOPPED else events.RunFailed(run, reason)
        )

    def _emit(self, event: Event) -> None:
        # The last event waits for the model and the status: who has seen it can fetch the model.
        if isinstance(event, _LAST):
            self._last = event
            return
        with self._lock:
            if isinstance(event, events.RoundStarted):
                self._in_round = True
            elif isinstance(event, _BETWEEN_ROUNDS):
                self._in_round = False
        if isinstance(event, events.RunStarted):
            self._rounds_done = event.rounds_done
            self._took_part(event.clients)
        elif isinstance(event, events.RoundFinished):
            self._rounds_done = event.round
        elif isinstance(event, events.ClientFinished):
            self._took_part((event.client,))
        self._event_log.put(self._row.run, event)

    def _took_part(self, clients: tuple[str, ...]) -> None:
        if new := set(clients) - self._participants:
            self._store.add_participants(self._row.run, new)
            self._participants |= new
