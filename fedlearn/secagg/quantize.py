"""From floats to ring elements and back: clip, scale, round at random without bias; and the rule that a sum cannot wrap.

An update x with weight w becomes round(s * clip(w/W * x)) in integers of B bits, and w itself travels as one more coordinate, so the server learns the
sum of weights and nobody's own. Rounding goes up with the probability of the fraction, so its mean is the value (Kairouz et al. 2021, "The distributed
discrete Gaussian mechanism"). The sum of n clients fits the ring of 2**b or the plan is refused when it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import StudyError, UpdateError
from fedlearn.secagg.primitives import KEY_BYTES, Suite, derive, key_stream
from fedlearn.secagg.ring import RING_BITS, Vector, dtype_of, from_ring, packed_bytes

LENGTH_LIMIT: Final = 2**31
CLIENTS_LIMIT: Final = 1_000_000
NORM_FAILURE: Final = 2.0**-20
"""Rounding is drawn again when the norm exceeds a bound that it keeps with all but this probability."""
_BLOCK: Final = 1 << 14
_REDRAWS: Final = 64
_NOISE_DEVIATIONS: Final = 6


@dataclass(frozen=True)
class Encoding:
    """How an update becomes integers, and the promise that their sum fits.

    Args:
        length: coordinates of an update, without the weight's.
        clients: the most clients whose vectors are added.
        clip_l2: the L2 norm that an update, times its share of the weight, is scaled down to.
        ring_bits: b: 16, 24 or 32; b/8 bytes a coordinate travel.
        value_bits: B: a client's coordinate is in (-2**(B-1), 2**(B-1)); 0 takes the most that fit.
        weight_cap: W: the largest weight; 1 where every client counts once.
        clip_max: the largest magnitude of a coordinate; 0 takes `clip_l2`. Smaller gives finer steps and clamps what exceeds it.
        noise_deviation: standard deviation of the noise in the sum, in integer units; six of them must fit beside the values.

    Raises:
        StudyError: a value is out of range, or the sum could wrap.
    """

    length: int
    clients: int
    clip_l2: float
    ring_bits: int = 32
    value_bits: int = 0
    weight_cap: int = 1
    clip_max: float = 0.0
    noise_deviation: float = 0.0

    def __post_init__(self) -> None:
        if self.ring_bits not in RING_BITS:
            raise StudyError(f"secure aggregation: got a ring of {self.ring_bits} bits, expected one of {RING_BITS}")
        for name, number, most in (
            ("length", self.length, LENGTH_LIMIT),
            ("clients", self.clients, CLIENTS_LIMIT),
            ("weight_cap", self.weight_cap, 2**31),
        ):
            if not 1 <= number <= most:
                raise StudyError(f"secure aggregation: {name} is {number}, expected 1 to {most}")
        for name, value, least in (
            ("clip_l2", self.clip_l2, math.ulp(0.0)),
            ("clip_max", self.clip_max, 0.0),
            ("noise_deviation", self.noise_deviation, 0.0),
        ):
            if not math.isfinite(value) or value < least:
                raise StudyError(
                    f"secure aggregation: {name} is {value}, expected a finite number of at least {least:g}"
                )
        if self.value_bits == 0:
            object.__setattr__(self, "value_bits", self._widest())
        self._check_room()

    def _room(self, bits: int) -> bool:
        needed = self.clients * (1 << (bits - 1)) + _NOISE_DEVIATIONS * self.noise_deviation
        return needed <= (1 << (self.ring_bits - 1)) - 1

    def _widest(self) -> int:
        return next((bits for bits in range(self.ring_bits, 2, -1) if self._room(bits)), 3)

    def _check_room(self) -> None:
        if not 3 <= self.value_bits <= self.ring_bits or not self._room(self.value_bits):
            raise StudyError(
                f"secure aggregation: {self.clients} clients with {self.value_bits} bits each"
                f" and noise of deviation {self.noise_deviation:g} could wrap a ring of {self.ring_bits} bits",
                hint="take more ring_bits, fewer value_bits (at least 3), fewer clients or less noise",
            )
        if self.clients * self.weight_cap > 2 ** (self.ring_bits - 1) - 1:
            raise StudyError(
                f"secure aggregation: weights up to {self.weight_cap} of {self.clients} clients"
                f" could wrap a ring of {self.ring_bits} bits",
                hint="lower weight_cap, or take more ring_bits",
            )
        if not math.isfinite(self.scale):
            raise StudyError(f"secure aggregation: clip {self.largest:g} is too small to be scaled to integers")

    @property
    def largest(self) -> float:
        """The largest magnitude of a clipped coordinate."""
        return min(self.clip_max or self.clip_l2, self.clip_l2)

    @property
    def scale(self) -> float:
        """s: integer units per 1.0; the largest coordinate just fits, rounded up."""
        return ((1 << (self.value_bits - 1)) - 2) / self.largest

    @cached_property
    def norm_bound(self) -> float:
        """What the L2 norm of an encoded update never exceeds, in integer units (conditional rounding of Kairouz et al. 2021)."""
        clip, root = self.scale * self.clip_l2, math.sqrt(self.length)
        spread = math.sqrt(2 * math.log(1 / NORM_FAILURE))
        return min(clip + root, math.sqrt(clip**2 + self.length / 4 + spread * (clip + root / 2)))

    @property
    def coordinates(self) -> int:
        """Ring elements that travel: the update's and the weight."""
        return self.length + 1

    @property
    def upload_bytes(self) -> int:
        """Bytes of one masked vector."""
        return packed_bytes(self.coordinates, self.ring_bits)

    def encode(self, update: npt.NDArray[Any], weight: int, key: bytes) -> Vector:
        """The ring elements of one client's update.

        Args:
            update: floats, shape (length,), finite.
            weight: 1 to `weight_cap`; 0 for a client without examples, whose update counts nothing.
            key: 32 bytes that the rounding follows from: fresh from the CSPRNG, or derived from the run's seed in seeded mode.

        Returns:
            Shape (length + 1,), unsigned; the last is the weight.

        Raises:
            UpdateError: not finite, of another shape, or a weight out of range.
        """
        if update.shape != (self.length,) or update.dtype.kind != "f":
            raise UpdateError(f"update: got {update.dtype} {update.shape}, expected floats of shape ({self.length},)")
        if not 0 <= weight <= self.weight_cap:
            raise UpdateError(f"update: got weight {weight}, expected 0 to {self.weight_cap}")
        if len(key) != KEY_BYTES:
            raise ValueError(f"rounding key: got {len(key)} bytes, expected {KEY_BYTES}")
        factor = self._factor(update, weight / self.weight_cap)
        for attempt in range(_REDRAWS):
            vector, norm = self._rounded(update, factor, derive(key, b"rounding" + attempt.to_bytes(4, "big")))
            if norm <= self.norm_bound:
                vector[-1] = weight
                return vector
        raise UpdateError(f"update: its norm exceeded {self.norm_bound:g} in {_REDRAWS} draws; the generator is broken")

    def _factor(self, update: npt.NDArray[Any], share: float) -> float:
        """What turns a coordinate into integer units: the weight's share, the clip and the scale."""
        squares = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite norm says so itself
            for low in range(0, self.length, _BLOCK):
                squares += float(np.square(update[low : low + _BLOCK], dtype=np.float64).sum())
        norm = math.sqrt(squares) * share if math.isfinite(squares) else math.nan
        if not math.isfinite(norm):
            raise UpdateError("update: it is not finite, or its norm is not", hint="training diverged")
        return self.scale * share * min(1.0, self.clip_l2 / norm if norm else 1.0)

    def _rounded(self, update: npt.NDArray[Any], factor: float, key: bytes) -> tuple[Vector, float]:
        # In units of 2**-32 of a step, so that a random word is added as it is; powers of two round nothing.
        stream, fine, bound = (
            key_stream(Suite.X25519_AES256, key),
            factor * 2.0**32,
            self.scale * self.largest * 2.0**32,
        )
        vector = np.empty(self.coordinates, dtype=dtype_of(self.ring_bits))
        # One set of buffers for all blocks: fresh ones would cost more in page faults than the arithmetic does.
        zeros, random = bytes(4 * _BLOCK), bytearray(4 * _BLOCK)
        values = np.empty(_BLOCK)
        # What is rounded fits the ring, so it is written as signed integers of its width: two's complement is the ring's own.
        signed = vector.view(f"<i{vector.itemsize}")
        chances = np.frombuffer(random, dtype="<u4")
        squares = 0.0
        for low in range(0, self.length, _BLOCK):
            part = update[low : low + _BLOCK]
            size = len(part)
            stream.update_into(zeros, random)
            block = values[:size]
            np.multiply(part, fine, out=block, dtype=np.float64)
            np.clip(block, -bound, bound, out=block)
            block += chances[:size]
            block *= 2.0**-32
            np.floor(block, out=block)
            np.copyto(signed[low : low + size], block, casting="unsafe")
            np.square(block, out=block)
            squares += float(block.sum())  # not a dot product: BLAS would wake its threads for it
        return vector, math.sqrt(squares)

    def decode(self, total: Vector) -> Decoded:
        """What a sum of encoded updates says.

        Args:
            total: ring elements, shape (length + 1,), without masks.
        """
        return Decoded(from_ring(total[:-1], self.ring_bits), int(from_ring(total[-1:], self.ring_bits)[0]), self)


@dataclass(frozen=True)
class Decoded:
    """The sum of the clients' integers, exact.

    Args:
        integers: int64, shape (length,), in units of 1 / scale.
        weight: the sum of the weights.
        encoding: how it was encoded.
    """

    integers: npt.NDArray[np.int64]
    weight: int
    encoding: Encoding

    def mean(self) -> npt.NDArray[np.float64]:
        """The weighted mean of the clipped updates, float64, shape (length,).

        Raises:
            UpdateError: the total weight is not positive.
        """
        if self.weight < 1:
            raise UpdateError(f"mean: the total weight is {self.weight}; expected at least one client with examples")
        unit = self.encoding.weight_cap / self.encoding.scale / self.weight
        return np.asarray(self.integers * unit, dtype=np.float64)
