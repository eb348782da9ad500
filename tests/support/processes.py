"""Processes of a test: their output is read as it comes, states are awaited by it, and nothing outlives the test."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MARK = "FEDLEARN_TEST_FAMILY"
"""Every process that a test starts, and whatever that one starts, carries this variable."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free together a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Logged:
    """A process whose output, both streams, is kept line by line."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> None:
        self.command = list(command)
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            self.command,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        with self._changed:
            return "\n".join(self._lines)

    def wait_for(self, pattern: str, *, count: int = 1, timeout_s: float = 30.0) -> None:
        """Block until `count` lines match; fails when the process ends first or the time is over."""

        def seen() -> bool:
            return sum(1 for line in self._lines if re.search(pattern, line)) >= count

        with self._changed:
            self._changed.wait_for(lambda: seen() or self._ended, timeout_s)
            if seen():
                return
        raise AssertionError(f"{self.command}: no {count} lines like {pattern!r} in {timeout_s} s:\n{self.output}")

    def wait(self, timeout_s: float) -> int:
        """Block until the process has ended and its output was read; its exit status."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.command}: still running after {timeout_s} s:\n{self.output}") from None
        self._reader.join(5)
        return status

    def stop(self, timeout_s: float = 15.0) -> None:
        """SIGTERM to the whole group, SIGKILL to what is left of it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
                break
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(_COLOUR.sub("", line.rstrip("\n")))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Family:
    """Processes that are stopped together, with everything that they started themselves."""

    def __init__(self, cwd: Path, env: Mapping[str, str]) -> None:
        self._cwd = cwd
        self._mark = uuid.uuid4().hex
        # A worker sees little of its agent's environment; it must carry the mark, or an orphan would go unseen.
        self._env = {**env, MARK: self._mark, "FEDLEARN_WORKER_ENV": MARK}
        self._members: list[Logged] = []

    def start(self, *command: str, cwd: Path | None = None, **env: str) -> Logged:
        member = Logged(command, env={**self._env, **env}, cwd=cwd if cwd is not None else self._cwd)
        self._members.append(member)
        return member

    def stop(self) -> None:
        """Stop all, last started first; then whatever detached itself from them."""
        for member in reversed(self._members):
            member.stop()
        for pid in self.alive():
            _end(pid)
        assert not self.alive(), "a process outlived its test"

    def alive(self) -> list[int]:
        """Processes of this family that run, detached ones among them."""
        wanted = f"{MARK}={self._mark}".encode()
        return [pid for pid in _pids() if wanted in _environment(pid)]


@contextlib.contextmanager
def family(cwd: Path, env: Mapping[str, str]) -> Iterator[Family]:
    """A family that is stopped in the end, whatever happens."""
    members = Family(cwd, env)
    try:
        yield members
    finally:
        members.stop()


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    """A process's environment; empty for a zombie, and for one that is gone or somebody else's."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def _end(pid: int, timeout_s: float = 5.0) -> None:
    with contextlib.suppress(ProcessLookupError, OSError):
        handle = os.pidfd_open(pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(handle, number)
                deadline = time.monotonic() + timeout_s
                poll = select.poll()
                poll.register(handle, select.POLLIN)
                if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    return
        finally:
            os.close(handle)
