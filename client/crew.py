"""The agent's workers: one warm process a run, replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from client.frames import Frame
from client.process import WorkerProcess
from fedlearn.errors import FedlearnError

log = logging.getLogger("fedlearn.worker")

MAX_WORKERS: Final = 2
"""Processes that are kept; each holds torch and the site's data."""

PRELOAD: Final = ("torch", "fedlearn.learning.local")
"""What a worker of fedlearn's own app imports before the first message, so that the first round is as quick as the rest."""


LATE_S: Final = 5.0
"""A worker that still works on what nobody waits for any more gets so long before it is replaced: about what a new one takes to start."""


@dataclass
class _Post:
    """One run's place: its process, one that is being started, and the lock that keeps calls from overlapping."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    worker: WorkerProcess | None = None
    starting: asyncio.Task[WorkerProcess] | None = None


class Crew:
    """Answers frames, each run's in a process of its own.

    Args:
        root: the folder that holds `client/`.
        app_dir: the Flower app to load; None for fedlearn's own.
        name: the client's, for the log.
    """

    def __init__(self, root: Path, app_dir: Path | None, name: str) -> None:
        self._root, self._app_dir, self._name = root, app_dir, name
        self._posts: OrderedDict[str, _Post] = OrderedDict()
        self._spare: asyncio.Task[WorkerProcess] | None = None

    async def warm_up(self) -> WorkerProcess:
        """Start the process that the first run will take.

        Raises:
            FedlearnError: the app cannot be loaded.
        """
        spare = self._spare = asyncio.create_task(self._start())
        try:
            return await asyncio.shield(spare)
        except FedlearnError:
            # The first message starts another one, and is not answered with this one's end.
            if self._spare is spare:
                self._spare = None
            raise

    async def call(self, run: str, frame: Frame) -> Frame:
        """Send a frame to the run's worker and wait for the answer; one that died before is replaced first.

        Raises:
            WorkerCrashedError: the process died during this call; the next call has a new one.
            FedlearnError: the app raised.
        """
        post = self._posts.setdefault(run, _Post())
        self._posts.move_to_end(run)
        async with post.lock:
            if post.worker is not None and not await post.worker.free(LATE_S):
                post.worker = None
            if post.worker is None:
                post.worker = await self._started(post)
            return await post.worker.call(frame)

    async def close(self) -> None:
        """End every process."""
        starting = [task for task in (self._spare, *(p.starting for p in self._posts.values())) if task is not None]
        for task in starting:
            task.cancel()
        started = await asyncio.gather(*starting, return_exceptions=True)
        workers = [w for w in (*started, *(p.worker for p in self._posts.values())) if isinstance(w, WorkerProcess)]
        for worker in workers:
            await worker.stop(grace_s=0.0)
        self._spare = None
        self._posts.clear()

    async def _started(self, post: _Post) -> WorkerProcess:
        """The process of a run that has none. A call that is cancelled meanwhile leaves it to the next one."""
        while True:
            if post.starting is None:
                await self._make_room()
                spare, self._spare = self._spare, None
                post.starting = spare if spare is not None else asyncio.create_task(self._start())
            try:
                worker = await asyncio.shield(post.starting)
            finally:
                if post.starting.done():
                    post.starting = None
            if worker.alive:
                return worker
            await worker.stop(grace_s=0.0)  # a spare that died while it waited

    async def _make_room(self) -> None:
        """Retire the idle worker that was called longest ago when there are as many as may be kept."""
        idle = [post for post in self._posts.values() if post.worker is not None and not post.lock.locked()]
        busy = sum(1 for post in self._posts.values() if post.worker is not None) - len(idle)
        for post in idle[: max(0, len(idle) + busy + 1 - MAX_WORKERS)]:
            if post.worker is not None:
                worker, post.worker = post.worker, None
                await worker.stop()

    async def _start(self) -> WorkerProcess:
        preload = PRELOAD if self._app_dir is None else ()
        worker = await WorkerProcess.start(self._root, self._app_dir, preload, self._name)
        log.debug("worker %s: process %d, sandbox %s", self._name, worker.pid, _on(worker.sandbox))
        return worker


def _on(sandbox: Mapping[str, Any]) -> str:
    return ", ".join(name for name, on in sandbox.items() if on)
