"""A cache with a limit in bytes, for many threads: what was used longest ago goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class ByteCache(Generic[V]):
    """Values by key.

    Copies and pickles begin empty: what is cached can be made again.

    Args:
        limit_bytes: of all values together; a value that is larger by itself is not kept.
        size: of a value, in bytes.
    """

    def __init__(self, limit_bytes: int, size: Callable[[V], int]) -> None:
        self.limit_bytes, self._size = limit_bytes, size
        self.used_bytes = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> V | None:
        """The value, which is now the one used last; None where there is none."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: str, value: V) -> V:
        """Keep a value, and give back what is kept: of two threads that made one, the first one's."""
        size_bytes = self._size(value)
        with self._lock:
            if (found := self._values.get(key)) is not None:
                return found[0]
            if size_bytes <= self.limit_bytes:
                self._values[key] = value, size_bytes
                self.used_bytes += size_bytes
                while self.used_bytes > self.limit_bytes:
                    self.used_bytes -= self._values.popitem(last=False)[1][1]
            return value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit_bytes, self._size)
