"""One process, one state folder: an advisory lock that the system lets go when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from fedlearn.errors import StateError

LOCK_FILE = "lock"


class FolderLock:
    """Holds `folder/lock` from construction to `release`.

    Args:
        folder: made when missing, readable by its owner alone.
        holder: what kind of process asks, for the message that another one sees.

    Raises:
        StateError: another process holds it, or the folder cannot be made or written.
    """

    def __init__(self, folder: Path, holder: str) -> None:
        path = folder / LOCK_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Never inherited: a worker process must not keep the folder of a dead agent locked.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(
                f"{folder}: cannot be used as a state folder: {error.strerror}",
                hint="choose a folder that you may write to",
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(self._fd, 200).decode(errors="replace").strip()
            os.close(self._fd)
            raise StateError(
                f"{folder}: in use by {other or 'another process'}",
                hint="stop that process; only one that works for somebody else, or on other data, has a state folder of its own",
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{holder}, process {os.getpid()}\n".encode())

    def release(self) -> None:
        """Let go. The file stays: deleting it would let two processes hold two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
