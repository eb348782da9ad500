"""A coordinator and four hospitals as the command line starts them, and runs of them that a test disturbs."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedlearn import events
from fedlearn.errors import LinkError
from fedlearn.link import ControlClient, Role, TlsBundle, create_authority, issue
from tests.support.processes import Family, Logged, free_ports

ROOT = Path(__file__).resolve().parents[2]
HOSPITALS = ("cleveland", "hungary", "switzerland", "va-long-beach")
STUDY = ROOT / "simulations" / "heart.toml"
FEDLEARN = (sys.executable, "-m", "fedlearn.cli")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Federation:
    """Processes by name; each can be killed and started again with the same state."""

    def __init__(self, processes: Family, folder: Path, *, app: Path | None = None) -> None:
        self.processes, self.folder = processes, folder
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self._app = () if app is None else ("--app", str(app))
        authority = create_authority(folder / "ca")
        self.tls = {
            name: issue(authority, name, role, folder / "tls" / name)
            for name, role in (
                ("coordinator", Role.SERVER),
                ("operator", Role.OPERATOR),
                *((name, Role.CLIENT) for name in HOSPITALS),
            )
        }
        self._listening = threading.Event()
        self.running: dict[str, Logged] = {}
        self.logs: list[Logged] = []

    def coordinator(self, *more: str) -> Logged:
        """Start it and wait until it listens."""
        started = self._start(
            "coordinator",
            *("server", "--listen", self.address, "--state", str(self.folder / "state" / "coordinator")),
            *more,
        )
        started.wait_for("listening on", timeout_s=60)
        self._listening.set()
        return started

    def site(self, name: str, *more: str, wait: bool = True) -> Logged:
        """Start a hospital's agent, by default until it is connected."""
        task = () if self._app else ("--task", "hospital/heart")
        started = self._start(
            name,
            *("client", "--server", self.address, "--state", str(self.folder / "state" / name), "--device", "cpu"),
            *(*task, *more),
        )
        if wait:
            started.wait_for("connected to", timeout_s=60)
        return started

    def bad_site(self, name: str, how: str) -> Logged:
        """Start a site that spoils its updates."""
        command = (sys.executable, "-m", "tests.support.bad_client", self.address, str(self.tls[name]), how)
        return self._keep(name, self.processes.start(*command))

    def kill(self, name: str) -> None:
        """kill -9, and wait for the end."""
        if name == "coordinator":
            self._listening.clear()
        self.running[name].process.send_signal(signal.SIGKILL)
        self.running[name].wait(20)

    def stop_site(self, name: str) -> None:
        """SIGTERM, and wait for the end."""
        self.running[name].process.send_signal(signal.SIGTERM)
        assert self.running[name].wait(20) == 0, self.running[name].output

    def control(self) -> ControlClient:
        """The operator's connection."""
        return ControlClient(self.address, TlsBundle.load(self.tls["operator"]))

    def submit(self, *overrides: str) -> str:
        with self.control() as control:
            return control.submit(STUDY.read_text(), overrides)

    def follow(self, run: str, seen: Callable[[int, events.Event], None] | None = None) -> list[events.Event]:
        """The run's events to its end; `seen` is told each as it comes, and may kill the coordinator."""
        found: list[events.Event] = []
        while True:
            try:
                with self.control() as control:
                    for number, line in control.watch(run, len(found)):
                        found.append(events.from_json(line)[0])
                        if seen is not None:
                            seen(number, found[-1])
                    if control.show(run).summary.status not in {"queued", "running"}:
                        return found
            except LinkError:
                # Killed by the test, or by a thread of it: whoever did that starts it again.
                if not self._listening.wait(60):
                    raise

    def model(self, run: str) -> bytes:
        """The run's final model: safetensors bytes."""
        with self.control() as control:
            out = self.folder / "models" / run
            out.mkdir(parents=True)
            return control.model(run, out).read_bytes()

    def _start(self, name: str, *words: str) -> Logged:
        command = (*FEDLEARN, words[0], "--tls", str(self.tls[name]), *words[1:], *self._app)
        return self._keep(name, self.processes.start(*command))

    def _keep(self, name: str, started: Logged) -> Logged:
        self.running[name] = started
        self.logs.append(started)
        return started


def children(pid: int) -> list[int]:
    """Processes that a process started and that run."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def wait_for_end(pids: Sequence[int], timeout_s: float = 10.0) -> bool:
    """True when all processes have ended within the time each."""
    return all(_ended(pid, timeout_s) for pid in pids)


def _ended(pid: int, timeout_s: float) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(handle)


def secrets_in(folder: Path) -> Iterator[str]:
    """Lines of every private key below a folder, as they would look in a log."""
    for path in sorted(folder.rglob("*.key")) + sorted(folder.rglob("key.pem")):
        yield from (line for line in path.read_text().splitlines() if line and not line.startswith("-----"))
