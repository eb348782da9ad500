"""Which backend does the clients' work of a simulation."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from fedlearn.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from fedlearn.learning.backend import Backend
    from fedlearn.learning.memory import Memories
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Population
    from fedlearn.study import Study

BACKENDS: Final = ("auto", "sequential")
"""`auto` chooses."""


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

    Raises:
        UnsupportedError: the name is unknown, or the backend cannot do this study.
    """
    from fedlearn.simulation.sequential import SequentialBackend

    check_backend(name)
    del workers  # one client after another
    return SequentialBackend(study, population, strategy, device, memories)
