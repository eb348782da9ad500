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
    import numpy.typing as npt
    import torch

_DOMAIN = b"fedlearn/seed/v1"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


def hashed_bits(run_seed: int, numbers: npt.NDArray[np.int64], draws: int, *path: str | int) -> npt.NDArray[np.uint64]:
    """Random bits for many clients at once: each one's are a function of the seed, the path and its own number.

    SplitMix64 (Steele, Lea and Flood 2014, figure 16) twice: once for where a client's stream starts, once along the stream. A
    generator a client would cost twenty microseconds, this costs nanoseconds.

    Args:
        run_seed: the study's seed.
        numbers: of the clients, from 0, shape (n,).
        draws: how many for each.
        path: what is drawn and when.

    Returns:
        uint64, shape (n, draws).
    """
    key = np.uint64(derive(run_seed, *path))
    starts = mix(np.asarray(numbers).astype(np.uint64) * _GOLDEN + key)
    return mix(starts[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN)


def hashed_uniform(
    run_seed: int, numbers: npt.NDArray[np.int64], draws: int, *path: str | int
) -> npt.NDArray[np.float64]:
    """`hashed_bits` as numbers from 0 to below 1."""
    high = hashed_bits(run_seed, numbers, draws, *path) >> np.uint64(11)
    return high.astype(np.float64) * 2.0**-53


def mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a permutation of 64-bit numbers in which every bit depends on every other."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
