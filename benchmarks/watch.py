"""What a process costs: CPU time by round, memory, and the processor's measured limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


class Watch:
    """Notes the CPU time at the end of each round."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self._marks = [clock()]
        self._walls = [time.monotonic()]
        self.resident_mb: list[float] = []

    def lap(self) -> None:
        self._marks.append(self._clock())
        self._walls.append(time.monotonic())
        self.resident_mb.append(status_mb("VmRSS"))

    @property
    def cpu_s(self) -> list[float]:
        return np.diff(self._marks).tolist()

    @property
    def wall_s(self) -> list[float]:
        return np.diff(self._walls).tolist()


def status_mb(key: str, pid: int | str = "self") -> float:
    """A size from /proc, which starts anew at exec, as getrusage's does not."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def family() -> list[int]:
    """This process and all that descend from it."""
    parent = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    mine = {os.getpid()}
    while found := {pid for pid, above in parent.items() if above in mine} - mine:
        mine |= found
    return sorted(mine)


def cpu_s_of(pid: int) -> float:
    """User and system time of a process, and of its children that were waited for; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(f) for f in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def family_cpu_s() -> float:
    """Of this process and all that descend from it."""
    return sum(map(cpu_s_of, family()))


def gflops() -> float:
    """The processor's measured limit: single-precision products of 1024 x 1024 matrices on one thread, best of ten."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(10):
        began = time.process_time()
        for _ in range(5):
            torch.mm(a, b)
        best = max(best, 5 * 2 * 1024**3 / (time.process_time() - began) / 1e9)
    return best
