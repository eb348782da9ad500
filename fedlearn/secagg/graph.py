"""Who shares a mask with whom, and how many shares open a secret: recomputed by every client, never chosen by the server.

Up to `COMPLETE_LIMIT` clients everyone is everyone's neighbour, and everyone holds a share of its own secrets too. Above, the graph is a ring in a
random order in which everyone's neighbours are the k nearest (a Harary graph): Bell et al. 2020, "Secure single-server aggregation with
(poly)logarithmic overhead", section 3, with the exact tail sums instead of their bounds, as in the parameter finder of Google's
federated-compute. All arithmetic is in integers, so no rounding can make two sites disagree.

The threshold t is semi-malicious: 2t exceeds the holders plus the adversarial ones among them. A server that asks some holders for a client's one
share and others for its other share can then never have t of both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from fedlearn.errors import UnsupportedError

COMPLETE_LIMIT: Final = 200
CLIENTS_LIMIT: Final = 10_000
CLIENTS_LEAST: Final = 3
DEGREE_LIMIT: Final = 1_000
SECURITY_BITS: Final = 40
CORRECTNESS_BITS: Final = 20
PPM: Final = 1_000_000
"""Rates are held in parts per million."""


@dataclass(frozen=True)
class Parameters:
    """What n and the assumed rates give.

    Args:
        clients: n.
        degree: neighbours of each client.
        holders: who hold shares of one client's secrets: its neighbours, in a complete graph itself too.
        threshold: shares that open a secret.
        adversarial: adversarial clients among one client's holders that the threshold allows for.
    """

    clients: int
    degree: int
    holders: int
    threshold: int
    adversarial: int

    @property
    def complete(self) -> bool:
        """Everyone is everyone's neighbour."""
        return self.degree == self.clients - 1


@lru_cache(maxsize=256)
def parameters(clients: int, adversarial_ppm: int, dropout_ppm: int) -> Parameters:
    """Degree and threshold for a roster of `clients`.

    In a complete graph at least one client is taken for adversarial, whatever the rate says. Four clients survive one dropout; three none.

    Raises:
        UnsupportedError: fewer than three clients, more than `CLIENTS_LIMIT`, or no safe threshold survives the assumed dropouts.
    """
    if not CLIENTS_LEAST <= clients <= CLIENTS_LIMIT:
        raise UnsupportedError(
            f"secure aggregation of {clients} clients: got {clients}, expected {CLIENTS_LEAST} to {CLIENTS_LIMIT}",
            hint="a sum of one or two updates hides nothing from the other one",
        )
    if clients > COMPLETE_LIMIT:
        degree, threshold, adversarial = sparse_parameters(clients, adversarial_ppm, dropout_ppm)
        return Parameters(clients, degree, degree, threshold, adversarial)
    adversarial = max(1, clients * adversarial_ppm // PPM)
    threshold = (clients + adversarial) // 2 + 1
    if threshold > clients - clients * dropout_ppm // PPM:
        raise _infeasible(clients, adversarial_ppm, dropout_ppm, f"{threshold} of {clients} must stay")
    return Parameters(clients, clients - 1, clients, threshold, adversarial)


def sparse_parameters(
    clients: int, adversarial_ppm: int, dropout_ppm: int, *, semi_malicious: bool = True
) -> tuple[int, int, int]:
    """The smallest even degree that is safe, its threshold, and the adversarial neighbours that it allows for.

    Three events are excluded (n clients, A adversarial, S surviving, degree k):
    the honest survivors' graph falls apart: n(n-k-1)/2 * C(A+D, k) / C(n, k) < 2**-41;
    a client has more than t1 adversarial neighbours: Pr[Hyp(n, A, k) > t1] <= 2**-41 / n;
    a client has fewer than t2 surviving neighbours: Pr[Hyp(n, S, k) < t2] <= 2**-20 / n.

    Args:
        clients: n.
        adversarial_ppm: assumed at most, in parts per million.
        dropout_ppm: assumed at most.
        semi_malicious: False gives the thresholds against a server that only looks. The protocol never does; published test vectors do.

    Raises:
        UnsupportedError: there is none.
    """
    weight = 2 if semi_malicious else 1
    if clients < 1 or min(adversarial_ppm, dropout_ppm) < 0 or adversarial_ppm + weight * dropout_ppm > 0.9 * PPM:
        raise _infeasible(clients, adversarial_ppm, dropout_ppm, "the rates are too high")
    bad = clients * adversarial_ppm // PPM
    gone = clients * dropout_ppm // PPM
    for degree in range(2, min(clients - 1, DEGREE_LIMIT + 1), 2):
        ways = math.comb(clients, degree)
        gaps = clients * (clients - degree - 1) * math.comb(bad + gone, degree)
        if gaps << SECURITY_BITS >= ways:
            continue
        t1 = _upper(clients, bad, degree, ways // (clients << (SECURITY_BITS + 1)))
        t2 = degree - _upper(clients, gone, degree, ways // (clients << CORRECTNESS_BITS))
        threshold = max(2, (degree + t1) // 2 + 1 if semi_malicious else t1 + 1)
        if threshold <= t2:
            return degree, threshold, t1
    raise _infeasible(clients, adversarial_ppm, dropout_ppm, f"no degree up to {DEGREE_LIMIT} is safe")


def _upper(clients: int, marked: int, degree: int, allowed: int) -> int:
    """The smallest t such that more than t marked neighbours happen in at most `allowed` of the C(n, k) ways."""
    top = min(degree, marked)
    term = math.comb(marked, top) * math.comb(clients - marked, degree - top)
    total = 0
    for i in range(top, 0, -1):
        total += term
        if total > allowed:
            return i
        term = term * i * (clients - marked - degree + i) // ((marked - i + 1) * (degree - i + 1))
    return 0


def _infeasible(clients: int, adversarial_ppm: int, dropout_ppm: int, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"secure aggregation of {clients} clients with {adversarial_ppm / PPM:g} adversarial and {dropout_ppm / PPM:g} dropped"
        f" is not possible: {why}",
        hint="assume lower rates, or bring more clients",
    )


@dataclass(frozen=True)
class Graph:
    """The neighbours of n clients, by their place on the roster, 0 to n - 1.

    Args:
        parameters: degree and threshold.
        seed: orders the ring of a sparse graph; empty for a complete one.
    """

    parameters: Parameters
    seed: bytes = b""

    @property
    def threshold(self) -> int:
        """Shares that open a secret."""
        return self.parameters.threshold

    def neighbours(self, index: int) -> tuple[int, ...]:
        """Who share a mask with this client, sorted."""
        return self._neighbours[index]

    def holders(self, index: int) -> tuple[int, ...]:
        """Who hold a share of this client's secrets, sorted; the first has the point 1, the next 2, and so on."""
        return tuple(range(self.parameters.clients)) if self.parameters.complete else self._neighbours[index]

    def holder_set(self, index: int) -> int:
        """`holders` as a set of bits."""
        return (1 << self.parameters.clients) - 1 if self.parameters.complete else self._sets[index]

    def point(self, owner: int, holder: int) -> int:
        """At which point the holder's share of the owner's secrets lies."""
        return holder + 1 if self.parameters.complete else self._neighbours[owner].index(holder) + 1

    @cached_property
    def _neighbours(self) -> tuple[tuple[int, ...], ...]:
        n, degree = self.parameters.clients, self.parameters.degree
        if self.parameters.complete:
            return tuple(tuple(j for j in range(n) if j != i) for i in range(n))
        # Sorting by a hash that nobody can steer is a uniform permutation.
        ring = sorted(range(n), key=lambda i: hashlib.sha256(self.seed + i.to_bytes(4, "big")).digest())
        steps = [s for s in range(-degree // 2, degree // 2 + 1) if s]
        found: list[tuple[int, ...]] = [()] * n
        for place, index in enumerate(ring):
            found[index] = tuple(sorted(ring[(place + s) % n] for s in steps))
        return tuple(found)

    @cached_property
    def _sets(self) -> tuple[int, ...]:
        return tuple(to_bits(neighbours) for neighbours in self._neighbours)


def to_bits(members: tuple[int, ...]) -> int:
    """A set of places as an integer with those bits."""
    bits = 0
    for index in members:
        bits |= 1 << index
    return bits


def members_of(bits: int) -> Iterator[int]:
    """The places in a set of bits, ascending."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low
