"""Ctrl-C in a long run: the first one finishes the round, the second one stops at once, the third one does not wait for threads."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from fedlearn.errors import INTERRUPTED_EXIT_CODE


class Interrupts:
    """Takes SIGINT while it is entered. A context manager.

    Args:
        doing: what the first Ctrl-C waits for, such as "this round".
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._before: Any = None
        self.asked = self._raised = False

    def should_stop(self) -> bool:
        """True once somebody pressed Ctrl-C."""
        return self.asked

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._raised:  # threads are in the middle of something long; what is on the disk is whole at any moment
            os._exit(INTERRUPTED_EXIT_CODE)
        if self.asked:
            self._raised = True
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the signal may have come while a stream was being written to.
        os.write(2, f"\nfinishing {self._doing}; Ctrl-C again stops at once\n".encode())
