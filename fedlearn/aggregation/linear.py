"""The integer accumulator: every linear sum is taken in fixed point, so no order can change a bit of it.

A value x is rounded to round(x / quantum), half to even, and multiplied by an integer weight; the products are added in int64. Integer
addition is associative, so the order of arrival, the number of workers and masking leave the sum as it is, which floats do
not. Headroom is checked before each addition with the largest magnitude that any coordinate could have reached.

The rounding error of a mean is at most quantum / 2 in each coordinate, 1.2e-10 by default, and one rounding to float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn.arrays import Arrays, Spec, check_finite, check_same
from fedlearn.errors import UpdateError

QUANTUM_BITS: Final = 32
"""A coordinate is held in units of 2**-32."""
FINE_QUANTUM_BITS: Final = 42
"""For float64, whose users compare results to more digits; it leaves 2**21 for the sum of weight times value."""
HEADROOM: Final = 2**63 - 1
BLOCK: Final = 1 << 16
"""Values are converted this many at a time, so that a sum needs no copy of the update."""


@dataclass(eq=False)
class IntegerSum:
    """A running weighted sum of named arrays.

    Args:
        specs: names, shapes and dtypes that every term must have.
        quantum_bits: a coordinate's unit is 2**-quantum_bits; at least 0.
    """

    specs: Mapping[str, Spec]
    quantum_bits: int = QUANTUM_BITS
    weight: int = 0
    terms: int = 0
    _bound: int = 0
    _sums: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self._sums:
            self._sums = {name: np.zeros(spec.shape, dtype=np.int64) for name, spec in self.specs.items()}

    def add(self, term: Arrays, weight: int) -> None:
        """Add weight * term. Either the whole term is added, or an error is raised and nothing has changed.

        Args:
            term: arrays with the accumulator's names, shapes and dtypes.
            weight: an integer from 0 to 2**63 - 1. A term of weight 0 is counted and adds nothing.

        Raises:
            UpdateError: another shape, a value that is not finite or too large for the quantum, a weight that is not
                such an integer, or no headroom left.
        """
        self._bound += self.check(term, weight)
        weight = int(weight)
        for name, array in term.items():
            _add_scaled(self._sums[name].reshape(-1), array.reshape(-1), weight, self.quantum_bits)
        self.weight += weight
        self.terms += 1

    def add_sum(self, total: Mapping[str, npt.NDArray[np.float64]], weight: int, terms: int) -> None:
        """Add the weighted sum of several terms that was taken in floats. All of it is added, or nothing has changed.

        It is rounded to the quantum once, so the order within it matters to the last bits and must be fixed by the caller.

        Args:
            total: sum of weight_i * term_i, float64, of the accumulator's names and shapes.
            weight: sum of weight_i.
            terms: how many.

        Raises:
            UpdateError: as `add` does.
        """
        weight = _checked_weight(weight)
        check_same(total, {name: Spec(spec.shape, "float64") for name, spec in self.specs.items()})
        check_finite(total)
        largest = max((_largest_unit(a, self.quantum_bits) for a in total.values()), default=0)
        if self._bound + largest > HEADROOM:
            raise UpdateError(
                f"partial sum: largest value {largest / 2**self.quantum_bits:.3g} exceeds the sum's headroom",
                hint="the updates diverged, or the weights are too large; clip updates, or choose a coarser quantum",
            )
        for name, array in total.items():
            _add_scaled(self._sums[name].reshape(-1), array.reshape(-1), 1, self.quantum_bits)
        self._bound += largest
        self.weight += weight
        self.terms += terms

    def check(self, term: Arrays, weight: int) -> int:
        """Whether `add` would take this term; raises what it would raise.

        Returns:
            The most that the term can add to any coordinate, in quanta.
        """
        weight = _checked_weight(weight)
        check_same(term, self.specs)
        check_finite(term)
        largest = max((_largest_unit(a, self.quantum_bits) for a in term.values()), default=0)
        if largest > HEADROOM or self._bound + largest * weight > HEADROOM:
            raise UpdateError(
                f"update: largest value {largest / 2**self.quantum_bits:.3g} with weight {weight} exceeds the sum's headroom",
                hint="the update diverged, or the weights are too large; clip updates, or choose a coarser quantum",
            )
        return largest * weight

    def merge(self, other: IntegerSum) -> None:
        """Add another partial sum; equal to having added its terms one by one.

        Raises:
            UpdateError: as `check_merge` does; nothing has changed.
        """
        self.check_merge(other)
        for name, total in other._sums.items():
            self._sums[name] += total
        self._bound += other._bound
        self.weight += other.weight
        self.terms += other.terms

    def check_merge(self, other: IntegerSum) -> None:
        """Whether `merge` would take this sum.

        Raises:
            UpdateError: another quantum, other shapes, or no headroom left.
        """
        if other.quantum_bits != self.quantum_bits or dict(other.specs) != dict(self.specs):
            raise UpdateError("partial sum: another quantum or other shapes; expected the same as this sum's")
        if self._bound + other._bound > HEADROOM:
            raise UpdateError("partial sum: the two sums together exceed the headroom of 63 bits")

    @property
    def rounding_l2(self) -> float:
        """The most by which rounding can lengthen one term of weight 1, in L2 norm: half a quantum a coordinate."""
        return math.sqrt(sum(total.size for total in self._sums.values())) * 2.0 ** -(self.quantum_bits + 1)

    def integers(self) -> Mapping[str, npt.NDArray[np.int64]]:
        """The sum in units of the quantum; a view, not a copy."""
        return self._sums

    def total(self) -> dict[str, npt.NDArray[np.float64]]:
        """The sum in float64; zeros before the first term."""
        return {name: np.asarray(total / 2.0**self.quantum_bits) for name, total in self._sums.items()}

    def mean(self) -> dict[str, npt.NDArray[np.float64]]:
        """sum / weight, in float64.

        Raises:
            UpdateError: the total weight is 0.
        """
        if self.weight == 0:
            raise UpdateError("mean: the total weight is 0; expected at least one client with examples")
        scale = float(self.weight) * 2.0**self.quantum_bits
        return {name: np.asarray(total / scale) for name, total in self._sums.items()}


def quantum_bits_for(specs: Mapping[str, Spec]) -> int:
    """The quantum that fits arrays of these dtypes."""
    return FINE_QUANTUM_BITS if any(spec.dtype == "float64" for spec in specs.values()) else QUANTUM_BITS


def _checked_weight(weight: object) -> int:
    # A numpy integer would make the headroom check itself overflow, so it becomes a Python one.
    if isinstance(weight, int | np.integer) and not isinstance(weight, bool) and 0 <= weight <= HEADROOM:
        return int(weight)
    raise UpdateError(f"update: got weight {weight!r}, expected an integer from 0 to 2**63 - 1")


def _largest_unit(array: npt.NDArray[np.generic], quantum_bits: int) -> int:
    """The largest magnitude in units of the quantum, rounded up; exact, whatever its size."""
    if array.size == 0:
        return 0
    largest = max(abs(float(array.max())), abs(float(array.min())))
    numerator, denominator = largest.as_integer_ratio()
    return -((-numerator << quantum_bits) // denominator)


def _add_scaled(total: npt.NDArray[np.int64], values: npt.NDArray[np.generic], weight: int, quantum_bits: int) -> None:
    scale = 2.0**quantum_bits
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        block *= scale
        np.rint(block, out=block)
        units = block.astype(np.int64)
        units *= weight
        total[start : start + BLOCK] += units
