"""Distributed differential privacy: every client adds a share of the noise before its update is masked, so the server sees a noisy sum only.

    clip -> rotate -> scale -> round at random, norm checked again -> add a share of the noise -> mask              (client, `encode`)
    unmask -> take surplus noise off -> centre -> unscale -> rotate back -> divide by the clients in the sum     (server, `decode`)

The unit is one client; neighbours differ in one client's update, which is replaced by zeros (by any other one under replace-one); that it takes part is public.
What honest clients add together is calibrated for the fewest of them that a sum can have (`floor.honest_floor`), so the charge is right whoever drops out.
The server picks the cohort, so no amplification by sampling is claimed: each round that a client takes part in costs it `cost(1)`.

Agarwal, Kairouz and Liu 2021 (Skellam), Kairouz, Liu and Steinke 2021 (discrete Gaussian; rounding that keeps the norm), Jiang et al. 2024 (surplus).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import StudyError, UnsupportedError, UpdateError
from fedlearn.privacy import accounting
from fedlearn.privacy.claims import NOT_PRIVATE, Adversary, Claim
from fedlearn.privacy.events import MAX_COUNT, Cost, DiscreteGaussians, Relation, Repeated, Skellam
from fedlearn.privacy.plan import Everyone, Unit
from fedlearn.privacy.shares import premise
from fedlearn.secagg import rotation
from fedlearn.secagg.floor import colluding, honest_floor
from fedlearn.secagg.noise import Noise, add_noise, check_variance
from fedlearn.secagg.plan import Plan, Profile, digest_of
from fedlearn.secagg.primitives import SECRET_BYTES, Draw, Suite, derive
from fedlearn.secagg.quantize import NORM_FAILURE, Decoded, Encoding
from fedlearn.secagg.ring import RING_BITS, Vector, from_ring, to_ring
from fedlearn.secagg.surplus import Surplus

_FINEST: Final = 24
"""The most bits of a value that are tried: steps of 2**-23 of the largest coordinate."""


@dataclass(frozen=True)
class DistributedPlan:
    """What is fixed before the first round; everything else follows from it. Equal plans have equal digests.

    Args:
        length: numbers in an update.
        clients: the most on a roster.
        minimum: the fewest whose sum is ever opened.
        clip_l2: the L2 norm that an update is scaled down to.
        noise_multiplier: standard deviation of the noise that honest clients add together / L2 sensitivity after rounding.
        relation: which updates are neighbours.
        noise: which integers.
        adversarial: the fraction of clients that may collude with the server, and add no noise.
        dropout: the fraction that may vanish during a round without ending it.
        profile: what is assumed of the server. Only `MALICIOUS` has the floor of minimum less colluders up to 200 clients.
        suite: primitives of secure aggregation.
        ring_bits: 16, 24 or 32; 0 takes the fewest that suffice.
        precision: how much larger than the clip rounding may make the sensitivity; sets the step.
        levels: numbers of survivors at which surplus noise is taken off; none by default. Skellam only.

    Raises:
        StudyError: a value is out of range, a sum could wrap, or no honest client is sure to be in a sum.
        UnsupportedError: no graph is safe for so many clients, or the noise cannot be split.
    """

    length: int
    clients: int
    minimum: int
    clip_l2: float
    noise_multiplier: float
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    noise: Noise = Noise.SKELLAM
    adversarial: float = 0.1
    dropout: float = 0.1
    profile: Profile = Profile.SEMI_MALICIOUS
    suite: Suite = Suite.X25519_AES256
    ring_bits: int = 0
    precision: float = 0.01
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1:
            raise StudyError(f"distributed noise: length is {self.length}, expected at least 1")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise StudyError(
                f"distributed noise: noise_multiplier is {self.noise_multiplier}, expected a finite number above 0"
            )
        if not 0 < self.precision < 1:
            raise StudyError(f"distributed noise: precision is {self.precision}, expected above 0 and below 1")
        if self.ring_bits not in (0, *RING_BITS):
            raise StudyError(f"distributed noise: got a ring of {self.ring_bits} bits, expected one of {RING_BITS}")
        if self.levels and self.noise is not Noise.SKELLAM:
            raise UnsupportedError(
                "distributed noise: parts of discrete Gaussian noise do not add up to it, so no surplus can be taken off",
                hint='take noise = "skellam"',
            )
        _ = self.aggregation, self.surplus
        for variance in self.surplus.variances:
            check_variance(self.noise, variance)
        _ = self.event()

    # What follows for secure aggregation.

    @cached_property
    def aggregation(self) -> Plan:
        """The plan of secure aggregation that carries this one, bound to its digest.

        Raises:
            StudyError: the sum could wrap.
        """
        widths = [self.ring_bits] if self.ring_bits else list(RING_BITS)
        for bits in widths:
            try:
                encoding = replace(self._values, ring_bits=bits, noise_deviation=self._most_deviation)
            except StudyError:
                if bits == widths[-1]:
                    raise
                continue
            return Plan(
                *(encoding, self.adversarial, self.dropout, self.minimum, self.suite, self.profile),
                privacy=self.digest(),
                surplus=self.levels,
            )
        raise AssertionError("unreachable: the last width returns or raises")

    @cached_property
    def honest(self) -> int:
        """Honest clients that are sure to be in any sum that can be opened."""
        return self._honest(0)

    @cached_property
    def surplus(self) -> Surplus:
        """The parts of a client's noise; one that stays where no level is named."""
        return Surplus.over(self._variance, self.honest, {level: self._honest(level) for level in self.levels})

    @property
    def encoding(self) -> Encoding:
        """How a rotated update becomes integers."""
        return self.aggregation.encoding

    @property
    def upload_bytes_a_number(self) -> float:
        """Bytes of a masked vector per number of the update."""
        return self.encoding.upload_bytes / self.length

    def digest(self) -> bytes:
        """SHA-256 over every value; enters the transcript of secure aggregation."""
        numbers = (self.clip_l2, self.noise_multiplier, self.adversarial, self.dropout, self.precision)
        return digest_of(
            "distributed noise",
            *(self.length, self.clients, self.minimum, self.relation.value, self.noise.value, self.profile.value),
            *(self.suite.value, self.ring_bits, struct.pack(">5d", *numbers), str(self.levels)),
        )

    # Privacy.

    def event(self, honest: int | None = None) -> Skellam | DiscreteGaussians:
        """What one opened sum tells the server about one client's update.

        Args:
            honest: clients whose noise is in the sum; the floor if not told. For "what if": the charge is for the floor.
        """
        return _event(self._values, self.noise, self.relation, self._variance, self.honest, honest or self.honest)

    def cost(self, rounds: int = 1) -> Cost:
        """What so many rounds cost a client that takes part in each. An attempt at a round, void or not, costs a round."""
        return Cost(Repeated(self.event(), rounds), self.relation)

    def epsilon(self, rounds: int, delta: float) -> accounting.Accounted:
        """Epsilon of so many rounds, under two accountants."""
        return accounting.account(self.cost(rounds), delta)

    def claims(self, rounds: int, delta: float, *, seeded: bool = False) -> tuple[Claim, ...]:
        """What is promised against each adversary: the same against all, the server among them, because nobody sees more than noisy sums.

        Args:
            rounds: in which one client takes part.
            delta: of the guarantee.
            seeded: whether the noise follows from the study's seed.
        """
        bound = self.epsilon(rounds, delta).reported
        value, caveat = (None, NOT_PRIVATE) if seeded else (bound.epsilon, self.premise)
        return tuple(
            Claim(value, delta, Unit.CLIENT, self.relation, who, Everyone(), bound.accountant, caveat)
            for who in Adversary
        )

    @property
    def premise(self) -> str:
        """What a claim rests on, in words."""
        return premise(self.honest, colluding(self.clients, self.adversarial))

    # Client and server.

    def encode(
        self, update: npt.NDArray[Any], rotation_key: bytes, draw: Draw, surplus_key: bytes | None = None
    ) -> Vector:
        """One client's update as ring elements with its share of the noise: what may be masked and sent.

        Args:
            update: float32 or float64, shape (length,). Longer than the clip is scaled down; not finite is refused.
            rotation_key: 32 bytes, public and equal for all clients of an attempt: see `rotation_key_of`.
            draw: `os.urandom`, or a `SeededDraw` where nothing is private.
            surplus_key: `ClientRound.surplus_key`, whose shares the holders have; with levels only.

        Returns:
            Shape (length + 1,), unsigned; the last is 1: this client counts once.

        Raises:
            UpdateError: not finite, or of another shape.
        """
        if update.shape != (self.length,) or update.dtype.kind != "f":
            raise UpdateError(f"update: got {update.dtype} {update.shape}, expected floats of shape ({self.length},)")
        if (surplus_key is not None) != bool(self.levels):
            raise ValueError(
                f"surplus noise: the plan has {len(self.levels)} levels, so a key is{'' if self.levels else ' not'} needed"
            )
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by the encoding
            even = rotation.rotated(update, rotation_key)
        vector = self.encoding.encode(even, 1, draw(SECRET_BYTES))
        self.add_share(vector, draw(SECRET_BYTES), surplus_key)
        return vector

    def add_share(self, vector: Vector, key: bytes, surplus_key: bytes | None = None) -> None:
        """Add one client's noise to its encoded update, in place; not to the weight, which everybody knows.

        Args:
            vector: ring elements, shape (length + 1,).
            key: 32 secret bytes, used for this alone.
            surplus_key: as for `encode`.
        """
        if surplus_key is not None:
            self.surplus.add(vector[:-1], key, surplus_key)
        else:
            add_noise(vector[:-1], self.noise, self.surplus.added, key)

    def decode(self, total: Decoded, rotation_key: bytes, opened: Sequence[bytes] = ()) -> DistributedSum:
        """What an open sum says.

        Args:
            total: `ServerRound.total`.
            rotation_key: that the clients used.
            opened: `ServerRound.surplus_keys`.

        Raises:
            UpdateError: it is another plan's, or a sum of no possible number of clients.
        """
        encoding, contributions = self.encoding, total.weight
        if total.encoding != encoding:
            raise UpdateError("sum: got one that was encoded by another plan")
        if not self.minimum <= contributions <= self.clients or len(opened) > contributions:
            raise UpdateError(
                f"sum: got {contributions} contributions and {len(opened)} keys of surplus noise,"
                f" expected {self.minimum} to {self.clients} and at most as many keys",
                hint="a client that counts itself more than once breaks the sum; the round is void",
            )
        integers = total.integers
        if opened:
            ring = to_ring(integers, encoding.ring_bits)
            self.surplus.remove(ring, contributions, opened)
            integers = from_ring(ring, encoding.ring_bits)
        removed = len(opened) * (self.surplus.added - self.surplus.left(contributions))
        deviation = math.sqrt(contributions * self.surplus.added - removed) / encoding.scale
        return DistributedSum(rotation.unrotated(integers / encoding.scale, rotation_key), contributions, deviation)

    # Inner arithmetic.

    @cached_property
    def _values(self) -> Encoding:
        """The coarsest values that are precise enough, in a ring with room for anything."""
        return _coarsest(self.length, self.clients, self.clip_l2, self.precision)

    @property
    def _variance(self) -> float:
        """Of the noise that honest clients add together, in integer units."""
        return (self.noise_multiplier * self._values.norm_bound * _factor(self.relation)) ** 2

    @property
    def _most_deviation(self) -> float:
        """Of the noise of all clients, before any of it is taken off."""
        return math.sqrt(self._variance * self.clients / self.honest)

    def _honest(self, survivors: int) -> int:
        return honest_floor(self.clients, self.minimum, self.adversarial, self.dropout, self.profile, survivors)


@dataclass(frozen=True)
class DistributedSum:
    """A noisy sum of clipped updates.

    Args:
        values: float64, shape (length,).
        contributions: clients in it: public.
        noise_deviation: standard deviation of the noise on each of the values, if every client added its share.
    """

    values: npt.NDArray[np.float64]
    contributions: int
    noise_deviation: float

    def mean(self) -> npt.NDArray[np.float64]:
        """The noisy mean update."""
        mean: npt.NDArray[np.float64] = self.values / self.contributions
        return mean


def rotation_key_of(terms_digest: bytes) -> bytes:
    """The rotation of an attempt: from `Terms.digest()`, which every client and the server know before the update does."""
    return derive(terms_digest, b"rotation of an attempt")


def calibrated(plan: DistributedPlan, epsilon: float, delta: float, rounds: int) -> DistributedPlan:
    """The plan with the noise that keeps so many rounds within `epsilon`.

    Args:
        plan: its own noise_multiplier does not count, but must be possible.
        epsilon: the budget.
        delta: of the guarantee.
        rounds: in which one client takes part at the most.

    Raises:
        StudyError: no noise meets the budget, or that noise does not fit the ring.
    """
    if not 1 <= rounds <= MAX_COUNT:
        raise StudyError(f"distributed noise: got {rounds} rounds, expected 1 to {MAX_COUNT}")
    values, honest = _coarsest(plan.length, plan.clients, plan.clip_l2, plan.precision), plan.honest

    def cost_of(noise: float) -> Cost:
        variance = (noise * values.norm_bound * _factor(plan.relation)) ** 2
        event = _event(values, plan.noise, plan.relation, variance, honest, honest)
        return Cost(Repeated(event, rounds), plan.relation)

    return replace(plan, noise_multiplier=accounting.calibrate(cost_of, epsilon, delta))


def _coarsest(length: int, clients: int, clip_l2: float, precision: float) -> Encoding:
    """Values of the fewest bits for which rounding makes the sensitivity at most 1 + precision times the clip."""
    largest = rotation.largest_after(length, clip_l2, NORM_FAILURE)
    for bits in range(3, _FINEST + 1):
        values = Encoding(length, clients, clip_l2, value_bits=bits, clip_max=largest)
        if values.norm_bound <= (1 + precision) * values.scale * clip_l2:
            return values
    raise StudyError(
        f"distributed noise: no step is fine enough for a precision of {precision:g} on {length} numbers",
        hint="a precision of 0.01 costs 1 % more noise",
    )


def _factor(relation: Relation) -> float:
    """Replacing an update moves the sum by two norms, removing one by one."""
    return 2.0 if relation is Relation.REPLACE_ONE else 1.0


def _event(
    values: Encoding, noise: Noise, relation: Relation, variance: float, floor: int, honest: int
) -> Skellam | DiscreteGaussians:
    """`variance` is what `floor` clients add together, and `honest` of them are there."""
    l2 = _factor(relation) * values.norm_bound
    l1 = min(math.sqrt(values.length) * l2, l2**2)  # of integers
    if noise is Noise.SKELLAM:
        return Skellam(variance * honest / floor, l2, l1)
    return DiscreteGaussians(variance / floor, honest, values.length, l2, l1)
