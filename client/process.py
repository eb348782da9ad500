"""One worker process, as the agent sees it: start, call, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from client import frames
from client.frames import Frame, Kind
from fedlearn import errors
from fedlearn.errors import FedlearnError, WorkerCrashedError

log = logging.getLogger("fedlearn.worker")

START_S: Final = 120.0
"""Longest wait for a worker to load its app."""

LOG_LINE_BYTES: Final = 8 * 1024
LOG_LINES_PER_CALL: Final = 1_000
STOP_S: Final = 2.0

PASSED_ON: Final = (
    "CUDA_VISIBLE_DEVICES",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PATH",
    "PYTHONHASHSEED",
    "PYTHONPATH",
    "TMPDIR",
    "TZ",
    "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
)
"""All of the agent's environment that a worker sees, unless `FEDLEARN_WORKER_ENV` names more, separated by commas."""

_BOOT: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); import os; from client.worker import main;"
    " code = main(int(sys.argv[2]), int(sys.argv[3])); sys.stdout.flush(); sys.stderr.flush(); os._exit(code)"
)


class WorkerProcess:
    """A worker; calls do not overlap. Made by `start`.

    A computation cannot be interrupted but by killing the process. A call that is cancelled leaves it going, and `free`
    decides before the next call: a new process takes seconds to load its libraries, so one that is nearly done is kept.
    """

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket, name: str) -> None:
        self._process, self._sock, self._name = process, sock, name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"channel-{name}")
        self._tail: deque[str] = deque(maxlen=20)
        self._lines = 0
        self._late: asyncio.Future[Frame] | None = None
        self._readers = [
            asyncio.create_task(self._read(stream, level))
            for stream, level in ((process.stdout, logging.INFO), (process.stderr, logging.WARNING))
            if stream is not None
        ]
        self.sandbox: Mapping[str, bool] = {}

    @classmethod
    async def start(cls, root: Path, app_dir: Path | None, preload: Sequence[str], name: str) -> WorkerProcess:
        """Start a worker and wait until it has loaded its app.

        Args:
            root: the folder that holds `client/`.
            app_dir: the Flower app to load; None for fedlearn's own.
            preload: modules to import ahead of the first message.
            name: for the log.

        Raises:
            WorkerCrashedError: the process ended, or took longer than `START_S`. An error of the app itself keeps its class.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # Linux kills a worker when the *thread* that started it ends: this one lives as long as the agent.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _BOOT, str(root), str(theirs.fileno()), str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=environment(),
                limit=LOG_LINE_BYTES,
            )
        worker = cls(process, ours, name)
        try:
            init = Frame(Kind.INIT, {"app_dir": None if app_dir is None else str(app_dir), "preload": list(preload)})
            async with asyncio.timeout(START_S):
                ready = await worker.call(init)
        except TimeoutError:
            await worker.stop(grace_s=0.0)
            raise WorkerCrashedError(f"worker {name}: did not load its app within {START_S:.0f} s") from None
        except BaseException:
            await worker.stop(grace_s=0.0)
            raise
        worker.sandbox = ready.header["sandbox"]
        return worker

    @property
    def alive(self) -> bool:
        """True while the process runs and its channel is whole."""
        return self._process.returncode is None and self._sock.fileno() >= 0

    @property
    def pid(self) -> int:
        """The process id, which is also its process group's."""
        return self._process.pid

    async def free(self, timeout_s: float) -> bool:
        """True when the process can take a call; one that still works on a cancelled call after `timeout_s` seconds is ended."""
        late, self._late = self._late, None
        if late is not None:
            try:
                done, _ = await asyncio.wait({late}, timeout=timeout_s)
            except asyncio.CancelledError:
                self._late = late
                raise
            if not done or late.exception() is not None:
                await self.stop(grace_s=0.0)
        return self.alive

    async def call(self, frame: Frame) -> Frame:
        """Send a frame and wait for the answer.

        Raises:
            WorkerCrashedError: the process died.
            FedlearnError: the app raised; the worker lives.
        """
        self._lines = 0
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, frame)
        try:
            reply = await asyncio.shield(answer)
        except (OSError, errors.ProtocolError) as error:
            await self.stop(grace_s=STOP_S)
            raise WorkerCrashedError(self._obituary(error)) from None
        except asyncio.CancelledError:
            self._late = answer
            # Nobody may ask for it again; asyncio would complain of an exception that was never looked at.
            answer.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise
        if reply.kind is Kind.RAISED:
            raise raised(reply.header)
        return reply

    async def stop(self, grace_s: float = STOP_S) -> None:
        """End the process and everything that it started. Safe to call again."""
        # Shut down, not closed: a thread may be reading, and a closed number could be another file's by then.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._process.returncode is None and grace_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        self.kill()
        await self._process.wait()
        self._thread.shutdown(wait=True)
        self._sock.close()
        await asyncio.wait(self._readers, timeout=STOP_S)
        for reader in self._readers:
            reader.cancel()

    def kill(self) -> None:
        """Kill the process group at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _exchange(self, frame: Frame) -> Frame:
        frames.send(self._sock, frame)
        reply = frames.receive(self._sock)
        if reply is None:
            raise ConnectionResetError("the worker closed its channel")
        return reply

    def _obituary(self, error: Exception) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else f"signal {-code}"
            why = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"the worker was ended by {name}{why}"
        return f"the worker ended with exit code {code} ({type(error).__name__})"

    async def _read(self, stream: asyncio.StreamReader, level: int) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # longer than LOG_LINE_BYTES: the reader has dropped what it held
            if not line:
                return
            self._lines += 1
            if self._lines <= LOG_LINES_PER_CALL:
                log.log(level, "worker %s: %s", self._name, line.decode(errors="replace").rstrip())
            elif self._lines == LOG_LINES_PER_CALL + 1:
                log.warning("worker %s: more than %d lines, the rest is dropped", self._name, LOG_LINES_PER_CALL)


def environment() -> dict[str, str]:
    """A worker's environment."""
    more = [name.strip() for name in os.environ.get("FEDLEARN_WORKER_ENV", "").split(",")]
    kept = {name: os.environ[name] for name in (*PASSED_ON, *more) if name in os.environ}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def raised(header: Mapping[str, Any]) -> FedlearnError:
    """The exception that a worker reported, as an error of fedlearn's tree."""
    where = [str(line) for line in header.get("where", [])]
    kind = str(header.get("kind"))
    kinds = {c.kind: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FedlearnError)}
    message, hint = str(header.get("message")), str(header.get("hint"))
    if kind == WorkerCrashedError.kind or kind not in kinds:
        last = f", in {where[-1]}" if where else ""
        return WorkerRaisedError(f"the app raised {header.get('type')}{last}", detail=message, where=where)
    return kinds[kind](message, hint=hint)


class WorkerRaisedError(WorkerCrashedError):
    """The app raised an exception that nobody foresaw; the worker lives on.

    Args:
        message: type and place, which may leave the site.
        detail: the exception's own text, which may hold data of people.
        where: the innermost frames of the traceback, outermost first.
    """

    def __init__(self, message: str, *, detail: str, where: Sequence[str]) -> None:
        super().__init__(message)
        self.detail, self.where = detail, tuple(where)
