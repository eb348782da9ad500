"""Group commit: a simulation's rounds reach the disk together, some at a time, in order.

A coordinator must have written before anybody is told. In a simulation nobody else is told: whatever a crash forgets is computed
again, to the same bits. So records gather in memory and go to the disk in one transaction when the last one is a second old. What
is on the disk is then always what had been written up to some moment, never a mixture.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from fedlearn.clock import Clock, SystemClock
from fedlearn.release.journal import Changes, check_changes

if TYPE_CHECKING:
    from fedlearn.release.journal import Journal

EVERY_S: Final = 1.0
"""A crash costs so many seconds of work at the most, and the round that was under way."""
GATHER_LIMIT_BYTES: Final = 32 * 1024**2
"""More than this is written at once."""


class GroupedJournal:
    """A `Journal` whose writes are on the disk a little later, in order. Calls from several threads are taken one at a time.

    Args:
        inner: the one on the disk; closed with this one.
        clock: tells when the last transaction was.
        every_s: seconds between transactions; None for `EVERY_S`.
        limit_bytes: of values that may gather.
    """

    def __init__(
        self,
        inner: Journal,
        *,
        clock: Clock | None = None,
        every_s: float | None = None,
        limit_bytes: int = GATHER_LIMIT_BYTES,
    ) -> None:
        self._inner, self._limit_bytes = inner, limit_bytes
        self._every_s = every_s if every_s is not None else EVERY_S
        self._clock = clock if clock is not None else SystemClock()
        self._gathered: dict[str, bytes | None] = {}
        self._bytes = 0
        self._written_s = self._clock.monotonic()
        self._mutex = threading.RLock()

    def get(self, key: str) -> bytes | None:
        with self._mutex:
            return self._gathered[key] if key in self._gathered else self._inner.get(key)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        self.flush()
        yield from self._inner.scan(prefix)

    def write(self, changes: Changes) -> None:
        check_changes(changes)
        with self._mutex:
            for key, value in changes.items():
                self._bytes += len(value or b"") - len(self._gathered.get(key) or b"")
                self._gathered[key] = value
            if self._bytes > self._limit_bytes or self._clock.monotonic() - self._written_s >= self._every_s:
                self.flush()

    def flush(self) -> None:
        """Everything so far is on the disk when this returns.

        Raises:
            StateError: the disk refused; what was there before is there still, and the rest is kept for another try.
        """
        with self._mutex:
            if self._gathered:
                self._inner.write(self._gathered)
                self._gathered, self._bytes = {}, 0
            self._written_s = self._clock.monotonic()

    def close(self) -> None:
        """Write what is left, and close the inner one whatever becomes of that."""
        try:
            self.flush()
        finally:
            self._inner.close()
