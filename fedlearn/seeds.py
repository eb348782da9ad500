"""Derived seeds: every draw in seeded mode comes from its place in the study, never from a global generator.

`derive(run_seed, *path)` hashes the run's seed with a path such as `("round", 3, "client", "cleveland", "batches")`.
Two paths give independent streams, and the stream of one client does not depend on who else took part, on the number of
workers, or on the order of arrival. Seeded mode is for rehearsal and reproduction; what a privacy proof assumes secret
is drawn from the operating system instead.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_DOMAIN = b"fedlearn/seed/v1"


def derive(run_seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose.

    Each part of the path is hashed with its type and length, so no two paths collide by concatenation.

    Args:
        run_seed: the study's seed; any integer from 0 to 2**63 - 1.
        path: names and numbers that say what is drawn, for whom and when.

    Returns:
        An integer from 0 to 2**63 - 1, accepted by numpy's and torch's generators.
    """
    if not 0 <= run_seed < 2**63:
        raise ValueError(f"run_seed: got {run_seed}, expected 0 to 2**63 - 1")
    digest = hashlib.sha256(_DOMAIN + run_seed.to_bytes(8, "big"))
    for part in path:
        data = part.encode() if isinstance(part, str) else str(part).encode()
        digest.update((b"s" if isinstance(part, str) else b"i") + len(data).to_bytes(4, "big") + data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, *path: str | int) -> np.random.Generator:
    """A numpy generator (PCG64) seeded by `derive`."""
    return np.random.default_rng(derive(run_seed, *path))


def torch_generator(run_seed: int, *path: str | int) -> torch.Generator:
    """A torch CPU generator seeded by `derive`."""
    import torch

    return torch.Generator().manual_seed(derive(run_seed, *path))
