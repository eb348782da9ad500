"""The world around virtual clients: who is there, how fast each is, who vanishes, and when a round ends.

Pure functions of (seed, round, client) and, for availability, of virtual time; vectorised over clients, nothing is kept a client. A client is
its place among the study's sorted ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.environment import DeviceTable, EnvironmentTable
from fedlearn.learning.cohort import pick_cohort
from fedlearn.learning.rows import IntArray, SortedIds
from fedlearn.release.keys import AttemptId
from fedlearn.simulation.order import RandomOrder
from fedlearn.simulation.trace import Trace, read_trace

LOOK_S: Final = 900.0
"""Where too few clients are there, the coordinator looks again after so many virtual seconds."""
MAX_LOOKS: Final = 7 * 24 * 4
"""A week of looks."""
VOID_S: Final = 600.0
"""What a void attempt costs where the study has no deadline, virtual seconds."""
_CHUNK: Final = 1_024

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Drawn:
    """Who is asked in an attempt.

    Args:
        clients: their ids, sorted.
        numbers: their places among all ids, shape (clients,).
        unavailable: who was drawn before the cohort was full, and was not there.
        waited_s: virtual seconds until enough clients were there.
    """

    clients: tuple[str, ...]
    numbers: IntArray = field(repr=False)
    unavailable: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class Loads:
    """What each client of a round has to move and to do; shape (clients,) each."""

    bytes_down: IntArray
    examples: IntArray
    bytes_up: IntArray


@dataclass(frozen=True)
class Course:
    """What a round would be for each client if it never ended, in virtual seconds from its start; shape (clients,) each.

    Args:
        download_s: when its download begins and ends, shape (2, clients).
        upload_s: when its upload begins and ends, shape (2, clients).
        vanishes_s: when it is lost; infinite for those that are not.
    """

    download_s: Floats
    upload_s: Floats
    vanishes_s: Floats


@dataclass(frozen=True)
class Close:
    """How a round ended.

    Args:
        seconds: its length, virtual.
        arrived: whose update is in, shape (clients,).
        dropped: who vanished before that; everybody else came too late.
        bytes_down: moved by then, all clients together.
        bytes_up: moved by then.
    """

    seconds: float
    arrived: Bools = field(repr=False)
    dropped: Bools = field(repr=False)
    bytes_down: int = 0
    bytes_up: int = 0


class Environment:
    """The world of one study.

    Args:
        table: the study's [environment].
        seed: the study's.
        ids: of all clients.

    Raises:
        DataError: the trace cannot be read.
    """

    def __init__(self, table: EnvironmentTable, seed: int, ids: SortedIds) -> None:
        self._table, self._seed, self._ids = table, seed, ids
        # By name: a study that comes back from its canonical JSON has its tables in another order.
        self._classes = tuple(device for _, device in sorted(table.devices.items())) or (DeviceTable(),)
        there = table.availability
        self._trace: Trace | None = read_trace(there.trace) if there.kind == "trace" else None

    @property
    def void_s(self) -> float:
        """What an attempt costs that ends without a sum, virtual seconds."""
        return self._table.deadline_s or VOID_S

    def draw(self, at: AttemptId, size: int | None, needed: int, time_s: float) -> Drawn:
        """The cohort of an attempt: an equal chance for everybody who is there.

        Where all are always there it is the cohort of the study without an environment.

        Args:
            at: round and attempt.
            size: of the cohort; None for everybody.
            needed: wait until so many are there, a week at the most; fewer are given where that did not help.
            time_s: virtual seconds since the run began.
        """
        if size is not None:
            size = math.ceil(size * self._table.over_selection)
        if self._table.availability.kind == "always":
            clients = pick_cohort(self._ids, size, self._seed, "train", at.round)
            return Drawn(clients, self._numbers(clients))
        needed = min(needed, len(self._ids))
        for look in range(MAX_LOOKS):
            numbers, passed = self._look(at, look, size, time_s + look * LOOK_S)
            if len(numbers) >= needed:
                break
        numbers = np.sort(numbers)
        return Drawn(tuple(map(self._ids.at, numbers.tolist())), numbers, passed, look * LOOK_S)

    def available(self, numbers: IntArray, at: AttemptId, look: int, time_s: float) -> Bools:
        """Who of these is there when the coordinator looks."""
        there = self._table.availability
        if self._trace is not None:
            return self._trace.present(self._recorded(numbers, self._trace), self._table.start_hour * 3600 + time_s)
        if there.kind == "always":
            return np.ones(len(numbers), dtype=bool)
        chance = np.full(len(numbers), there.chance)
        if there.kind == "diurnal":
            zone = np.floor(self._uniform(numbers, "zone")[:, 0] * there.time_zones)
            hours = self._table.start_hour + time_s / 3600 + zone - there.peak_hour
            height = (1 + np.cos(hours * (2 * np.pi / 24))) / 2
            chance = there.lowest + (there.highest - there.lowest) * height
        return self._uniform(numbers, "available", at.round, at.attempt, look)[:, 0] < chance

    def course(self, numbers: IntArray, at: AttemptId, loads: Loads) -> Course:
        """How the round would go for each of these clients."""
        kinds = self._kinds(numbers)
        steady = self._normal(numbers, 2, "speed")
        compute = kinds["examples_per_s"] * np.exp(kinds["compute_spread"] * steady[:, 0])
        network = np.exp(kinds["network_spread"] * steady[:, 1])
        latency = kinds["latency_s"]
        slow = np.exp(self._table.jitter * self._normal(numbers, 1, "jitter", at.round, at.attempt)[:, 0])
        down_s = loads.bytes_down * 8e-6 / (kinds["download_mbit_s"] * network)
        up_s = loads.bytes_up * 8e-6 / (kinds["upload_mbit_s"] * network)
        steps = np.cumsum([latency, down_s, loads.examples / compute, latency, up_s], axis=0) * slow
        chances = self._uniform(numbers, "dropout", at.round, at.attempt, draws=2)
        vanishes = np.where(chances[:, 0] < self._table.dropout, chances[:, 1] * steps[4], np.inf)
        return Course(steps[:2], steps[3:], vanishes)

    def close(self, course: Course, loads: Loads, size: int | None) -> Close:
        """When the round ends, and who is in it then.

        It ends when `size` updates are in (all that can come, without over-selection), when nobody is left to wait for, or at
        the deadline.

        Args:
            course: of the clients that were asked.
            loads: theirs.
            size: how many updates the study wants; None for all.
        """
        done = np.where(np.isfinite(course.vanishes_s), np.inf, course.upload_s[1])
        settled = np.minimum(course.upload_s[1], course.vanishes_s)
        wanted = len(done) if size is None else min(size, len(done))
        end = float(np.sort(done)[wanted - 1]) if wanted else 0.0
        end = min(end, float(settled.max(initial=0.0)), self._table.deadline_s or math.inf)
        until = np.minimum(settled, end)
        arrived = np.zeros(len(done), dtype=bool)
        arrived[np.argsort(done, kind="stable")[:wanted]] = (
            True  # of those that are done at the same time, the first ones
        )
        return Close(
            end,
            arrived & (done <= end),
            course.vanishes_s <= end,
            _moved(loads.bytes_down, course.download_s, until),
            _moved(loads.bytes_up, course.upload_s, until),
        )

    def _look(self, at: AttemptId, look: int, size: int | None, time_s: float) -> tuple[IntArray, int]:
        """The first `size` clients, in a random order, that are there, and how many before them are not."""
        count = len(self._ids)
        if size is None:
            everybody = np.arange(count, dtype=np.int64)
            there = self.available(everybody, at, look, time_s)
            return everybody[there], count - int(there.sum())
        order = RandomOrder(count, self._seed, "environment", "cohort", at.round)
        found: list[IntArray] = []
        missing, passed, start = size, 0, 0
        while missing > 0 and start < count:
            numbers = order.take(start, min(count, start + max(_CHUNK, 2 * start)))
            start += len(numbers)
            places = np.flatnonzero(self.available(numbers, at, look, time_s))[:missing]
            last = len(numbers) if len(places) < missing else int(places[-1]) + 1
            passed += last - len(places)
            missing -= len(places)
            found.append(numbers[places])
        return np.concatenate([*found, np.empty(0, dtype=np.int64)]), passed

    def _recorded(self, numbers: IntArray, trace: Trace) -> IntArray:
        """Whose record each client follows: its own, or one that is drawn once for it."""
        drawn = (self._uniform(numbers, "trace")[:, 0] * len(trace.ids)).astype(np.int64)
        names = map(self._ids.at, numbers.tolist())
        own = [trace.ids.number(name) if name in trace.ids else other for name, other in zip(names, drawn, strict=True)]
        return np.array(own, dtype=np.int64)

    def _kinds(self, numbers: IntArray) -> dict[str, Floats]:
        """Each client's class of device, field by field."""
        ends = np.cumsum([one.share for one in self._classes])
        mine = np.searchsorted(ends / ends[-1], self._uniform(numbers, "device")[:, 0], side="right")
        return {
            name: np.array([getattr(one, name) for one in self._classes])[mine] for name in DeviceTable.model_fields
        }

    def _uniform(self, numbers: IntArray, *path: str | int, draws: int = 1) -> Floats:
        return seeds.hashed_uniform(self._seed, numbers, draws, "environment", *path)

    def _normal(self, numbers: IntArray, draws: int, *path: str | int) -> Floats:
        """Standard normal numbers, shape (clients, draws), by Box and Muller's transform."""
        uniform = self._uniform(numbers, *path, draws=2 * draws)
        radius = np.sqrt(-2 * np.log1p(-uniform[:, :draws]))
        normal: Floats = radius * np.cos(2 * np.pi * uniform[:, draws:])
        return normal

    def _numbers(self, clients: Sequence[str]) -> IntArray:
        return np.array([self._ids.number(client) for client in clients], dtype=np.int64)


def _moved(size_bytes: IntArray, span_s: Floats, until_s: Floats) -> int:
    """How much of these transfers is done at a time, in whole bytes."""
    start, end = span_s
    share = np.clip((until_s - start) / np.maximum(end - start, 1e-300), 0, 1)
    share[until_s >= end] = 1
    return int(np.floor(size_bytes * share).sum())
