"""Processes that run a sweep's studies side by side. One that dies costs the study that it was running, until the next try."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import fedlearn

LINE_LIMIT_BYTES: Final = 1024 * 1024
LOOK_S: Final = 0.2
"""How often it is asked whether to stop."""
PATIENCE_S: Final = 10.0
"""How long a process may take to end when its work is done."""

Take = Callable[[int, Mapping[str, Any]], None]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    index: int | None = None
    unread: bytearray = field(default_factory=bytearray)


class Crew:
    """A fixed number of worker processes (`fedlearn.simulation.cell`), started when there is work for them. A context manager.

    Args:
        size: the most that run at the same time.
        log: takes what the workers print.
    """

    def __init__(self, size: int, log: Path) -> None:
        self._size = size
        self._log = log.open("ab")
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def run(self, jobs: Iterable[Mapping[str, Any]], take: Take, should_stop: Callable[[], bool]) -> None:
        """Run all jobs; after a stop, those under way end after their round and the others are not begun.

        Args:
            jobs: each with its `index`.
            take: is given every message with its job's index; the last one of a job is of another kind than `progress`.
            should_stop: asked all the time.
        """
        waiting = deque(jobs)
        stopping = False
        while waiting or any(worker.index is not None for worker in self._workers):
            if should_stop() and not stopping:
                stopping = True
                waiting.clear()
                for worker in self._workers:
                    self._tell(worker, {"stop": True})
            while waiting and (free := self._free()) is not None:
                job = waiting.popleft()
                free.index = int(job["index"])
                self._tell(free, job)
            for key, _ in self._selector.select(LOOK_S):
                self._read(key.data, take)

    def close(self) -> None:
        """End every process: an idle one at once, a busy one wherever it is."""
        for worker in self._workers:
            if worker.index is not None:
                worker.process.kill()
            assert worker.process.stdin is not None
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        for worker in self._workers:
            try:
                worker.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            assert worker.process.stdout is not None
            worker.process.stdout.close()
        self._workers.clear()
        self._selector.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free(self) -> _Worker | None:
        for worker in self._workers:
            if worker.index is None:
                return worker
        return self._start() if len(self._workers) < self._size else None

    def _start(self) -> _Worker:
        # Its own copy of fedlearn may be found through the current folder alone, as in a checkout.
        root = str(Path(fedlearn.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "fedlearn.simulation.cell"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # Ctrl-C on a terminal is for the parent, which says what it means
        )
        worker = _Worker(process)
        self._workers.append(worker)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    @staticmethod
    def _tell(worker: _Worker, order: Mapping[str, Any]) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):  # it died: its end is seen when it is read from
            worker.process.stdin.write(json.dumps(order).encode() + b"\n")
            worker.process.stdin.flush()

    def _read(self, worker: _Worker, take: Take) -> None:
        assert worker.process.stdout is not None
        data = os.read(worker.process.stdout.fileno(), 65536)
        worker.unread += data
        if not data or len(worker.unread) > LINE_LIMIT_BYTES:
            self._bury(worker, take)
            return
        *lines, rest = bytes(worker.unread).split(b"\n")
        worker.unread = bytearray(rest)
        for line in lines:
            message = json.loads(line)
            index = int(message.pop("index"))
            if message["kind"] != "progress":
                worker.index = None
            take(index, message)

    def _bury(self, worker: _Worker, take: Take) -> None:
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        worker.process.kill()
        status = worker.process.wait()
        worker.process.stdout.close()
        assert worker.process.stdin is not None
        with contextlib.suppress(OSError):
            worker.process.stdin.close()
        if worker.index is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            reason = (
                f"its process died ({how}); out of memory?"
                if status == -signal.SIGKILL
                else f"its process died ({how})"
            )
            take(worker.index, {"kind": "failed", "reason": reason, "hint": "run the same command again to resume it"})
