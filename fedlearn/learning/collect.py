"""From updates that arrive in any order to one aggregate: a sum for linear strategies, a stack for the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from fedlearn.aggregation.linear import IntegerSum, quantum_bits_for
from fedlearn.aggregation.stack import UpdateStack
from fedlearn.arrays import Arrays, Spec, size_bytes, specs_of
from fedlearn.errors import UpdateError
from fedlearn.learning.strategy import Strategy
from fedlearn.learning.update import DELTA, UNCLIPPED, Aggregate, Release, Update, Weighting

MAX_EXAMPLES = 2**40
"""A client's count of examples is somebody's claim; this bounds what it can do to the weighted mean's headroom."""


@dataclass(frozen=True)
class PartialSum:
    """The weighted sum of several clients' updates, as a block of a simulation gives it.

    Args:
        sums: release name to its sum.
        examples: training examples by client; the clients of the sum.
    """

    sums: Mapping[str, IntegerSum] = field(repr=False)
    examples: Mapping[str, int]

    def checksum(self) -> str:
        """A fast checksum over everything in it. Not cryptographic."""
        state = xxhash.xxh3_128(repr(sorted(self.examples.items())).encode())
        for release in sorted(self.sums):
            for name, total in sorted(self.sums[release].integers().items()):
                state.update(f"{release}/{name};".encode())
                state.update(np.ascontiguousarray(total).data.cast("B") if total.size else b"")
        return state.hexdigest()


class Collector(Protocol):
    """Takes updates, gives their aggregate."""

    def add(self, client: str, update: Update) -> None:
        """Take one update. Either the whole of it is taken, or an `UpdateError` is raised and nothing has changed."""
        ...

    def merge(self, partial: PartialSum) -> None:
        """Take the sum of several updates. Either the whole of it is taken, or an `UpdateError` is raised."""
        ...

    def aggregate(self, population: int) -> Aggregate:
        """The aggregate of what was added, at least one update with a positive weight."""
        ...

    def close(self) -> None:
        """Free memory and files. May be called again; nothing else may be called after it."""
        ...


def collector_for(strategy: Strategy, model: Arrays, *, counted: bool = False) -> Collector:
    """The collector that fits a strategy, for updates shaped like `model`; `counted` as `release_specs` has it."""
    specs = specs_of(model)
    return SumCollector(strategy, specs, counted=counted) if strategy.linear else StackCollector(strategy, specs)


def release_specs(
    strategy: Strategy, specs: Mapping[str, Spec], *, counted: bool = False
) -> Mapping[Release, Mapping[str, Spec]]:
    """Everything that an update holds, and its arrays.

    Args:
        strategy: releases arrays like the model's.
        specs: the model's.
        counted: a bit goes with each update, see `fedlearn.privacy.clipping.Contribute`.
    """
    found: dict[Release, Mapping[str, Spec]] = dict.fromkeys(strategy.releases, specs)
    if counted:
        from fedlearn.privacy.clipping import COUNT

        found[Release(UNCLIPPED, Weighting.UNIFORM)] = {COUNT: Spec((1,), "float32")}
    return found


class SumCollector:
    """One running integer sum a release: memory does not grow with the number of clients."""

    def __init__(self, strategy: Strategy, specs: Mapping[str, Spec], *, counted: bool = False) -> None:
        held = release_specs(strategy, specs, counted=counted)
        self._releases = tuple(held)
        self._sums = {release.name: IntegerSum(these, quantum_bits_for(these)) for release, these in held.items()}
        self._clients: set[str] = set()
        self._examples = 0

    def add(self, client: str, update: Update) -> None:
        _check_update(client, update, tuple(r.name for r in self._releases), self._clients)
        weights = {r.name: update.examples if r.weighting is Weighting.EXAMPLES else 1 for r in self._releases}
        if len(self._sums) > 1:  # all releases enter, or none
            for name, total in self._sums.items():
                total.check(update.private[name], weights[name])
        for name, total in self._sums.items():
            total.add(update.private[name], weights[name])
        self._clients.add(client)
        self._examples += update.examples

    def merge(self, partial: PartialSum) -> None:
        if sorted(partial.sums) != sorted(self._sums):
            raise UpdateError(f"partial sum: releases {sorted(partial.sums)}, expected {sorted(self._sums)}")
        if twice := self._clients & partial.examples.keys():
            raise UpdateError(f"partial sum: client {min(twice)!r} is in this round's sum already")
        for name, total in self._sums.items():
            total.check_merge(partial.sums[name])
        for name, total in self._sums.items():
            total.merge(partial.sums[name])
        self._clients.update(partial.examples)
        self._examples += sum(partial.examples.values())

    @property
    def clients(self) -> int:
        """How many updates are in it."""
        return len(self._clients)

    @property
    def rounding_l2(self) -> float:
        """The most by which the sums' rounding can lengthen one update, in joint L2 norm."""
        return math.hypot(*(total.rounding_l2 for total in self._sums.values()))

    @property
    def sums(self) -> Mapping[str, IntegerSum]:
        """The running sums by release."""
        return self._sums

    def totals(self) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        """The exact sums by release, in float64."""
        return {name: total.total() for name, total in self._sums.items()}

    def aggregate(self, population: int) -> Aggregate:
        means = {name: total.mean() for name, total in self._sums.items()}
        return Aggregate(means, clients=len(self._clients), population=population, examples=self._examples)

    def close(self) -> None:
        self._sums.clear()


class StackCollector:
    """All updates on disk, for robust strategies. There is no file before the first update."""

    def __init__(self, strategy: Strategy, specs: Mapping[str, Spec]) -> None:
        self._strategy = strategy
        self._specs = specs
        self._stack: UpdateStack | None = None
        self._clients: set[str] = set()

    def add(self, client: str, update: Update) -> None:
        _check_update(client, update, (DELTA,), self._clients)
        if self._stack is None:
            self._stack = UpdateStack(self._specs)
        self._stack.add(client, update.private[DELTA], update.examples)
        self._clients.add(client)

    def merge(self, partial: PartialSum) -> None:  # noqa: ARG002  # protocol
        raise UpdateError(f"partial sum: strategy {self._strategy.name!r} needs each client's update by itself")

    def aggregate(self, population: int) -> Aggregate:
        if self._stack is None:
            raise UpdateError("updates: none arrived; expected at least one")
        centre = self._strategy.aggregate_stack(self._stack)
        return Aggregate({DELTA: centre}, len(self._stack), population, self._stack.examples)

    def close(self) -> None:
        if self._stack is not None:
            self._stack.close()


def _check_update(client: str, update: Update, releases: tuple[str, ...], seen: set[str]) -> None:
    if client in seen:
        raise UpdateError(f"update: client {client!r} sent a second one in this round")
    if tuple(sorted(update.private)) != tuple(sorted(releases)):
        raise UpdateError(
            f"update: releases {sorted(update.private)}, expected {sorted(releases)}",
            hint="the client runs another strategy than the study names",
        )
    if not 0 < update.examples <= MAX_EXAMPLES:
        raise UpdateError(
            f"update: {update.examples} training examples, expected 1 to {MAX_EXAMPLES}",
            hint="a client without training rows has nothing to add to the mean",
        )


def update_size(update: Update) -> int:
    """Bytes of everything in it."""
    return sum(size_bytes(arrays) for arrays in update.private.values())


def update_checksum(update: Update) -> str:
    """A fast checksum over everything in an update: equal updates have equal ones. Not cryptographic."""
    state = xxhash.xxh3_128(f"{update.examples}".encode())
    for release in sorted(update.private):
        for name in sorted(update.private[release]):
            array = np.ascontiguousarray(update.private[release][name])
            state.update(f"{release}/{name}:{array.dtype}:{array.shape};".encode())
            state.update(array.data.cast("B") if array.size else b"")
    return state.hexdigest()
