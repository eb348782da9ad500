"""Integer noise from a key: Skellam and discrete Gaussian, exact to a hundred bits, and the same on every machine.

Noise that hides a sum is drawn by many clients and, where there is more than enough, taken off by the server, which draws it again from the same
key: so everything here is integers. A distribution becomes a table once (Walker's alias method, 1977, built as by Vose 1991), and a
number is one 64-bit word of an AES-256-CTR key stream: bits for a column, a sign, and a threshold whose 64 further bits are drawn only if the
first ones tie. A probability is thus a multiple of 2**-127, rounded down, and what that and the tails leave over counts as 0: a number's distribution is within
2**-107 of the true one in total variation (2**19 columns at the most). The time taken does not depend on what is drawn, apart from the processor's caches.

Skellam            the difference of two Poisson numbers of mean v/2: P(k) = exp(-v) I_k(v), variance v; sums of such are such (Skellam 1946)
discrete Gaussian  P(k) proportional to exp(-k^2 / 2 v); its variance is at most v (Canonne, Kamath and Steinke 2020)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, unique
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import StudyError
from fedlearn.secagg.primitives import Suite, derive, key_stream

COLUMNS_LIMIT: Final = 1 << 19
"""The widest table; its thresholds and aliases take 10 MB."""
VARIANCE_LIMIT: Final = 2.0**30
"""The most variance that one table is built for: 13.3 deviations of it are columns. More Skellam noise is drawn in several parts."""
PARTS_LIMIT: Final = 4096
_TOTAL_BITS: Final = 127
_WORK_BITS: Final = 256
_TAIL: Final = 200 * math.log(2)  # where the tables' arithmetic begins, far below the last weight that is not zero
_BLOCK: Final = 1 << 14
_ZEROS: Final = bytes(8 * _BLOCK)
_WORD: Final = np.dtype("<u8")


@unique
class Noise(Enum):
    """Which integers."""

    SKELLAM = "skellam"
    """Parts of any size add up to the same distribution, so any number of clients can hold a share."""
    DISCRETE_GAUSSIAN = "discrete-gaussian"
    """Sums are almost discrete Gaussians; how much they are not is part of their price."""


@dataclass(frozen=True)
class Table:
    """The distribution of a number's magnitude, as columns of equal weight that hold at most two values each.

    Args:
        bits: there are 2**bits columns.
        keep: thresholds, the first 63 - bits bits of them; uint64, shape (columns,).
        more: their further 64 bits.
        other: a column's second value; uint32.
    """

    bits: int
    keep: npt.NDArray[np.uint64] = field(repr=False)
    more: npt.NDArray[np.uint64] = field(repr=False)
    other: npt.NDArray[np.uint32] = field(repr=False)


def check_variance(kind: Noise, variance: float) -> None:
    """Refuse noise that cannot be drawn.

    Raises:
        StudyError: not a finite number above 0, or too large.
    """
    most = VARIANCE_LIMIT * (PARTS_LIMIT if kind is Noise.SKELLAM else 1)
    if not 0 < variance <= most:
        raise StudyError(
            f"noise: variance: got {variance}, expected above 0 and at most {most:g} in integer units",
            hint="lower the precision (fewer value_bits): coarser steps need smaller numbers",
        )


def add_noise(vector: npt.NDArray[Any], kind: Noise, variance: float, key: bytes, *, sign: int = 1) -> None:
    """Add the noise of a key to ring elements in place, or take it off again. Arithmetic wraps.

    Args:
        vector: uint16 or uint32, shape (length,), contiguous.
        kind: which integers.
        variance: of each number; for a discrete Gaussian its parameter.
        key: 32 bytes, used for this alone.
        sign: 1 adds, -1 takes off.
    """
    check_variance(kind, variance)
    parts = math.ceil(variance / VARIANCE_LIMIT)
    table, operation = table_of(kind, variance / parts), np.add if sign > 0 else np.subtract
    for part in range(parts):
        for low, block in _blocks(table, len(vector), derive(key, b"noise" + part.to_bytes(4, "big"))):
            target = vector[low : low + len(block)]
            operation(target, block.astype(vector.dtype, copy=False), out=target)


def sample(kind: Noise, variance: float, count: int, key: bytes) -> npt.NDArray[np.int64]:
    """So many numbers; int64, shape (count,). The same that `add_noise` adds."""
    ring = np.zeros(count, dtype="<u4")
    add_noise(ring, kind, variance, key)
    return ring.view("<i4").astype(np.int64)


def _blocks(table: Table, length: int, key: bytes) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """Where, and what to add there in two's complement; each block is overwritten by the next."""
    stream, buffers = key_stream(Suite.X25519_AES256, key), _Buffers(min(_BLOCK, length))
    ties = key_stream(Suite.X25519_AES256, derive(key, b"ties"))  # so that a tie moves nobody's place in the stream
    for low in range(0, length, _BLOCK):
        size = min(_BLOCK, length - low)
        words = buffers.words[:size]
        stream.update_into(_ZEROS[: 8 * size], words.view(np.uint8))  # type: ignore[arg-type]  # a buffer
        yield (
            low,
            buffers.numbers(table, words, lambda count: np.frombuffer(ties.update(bytes(8 * count)), dtype=_WORD)),
        )


_Ties = Callable[[int], npt.NDArray[np.uint64]]


class _Buffers:
    """One set of arrays for all blocks: fresh ones would cost more in page faults than the arithmetic does."""

    def __init__(self, size: int) -> None:
        self.words = np.empty(size, dtype=_WORD)
        self._column = np.empty(size, dtype=np.int64)
        self._wide, self._low = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.uint64)
        self._value, self._sign = np.empty(size, dtype=np.uint32), np.empty(size, dtype=np.uint32)
        self._flag = np.empty(size, dtype=np.bool_)

    def numbers(self, table: Table, words: npt.NDArray[np.uint64], ties: _Ties) -> npt.NDArray[np.uint32]:
        """One number for each word: from the top the column, the sign, the threshold. `ties` draws so many further words."""
        size, bits = len(words), table.bits
        column, wide, low = self._column[:size], self._wide[:size], self._low[:size]
        value, sign, flag = self._value[:size], self._sign[:size], self._flag[:size]
        # numpy cannot shift 64 bits by 64: a single column is shifted away in two steps.
        np.right_shift(words, 63 - bits, out=low)
        np.copyto(sign, low, casting="unsafe")
        np.right_shift(low, 1, out=column.view(np.uint64))
        np.take(
            table.keep, column, out=wide, mode="clip"
        )  # columns are in range; "clip" spares the copy that "raise" makes
        np.take(table.other, column, out=value, mode="clip")
        np.bitwise_and(words, (1 << (63 - bits)) - 1, out=low)
        np.less(low, wide, out=flag)
        np.copyto(value, column, where=flag, casting="unsafe")
        np.equal(low, wide, out=flag)
        if flag.any():
            tied = np.flatnonzero(flag)
            tied = tied[ties(len(tied)) < table.more[column[tied]]]
            value[tied] = column[tied]
        np.bitwise_and(sign, 1, out=sign)
        np.subtract(0, sign, out=sign)
        np.bitwise_xor(value, sign, out=value)
        np.subtract(value, sign, out=value)
        return value


@lru_cache(maxsize=32)
def table_of(kind: Noise, variance: float) -> Table:
    """The table of a distribution; half a second for the widest, kept.

    Raises:
        StudyError: the variance is above `VARIANCE_LIMIT`.
    """
    weights = magnitudes(kind, variance)
    bits = (len(weights) - 1).bit_length()
    if 1 << bits > COLUMNS_LIMIT:
        raise StudyError(f"noise: variance {variance:g} needs more than {COLUMNS_LIMIT} columns")
    return _aliased(weights, bits)


def magnitudes(kind: Noise, variance: float) -> list[int]:
    """The chances of 0, 1, 2, ... as a number's magnitude, in units of 2**-127; they add up to 1 exactly."""
    chances = _skellam(variance) if kind is Noise.SKELLAM else _discrete_gaussian(variance)
    chances[1:] = [2 * chance for chance in chances[1:]]
    whole = sum(chances)
    weights = [(chance << _TOTAL_BITS) // whole for chance in chances]
    weights = list(itertools.takewhile(bool, weights))
    weights[0] += (1 << _TOTAL_BITS) - sum(weights)  # what rounding and the tails left over: below 2**-107
    return weights


def _skellam(variance: float) -> list[int]:
    """Proportional to I_k(variance), k = 0, 1, ...: I_(k-1) = I_(k+1) + 2 k I_k / v, downwards, where it is stable (Miller)."""
    last = _first(lambda k: k * math.asinh(k / variance) - math.sqrt(k * k + variance**2) + variance > _TAIL, variance)
    above, below = variance.as_integer_ratio()
    values = [0, 1 << _WORK_BITS]
    for k in range(last, 0, -1):
        values.append(values[-2] + 2 * k * below * values[-1] // above)
    return values[:0:-1]


def _discrete_gaussian(variance: float) -> list[int]:
    """Proportional to exp(-k^2 / 2 v): each is the one before times r^(2k-1), r = exp(-1 / 2 v)."""
    import mpmath

    last = _first(lambda k: k * k / (2 * variance) > _TAIL, variance)
    with mpmath.workprec(2 * _WORK_BITS):
        r = int(mpmath.floor(mpmath.ldexp(mpmath.exp(-1 / (2 * mpmath.mpf(variance))), _WORK_BITS)))
    step, square = r, r * r >> _WORK_BITS
    values = [1 << _WORK_BITS]
    for _ in range(last):
        values.append(values[-1] * step >> _WORK_BITS)
        step = step * square >> _WORK_BITS
    return values


def _first(beyond: Callable[[int], bool], variance: float) -> int:
    """The smallest k for which `beyond` holds, which is False up to it and True from it on."""
    high = 16 + math.ceil(math.sqrt(variance))
    while not beyond(high):
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle + 1, high)
    return high


def _aliased(weights: Iterable[int], bits: int) -> Table:
    """Columns of equal weight: one that has too little is filled up by one that has too much."""
    columns, share = 1 << bits, 1 << (_TOTAL_BITS - bits)
    left = list(weights)
    left += [0] * (columns - len(left))
    other = list(range(columns))
    small = [i for i, weight in enumerate(left) if weight < share]
    large = [i for i, weight in enumerate(left) if weight >= share]
    keep = [share] * columns
    while small:
        poor, rich = small.pop(), large[-1]
        keep[poor], other[poor] = left[poor], rich
        left[rich] -= share - left[poor]
        if left[rich] < share:
            small.append(large.pop())
    return Table(
        bits,
        np.array([k >> 64 for k in keep], dtype=np.uint64),
        np.array([k & (2**64 - 1) for k in keep], dtype=np.uint64),
        np.array(other, dtype=np.uint32),
    )
