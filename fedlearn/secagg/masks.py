"""Masks: key streams added to, or taken from, a vector of ring elements, in one pass that stays in the processor's cache.

The cipher fills one block of a buffer after the other, and each block is added to the vector at once, for all keys before the next block. The
cipher and numpy release the interpreter's lock, so ranges of the vector are worked on by several threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np

from fedlearn.secagg.primitives import Suite, key_stream
from fedlearn.secagg.ring import Vector

BLOCK_BYTES: Final = 128 * 1024
"""Zeros, key stream and vector block together fit a core's second-level cache."""
_ALIGN: Final = 64
_ZEROS: Final = bytes(BLOCK_BYTES)
_KEYS_AT_ONCE: Final = 1024
"""Open cipher contexts: memory is bounded however many clients there are."""


def cores() -> int:
    """How many threads may run here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply_masks(
    vector: Vector, plus: Sequence[bytes], minus: Sequence[bytes], *, suite: Suite, threads: int = 1
) -> None:
    """Add the streams of the keys in `plus` to the vector and take those in `minus` from it, in place.

    Args:
        vector: ring elements, shape (length,), contiguous.
        plus: 32-byte keys.
        minus: 32-byte keys.
        suite: names the cipher.
        threads: at most so many; a vector shorter than a block a thread uses fewer.
    """
    flat = vector.view(np.uint8)
    parts = max(1, min(threads, -(-len(flat) // BLOCK_BYTES)))
    step = -(-len(flat) // (parts * _ALIGN)) * _ALIGN
    starts = range(0, len(flat), step)
    if len(starts) <= 1:
        _apply_range(vector, 0, len(flat), plus, minus, suite)
        return
    with ThreadPoolExecutor(parts, thread_name_prefix="secagg-mask") as pool:
        for done in [
            pool.submit(_apply_range, vector, start, min(start + step, len(flat)), plus, minus, suite)
            for start in starts
        ]:
            done.result()


def _apply_range(
    vector: Vector, start: int, stop: int, plus: Sequence[bytes], minus: Sequence[bytes], suite: Suite
) -> None:
    """Bytes `start` to `stop` of the vector; `start` is a multiple of 64."""
    width = vector.dtype.itemsize
    buffer = bytearray(BLOCK_BYTES)
    stream = np.frombuffer(buffer, dtype=vector.dtype)
    zeros = memoryview(_ZEROS)
    signed = [(np.add, key) for key in plus] + [(np.subtract, key) for key in minus]
    for first in range(0, len(signed), _KEYS_AT_ONCE):
        group = [(op, key_stream(suite, key, start)) for op, key in signed[first : first + _KEYS_AT_ONCE]]
        for low in range(start, stop, BLOCK_BYTES):
            size = min(BLOCK_BYTES, stop - low)
            block = vector[low // width : (low + size) // width]
            part, source = stream[: size // width], zeros[:size]
            for op, cipher in group:
                cipher.update_into(source, buffer)
                op(block, part, out=block)
