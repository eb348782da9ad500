"""Shamir's secret sharing over the prime field of p = 2**256 + 297, the smallest prime above every 32-byte secret.

A secret is the constant term of a polynomial of degree t - 1 with uniform coefficients; the share of holder x (1, 2, ...) is its value at x. Any t
shares give the secret, fewer give nothing (Shamir 1979). A share travels as 33 bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.primitives import SECRET_BYTES, Draw

PRIME: Final = 2**256 + 297
SHARE_BYTES: Final = 33
_DRAW_BYTES: Final = 40
"""320 bits reduced mod p: 63 bits more than p has, so the bias of a coefficient is below 2**-63."""
SUBSET_LIMIT: Final = 2_000
"""The most subsets of shares that are tried when some are false."""


def split(secret: bytes, threshold: int, holders: int, draw: Draw) -> list[bytes]:
    """The shares of holders 1 to `holders`, 33 bytes each; any `threshold` of them give the secret.

    Args:
        secret: 32 bytes.
        threshold: 1 to `holders`.
        holders: how many.
        draw: a CSPRNG.

    Raises:
        ValueError: a secret of another length, or a threshold out of range.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ValueError(f"shamir: got {len(secret)} bytes and threshold {threshold} of {holders} holders")
    random = draw(_DRAW_BYTES * (threshold - 1))
    falling = [int.from_bytes(random[i : i + _DRAW_BYTES], "big") % PRIME for i in range(0, len(random), _DRAW_BYTES)]
    falling.append(int.from_bytes(secret, "big"))
    return [_value(falling, x).to_bytes(SHARE_BYTES, "big") for x in range(1, holders + 1)]


def _value(falling: Sequence[int], x: int) -> int:
    # Horner's rule, reduced once: x is small, so a reduction at every step would cost more than the longer numbers.
    total = 0
    for coefficient in falling:
        total = total * x + coefficient
    return total % PRIME


def check_share(share: bytes) -> bytes:
    """The share as it is.

    Raises:
        SecureAggregationError: BAD_SHARE: not 33 bytes, or not below p.
    """
    if len(share) != SHARE_BYTES or int.from_bytes(share, "big") >= PRIME:
        raise SecureAggregationError(Breach.BAD_SHARE, f"got a share of {len(share)} bytes that is no field element")
    return share


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange's weights: the polynomial's value at `at` (no point of its own) is their sum of products with the values at `points`."""
    places = np.array(points, dtype=np.int64)
    differences = places[:, None] - places[None, :]
    np.fill_diagonal(differences, at - places)
    # Differences are small, so as many as fit an int64 are multiplied by numpy before Python's long integers take over.
    group = 62 // max(points[-1] - points[0], abs(at - points[0]), abs(at - points[-1]), 1).bit_length()
    padded = np.ones((len(points), -(-len(points) // group) * group), dtype=np.int64)
    padded[:, : len(points)] = differences
    products = padded.reshape(len(points), -1, group).prod(axis=2).tolist()
    inverses = _inverses([math.prod(row) % PRIME for row in products])
    over = math.prod(at - x for x in points)
    return tuple(over * inverse % PRIME for inverse in inverses)


def _inverses(values: list[int]) -> list[int]:
    """The inverses of all, at the price of one (Montgomery's trick)."""
    before = list(itertools.accumulate(values, lambda a, b: a * b % PRIME, initial=1))
    rest = pow(before[-1], -1, PRIME)
    found = [0] * len(values)
    for i in range(len(values) - 1, -1, -1):
        found[i] = rest * before[i] % PRIME
        rest = rest * values[i] % PRIME
    return found


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The 32-byte secret that these shares give, all of them used; None when they give no 32-byte secret.

    Args:
        shares: by holder (1, 2, ...); exactly the threshold's number.
    """
    points = tuple(sorted(shares))
    total = sum(w * int.from_bytes(shares[x], "big") for w, x in zip(_weights(points, 0), points, strict=True))
    secret = total % PRIME
    return secret.to_bytes(SECRET_BYTES, "big") if secret < 2 ** (8 * SECRET_BYTES) else None


def subsets(holders: Sequence[int], threshold: int) -> Iterator[tuple[int, ...]]:
    """Sets of `threshold` holders in the order in which to try them: windows first, which leave one liar out, then all others."""
    ordered = sorted(holders)
    if len(ordered) < threshold:
        return
    twice = ordered + ordered
    seen = set()
    for start in range(len(ordered)):
        window = tuple(sorted(twice[start : start + threshold]))
        if window not in seen:
            seen.add(window)
            yield window
    for some in itertools.islice(itertools.combinations(ordered, threshold), SUBSET_LIMIT):
        if some not in seen:
            yield some


def liars(shares: Mapping[int, bytes], good: tuple[int, ...]) -> tuple[int, ...]:
    """The holders whose shares are not on the polynomial that the good ones give."""
    found = []
    for x in sorted(shares.keys() - set(good)):
        total = sum(w * int.from_bytes(shares[g], "big") for w, g in zip(_weights(good, x), good, strict=True))
        if total % PRIME != int.from_bytes(shares[x], "big"):
            found.append(x)
    return tuple(found)
