"""A site's own memory of how far its ledger had come: its signed head in a file beside it, so that records cut off the end show.

Each record is durable in the ledger first, then its head here, both before anything that it pays for may leave. So a crash leaves the
head a record behind at the most, which is nothing to refuse; a ledger without the record that its head names was cut, or put back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

from fedlearn.durable import replace_file
from fedlearn.errors import StateError
from fedlearn.privacy.chain import SignedHead

HEAD_FILE: Final = "head.json"
MAX_HEAD_BYTES: Final = 64 * 1024
"""A larger file is no head."""

NEWEST_COPY: Final = "put the newest copy in place; what was spent since the copy would otherwise be forgotten"


class HeadMemory(Protocol):
    """Where a ledger's last head is kept."""

    def read(self) -> SignedHead | None: ...
    def write(self, head: SignedHead) -> None: ...


class HeadFile:
    """One head in a file of a ledger's folder, replaced as a whole.

    Args:
        folder: of the ledger; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> SignedHead | None:
        """The head; None where no file is.

        Raises:
            StateError: it cannot be read, or is no head.
        """
        file = self._folder / HEAD_FILE
        try:
            with file.open("rb") as opened:
                return SignedHead.from_text(opened.read(MAX_HEAD_BYTES).decode("ascii", errors="replace"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(
                f"{file}: cannot be read: {error.strerror}", hint="check the folder and the disk"
            ) from None
        except StateError as error:
            raise StateError(f"{file}: {error.message}", hint=NEWEST_COPY) from None

    def write(self, head: SignedHead) -> None:
        """Replace it, durably.

        Raises:
            OSError: the disk refuses; the head before is still there.
        """
        replace_file(self._folder / HEAD_FILE, head.to_text().encode() + b"\n")
