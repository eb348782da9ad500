"""Events of all runs: numbered, made durable in batches, then shown to whoever watches.

`put` never waits for a disk: one thread writes what has come since its last commit, so many events cost one sync. A watcher
sees an event only once it is durable, so its number never changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from fedlearn import events
from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import StateError

if TYPE_CHECKING:
    from server.records import RunStatus
    from server.store import Store

PENDING_LIMIT: Final = 100_000
"""Events that wait for the disk at most; then `put` does wait."""

BATCH_LIMIT: Final = 1_000

_Entry = tuple[str, events.Event, float] | threading.Event | None


class EventLog:
    """The one writer of events. Made on the asyncio loop that its watchers run on.

    Args:
        store: where events go.
        on_failure: called once, from the writer's thread, when the disk refused; later events are dropped.
        clock: stamps events for people.
    """

    def __init__(self, store: Store, on_failure: Callable[[StateError], None], clock: Clock | None = None) -> None:
        self._store, self._on_failure = store, on_failure
        self._clock = clock or SystemClock()
        self._loop = asyncio.get_running_loop()
        self._queue: queue.Queue[_Entry] = queue.Queue(PENDING_LIMIT)
        self._next: dict[str, int] = {}
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._closed = False
        self._failed = False
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)
        self._thread.start()

    def put(self, run: str, event: events.Event) -> None:
        """Take an event. From any thread."""
        self._queue.put((run, event, self._clock.wall()))

    def flush(self) -> None:
        """Block until everything that was put before is durable. Not on the loop."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()

    def end(self, run: str, status: RunStatus, last: events.Event, *, reason: str = "") -> None:
        """End a run together with its last event. Not on the loop.

        Raises:
            StateError: the run has ended already, or the disk refused.
        """
        self.flush()
        number = self._number(run)
        line = events.to_json(last, self._clock.wall())
        self._store.move(run, status, reason=reason, last=[(number, line)])
        self._next.pop(run, None)
        self._wake({run})

    async def watch(self, run: str, start: int) -> AsyncIterator[tuple[int, str]]:
        """Events from number `start` on, as (number, JSON), live; ends with the run, or when the log is closed."""
        wake = asyncio.Event()
        self._watchers[run].add(wake)
        try:
            while True:
                wake.clear()
                # In this order: what is read after the run was seen to have ended is all that there will be.
                ended = (await asyncio.to_thread(self._store.run, run)).status.ended
                found = await asyncio.to_thread(self._store.events, run, start)
                for number, line in found:
                    yield number, line
                    start = number + 1
                if not found:
                    if ended or self._closed:
                        return
                    await wake.wait()
        finally:
            self._watchers[run].discard(wake)
            if not self._watchers[run]:
                del self._watchers[run]

    def close(self) -> None:
        """Write what is pending, end every watcher. Not on the loop."""
        self._queue.put(None)
        self._thread.join()
        self._closed = True
        self._wake(None)

    def _write(self) -> None:
        while True:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH_LIMIT:
                    batch.append(self._queue.get_nowait())
            self._commit([entry for entry in batch if isinstance(entry, tuple)])
            for entry in batch:
                if isinstance(entry, threading.Event):
                    entry.set()
            if None in batch:
                return

    def _commit(self, batch: list[tuple[str, events.Event, float]]) -> None:
        if self._failed or not batch:
            return
        rows, done = [], {}
        try:
            for run, event, wall_s in batch:
                rows.append((run, self._number(run), events.to_json(event, wall_s)))
                self._next[run] += 1
                if isinstance(event, events.RunStarted):
                    done[run] = event.rounds_done
                elif isinstance(event, events.RoundFinished):
                    done[run] = event.round
            self._store.add_events(rows, done)
        except StateError as error:
            self._failed = True
            self._on_failure(error)
            return
        self._wake({run for run, _, _ in batch})

    def _number(self, run: str) -> int:
        if run not in self._next:
            self._next[run] = self._store.next_event(run)
        return self._next[run]

    def _wake(self, runs: set[str] | None) -> None:
        def wake() -> None:
            for run, watchers in self._watchers.items():
                if runs is None or run in runs:
                    for watcher in watchers:
                        watcher.set()

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches any more
            self._loop.call_soon_threadsafe(wake)
