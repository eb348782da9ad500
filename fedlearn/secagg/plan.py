"""What everybody must agree on before a round: the plan, the terms of one attempt, and the transcript that binds every key to both.

The transcript is a hash of everything that a client has seen and trained on. It enters each key's derivation, each ciphertext's associated data and each
signature, so clients that were told different things share no keys: their shares do not decrypt and their masks do not cancel.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from functools import cached_property
from itertools import pairwise
from typing import Final

from fedlearn.errors import StudyError
from fedlearn.release.keys import AttemptId
from fedlearn.secagg.graph import CLIENTS_LEAST, CLIENTS_LIMIT, PPM, Graph, Parameters, parameters
from fedlearn.secagg.primitives import Suite
from fedlearn.secagg.quantize import Encoding

VERSION: Final = 1
LEVELS_LIMIT: Final = 16
"""The most levels at which surplus noise is taken off."""
DIGEST_BYTES: Final = 32


@unique
class Profile(Enum):
    """What the server may do without learning an update."""

    SEMI_MALICIOUS = 1
    """Anything; but a server that tells clients different survivors may learn sums over fewer of them, of two at the least."""
    MALICIOUS = 2
    """Anything: one more exchange proves to every client that all open the same sum. Sparse graphs always have it."""


@dataclass(frozen=True)
class Plan:
    """What a study fixes for all its rounds.

    Args:
        encoding: how updates become integers. Its `clients` is the most that a roster may have.
        adversarial: the fraction of clients that may collude with the server.
        dropout: the fraction that may vanish during a round without ending it.
        minimum: a sum over fewer clients is never opened; at least 3.
        suite: primitives.
        profile: what is assumed of the server.
        privacy: digest of the privacy plan, or empty.
        surplus: numbers of survivors, rising, from which on a part of every client's noise is opened too, so that it can be taken off the sum.

    Raises:
        StudyError: out of range. UnsupportedError: no graph is safe for `encoding.clients` clients.
    """

    encoding: Encoding
    adversarial: float = 0.1
    dropout: float = 0.1
    minimum: int = CLIENTS_LEAST
    suite: Suite = Suite.X25519_AES256
    profile: Profile = Profile.SEMI_MALICIOUS
    privacy: bytes = b""
    surplus: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, rate in (("adversarial", self.adversarial), ("dropout", self.dropout)):
            if not 0 <= rate < 1:
                raise StudyError(f"secure aggregation: {name} is {rate}, expected 0 up to 1")
        if not CLIENTS_LEAST <= self.minimum <= self.encoding.clients <= CLIENTS_LIMIT:
            raise StudyError(
                f"secure aggregation: minimum {self.minimum} of {self.encoding.clients} clients,"
                f" expected {CLIENTS_LEAST} <= minimum <= clients <= {CLIENTS_LIMIT}",
                hint="with two clients, each learns the other's update from the sum: there is nothing to protect",
            )
        bounds = (self.minimum, *self.surplus, self.encoding.clients + 1)
        if len(self.surplus) > LEVELS_LIMIT or any(low >= high for low, high in pairwise(bounds)):
            raise StudyError(
                f"secure aggregation: surplus noise goes at {self.surplus} survivors, expected at most {LEVELS_LIMIT} rising levels"
                f" above {self.minimum} and up to {self.encoding.clients}"
            )
        self.parameters(self.encoding.clients)

    def level(self, survivors: int) -> int:
        """How many levels of surplus noise so many survivors reach."""
        return sum(survivors >= level for level in self.surplus)

    def parameters(self, clients: int) -> Parameters:
        """Degree and threshold for a roster of this size.

        Raises:
            UnsupportedError: none is safe.
        """
        return parameters(clients, round(self.adversarial * PPM), round(self.dropout * PPM))

    def agrees(self, clients: int) -> bool:
        """True when the survivors are signed by a quorum before anything is opened.

        Where everyone is everyone's neighbour, telling clients different survivors can single nobody out; in a sparse graph it might.
        """
        return self.profile is Profile.MALICIOUS or not self.parameters(clients).complete

    def quorum(self, clients: int) -> int:
        """Signatures that prove a set to be everybody's: two sets that differ cannot both have so many."""
        return (clients + max(1, clients * round(self.adversarial * PPM) // PPM)) // 2 + 1

    def digest(self) -> bytes:
        """SHA-256 over every value."""
        e = self.encoding
        numbers = struct.pack(">dddd", e.clip_l2, e.clip_max, e.noise_deviation, e.scale)
        return digest_of(
            "plan",
            VERSION,
            *(e.length, e.clients, e.ring_bits, e.value_bits, e.weight_cap),
            numbers,
            *(round(self.adversarial * PPM), round(self.dropout * PPM), self.minimum),
            *(self.suite.value, self.profile.value, self.privacy, *self.surplus),
        )


@dataclass(frozen=True)
class Terms:
    """One attempt at one round under a plan: what a check-in signs.

    Args:
        run: the run's name.
        at: round and attempt.
        plan: the plan.
    """

    run: str
    at: AttemptId
    plan: Plan

    def digest(self) -> bytes:
        """SHA-256."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:  # every check-in of a roster is signed over it
        return digest_of("terms", self.run, self.at.round, self.at.attempt, self.plan.digest())


@dataclass(frozen=True)
class CheckIn:
    """One client's keys for one attempt, signed with its identity.

    Args:
        client: its name.
        mask_key: public key whose agreements give the pairwise masks.
        transport_key: public key whose agreements seal the shares.
        commitment: hash of the nonce that it will reveal, before the roster was known.
        signature: over all of it and the terms.
    """

    client: str
    mask_key: bytes
    transport_key: bytes
    commitment: bytes
    signature: bytes

    def signed(self, terms: Terms) -> bytes:
        """The bytes under the signature."""
        return digest_of("check-in", terms.digest(), self.client, self.mask_key, self.transport_key, self.commitment)


@dataclass(frozen=True)
class Transcript:
    """The hash that everything after the roster is bound to, with the labels of all its uses.

    Args:
        digest: 32 bytes.
    """

    digest: bytes = field(repr=False)

    def share_key(self, source: int, target: int) -> bytes:
        """HKDF info of the key that seals one message: each direction has its own."""
        return _label(self.digest, b"share", source, target)

    def share_data(self, source: int, target: int) -> bytes:
        """Associated data of that message."""
        return _label(self.digest, b"sealed", source, target)

    def pair_mask(self, one: int, other: int) -> bytes:
        """HKDF info of a pairwise mask: the same from both sides."""
        return _label(self.digest, b"pair", min(one, other), max(one, other))

    def self_mask(self, index: int) -> bytes:
        """HKDF info of a client's own mask."""
        return _label(self.digest, b"self", index, index)

    def seed_commitment(self, index: int, seed: bytes) -> bytes:
        """What a client promises about its own mask's seed, so that a false share of it shows."""
        return digest_of("seed", self.digest, index, seed)

    def inclusion(self, index: int, sharers: int, clients: int) -> bytes:
        """Signed with a masked vector: with whom it is masked."""
        return digest_of("inclusion", self.digest, index, bitmap(sharers, clients))

    def agreement(self, sharers: int, survivors: int, clients: int) -> bytes:
        """Signed in the malicious profile: whose sum is opened."""
        return digest_of("agreement", self.digest, bitmap(sharers, clients), bitmap(survivors, clients))

    def opening(self, index: int, survivors: int, clients: int, shares: Sequence[bytes]) -> bytes:
        """Signed with the shares that open a sum."""
        return digest_of("opening", self.digest, index, bitmap(survivors, clients), b"".join(shares))


def nonce_commitment(client: str, nonce: bytes) -> bytes:
    """The hash under which a nonce is hidden until the roster is fixed."""
    return digest_of("nonce", client, nonce)


def graph_of(terms: Terms, roster: Sequence[CheckIn], nonces: Sequence[bytes]) -> Graph:
    """The graph of a roster. `nonces` order a sparse one and count nothing in a complete one; b"" stands for a nonce that is withheld.

    Raises:
        UnsupportedError: no degree is safe for so many clients.
    """
    found = terms.plan.parameters(len(roster))
    return Graph(found, b"" if found.complete else digest_of("graph", _roster_digest(terms, roster), *nonces))


def transcript_of(
    terms: Terms, roster: Sequence[CheckIn], identities: Sequence[bytes], graph: Graph, subject: bytes
) -> Transcript:
    """The transcript of an attempt.

    Args:
        terms: the terms.
        roster: every check-in, in the order of names.
        identities: their enrolled keys, in that order.
        graph: the graph.
        subject: digest of the model and the configuration that the client trains with.
    """
    p = graph.parameters
    return Transcript(
        digest_of(
            "transcript",
            VERSION,
            _roster_digest(terms, roster),
            digest_of("identities", *identities),
            *(p.clients, p.degree, p.holders, p.threshold, p.adversarial),
            graph.seed,
            subject,
        )
    )


def _roster_digest(terms: Terms, roster: Sequence[CheckIn]) -> bytes:
    parts = [part for c in roster for part in (c.client, c.mask_key, c.transport_key, c.commitment, c.signature)]
    return digest_of("roster", terms.digest(), *parts)


def _label(digest: bytes, use: bytes, one: int, other: int) -> bytes:
    return digest + use + one.to_bytes(4, "big") + other.to_bytes(4, "big")


def digest_of(use: str, *parts: bytes | str | int) -> bytes:
    """SHA-256 over a use and its parts; each carries its type and length, so no two lists of parts give the same bytes."""
    sha = hashlib.sha256(b"fedlearn/secagg/v1/" + use.encode() + b"\0")
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        kind = {bytes: b"b", str: b"s", int: b"i"}[type(part)]
        sha.update(kind + len(data).to_bytes(8, "big") + data)
    return sha.digest()


def bitmap(members: int, clients: int) -> bytes:
    """A set of places as bytes, the lowest place first."""
    return members.to_bytes(-(-clients // 8), "little")
