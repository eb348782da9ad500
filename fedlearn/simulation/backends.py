"""Which backend does the clients' work of a simulation."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Final

from fedlearn.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from fedlearn.learning.backend import Backend
    from fedlearn.learning.memory import Memories
    from fedlearn.learning.population import Population
    from fedlearn.learning.strategy import Strategy
    from fedlearn.study import Study

BACKENDS: Final = ("auto", "sequential", "batched", "ray")
"""`auto` chooses: see `chosen`. `ray` is the batched one on many processes or machines."""
SEQUENTIAL_COHORT: Final = 8
"""`auto` trains cohorts of up to so many clients one after another, to the bytes of a real federation: there is little to gain."""


def check_backend(name: str) -> None:
    """Refuse an unknown backend's name.

    Raises:
        UnsupportedError: names the nearest one.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        raise UnsupportedError(
            f"backend {name!r}: expected {', '.join(BACKENDS)}", hint=f"did you mean {near[0]!r}?" if near else ""
        )


def make_backend(
    name: str,
    study: Study,
    population: Population,
    strategy: Strategy,
    *,
    device: torch.device | str,
    workers: int | None,
    memories: Memories,
    address: str | None = None,
) -> Backend:
    """The backend of a name.

    Args:
        name: one of `BACKENDS`.
        study: local hyper-parameters and seed.
        population: everybody's data.
        strategy: the client rule.
        device: where to train.
        workers: threads or processes that train at the same time; None for as many as there are cores. Results do not depend on it.
        memories: of a stateful strategy's clients.
        address: of a running Ray cluster; None starts Ray on this machine.

    Raises:
        UnsupportedError: the name is unknown, or what the backend needs is not installed.
    """
    check_backend(name)
    if address is not None and name != "ray":
        raise UnsupportedError(f"address {address!r} with backend {name!r}", hint="an address goes with --backend ray")
    if name == "auto":
        name = chosen(study, len(population.rows))
    if name == "sequential":
        from fedlearn.simulation.sequential import SequentialBackend

        return SequentialBackend(study, population, strategy, device, memories)
    if name == "ray":
        from fedlearn.simulation.ray_backend import RayBackend

        return RayBackend(study, population, strategy, device, workers, memories, address)
    from fedlearn.simulation.batched import BatchedBackend

    return BatchedBackend(study, population, strategy, device, workers, memories)


def chosen(study: Study, population: int) -> str:
    """What `auto` stands for in a study with so many clients; of cohorts drawn by coins the expected size counts."""
    expected = math.ceil(study.cohort.rate * population) if study.cohort.rate is not None else study.cohort.size
    cohort = min(expected or population, population)
    return "sequential" if cohort <= SEQUENTIAL_COHORT else "batched"
