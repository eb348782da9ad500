"""The ring of integers mod 2**b in which updates are masked and added, and its bytes on the wire: b/8 a coordinate.

Rings of 24 and 32 bits are held in uint32, of 16 bits in uint16; arithmetic wraps by itself and the upper byte of a 24-bit ring is
ignored until it is packed or read.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.secagg.breach import Breach, SecureAggregationError

RING_BITS: Final = (16, 24, 32)
Vector = npt.NDArray[Any]
"""Ring elements, shape (length,), dtype `dtype_of(bits)`."""


def dtype_of(bits: int) -> np.dtype[Any]:
    """Little-endian uint16 for 16 bits, uint32 for 24 and 32."""
    if bits not in RING_BITS:
        raise ValueError(f"ring: got {bits} bits, expected one of {RING_BITS}")
    return np.dtype("<u2" if bits == 16 else "<u4")


def packed_bytes(length: int, bits: int) -> int:
    """Bytes on the wire of so many coordinates."""
    return length * bits // 8


def to_ring(values: npt.NDArray[np.int64], bits: int) -> Vector:
    """Signed integers as ring elements (two's complement)."""
    return values.astype(dtype_of(bits))


def from_ring(vector: Vector, bits: int) -> npt.NDArray[np.int64]:
    """The signed integers in [-2**(b-1), 2**(b-1)) that the elements stand for."""
    values = vector.astype(np.int64)
    values &= (1 << bits) - 1
    values ^= 1 << (bits - 1)
    values -= 1 << (bits - 1)
    return values


def pack(vector: Vector, bits: int) -> bytes:
    """The elements as they travel, little-endian, b/8 bytes each."""
    if bits != 24:
        return vector.astype(dtype_of(bits), copy=False).tobytes()
    return np.ascontiguousarray(vector, dtype="<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def unpack(data: bytes, length: int, bits: int) -> Vector:
    """The inverse of `pack`; a view of the bytes where that is possible, not to be written to.

    Raises:
        SecureAggregationError: BAD_VECTOR: not exactly that many coordinates.
    """
    if len(data) != packed_bytes(length, bits):
        raise SecureAggregationError(
            Breach.BAD_VECTOR, f"got a vector of {len(data)} bytes, expected {packed_bytes(length, bits)}"
        )
    if bits != 24:
        return np.frombuffer(data, dtype=dtype_of(bits))
    wide = np.zeros((length, 4), dtype=np.uint8)
    wide[:, :3] = np.frombuffer(data, dtype=np.uint8).reshape(length, 3)
    return wide.reshape(-1).view("<u4")
