"""Where the time goes, measured at the seams of a run: a part is opened where work of one kind begins, and closed where it ends.

Without a meter that is switched on a span costs a comparison. Time in a part within a part counts for the inner one alone, so
the parts add up to the whole.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, TypeVar

T = TypeVar("T")

OTHER: Final = "other"
_NOTHING: Final = nullcontext()
_active: Meter | None = None


class Meter:
    """Seconds by part, of the thread that made it.

    What other threads measure happens while this one waits for them: their seconds, divided by how many they are, are taken
    from the part that it waits in.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._mutex = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._elsewhere: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._threads: set[int] = set()
        self._stack = [OTHER]
        self._since = self._started = time.perf_counter()

    def open(self, part: str) -> None:
        """From here on time counts for `part`, until `close`; of the owner's thread only."""
        self._count()
        self._stack.append(part)

    def close(self) -> None:
        """Back to the part before."""
        self._count()
        if len(self._stack) > 1:
            self._stack.pop()

    def unwind(self, depth: int = 1) -> None:
        """Close parts until `depth` are open: after an exception."""
        while len(self._stack) > depth:
            self.close()

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Time inside counts for `part`."""
        me = threading.get_ident()
        if me == self._owner:
            depth = len(self._stack)
            self.open(part)
            try:
                yield
            finally:
                self.unwind(depth)
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._mutex:
                self._threads.add(me)
                self._elsewhere[self._stack[-1], part] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Wall seconds by part so far; their sum is the time since the meter was made."""
        self._count()
        found = dict(self._seconds)
        with self._mutex:
            for (waited_in, part), spent in self._elsewhere.items():
                share = min(spent / len(self._threads), found.get(waited_in, 0.0))
                found[waited_in] = found.get(waited_in, 0.0) - share
                found[part] = found.get(part, 0.0) + share
        return found

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now


def span(part: str) -> AbstractContextManager[None]:
    """Count time for a part, if anybody is measuring."""
    return _NOTHING if _active is None else _active.span(part)


def spanned(part: str, items: Iterator[T]) -> Iterator[T]:
    """The same items, with the time that it takes to make them counted for a part."""
    while True:
        with span(part):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def measuring() -> Iterator[Meter]:
    """Switch a meter on for this process."""
    global _active
    before, meter = _active, Meter()
    _active = meter
    try:
        yield meter
    finally:
        _active = before
