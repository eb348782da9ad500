"""Durable keyed records, changed by one transaction at a time: all that the release path asks of a disk.

`MemoryJournal` writes frames to a `MemoryDisk`, which can crash at every operation; the property tests run on it.
`fedlearn.release.sqlite.SqliteJournal` is the one for production. Both pass the same contract test.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

from fedlearn.errors import LimitExceededError, StateError

VALUE_LIMIT_BYTES: Final = 2 * 1024**3
"""The largest value of one record."""

KEY_LIMIT_BYTES: Final = 4_096
"""The longest key of one record."""

Changes = Mapping[str, bytes | None]
"""Keys to new values; None deletes the key."""


class Journal(Protocol):
    """Keyed records on a disk. One writer; a record is small or as large as a model."""

    def get(self, key: str) -> bytes | None:
        """The record's value, or None.

        Raises:
            StateError: the stored bytes are damaged.
        """
        ...

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Every record whose key starts with `prefix`, in order of keys. Meant for prefixes with small values."""
        ...

    def write(self, changes: Changes) -> None:
        """Apply all changes or none; when this returns they survive a loss of power.

        After an exception it is unknown whether they were applied: open the journal anew to find out.

        Raises:
            LimitExceededError: a key or value exceeds its named limit; nothing was written.
            StateError: the disk refused.
        """
        ...

    def close(self) -> None:
        """Give back what is held. Nothing is lost."""
        ...


def pack(fields: Mapping[str, Any]) -> bytes:
    """A small record as canonical JSON bytes."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def unpack(data: bytes, *required: str, what: str) -> dict[str, Any]:
    """The fields of a small record.

    Args:
        data: what `pack` returned.
        required: names of fields that it must have.
        what: the record's name, for the message.

    Raises:
        StateError: the bytes are not a JSON object with those fields.
    """
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise damaged(what, str(error)) from None
    if not isinstance(fields, dict):
        raise damaged(what, f"got {type(fields).__name__}, expected an object")
    if missing := [name for name in required if name not in fields]:
        raise damaged(what, f"it has no {missing[0]!r}")
    return fields


def damaged(what: str, why: str) -> StateError:
    """The error for a record that does not hold what was written."""
    return StateError(f"journal: record {what!r} is damaged: {why}", hint="restore the folder from a backup")


def check_changes(changes: Changes) -> None:
    """Refuse keys and values over the named limits.

    Raises:
        LimitExceededError: names the limit.
    """
    for key, value in changes.items():
        if not 1 <= len(key.encode()) <= KEY_LIMIT_BYTES:
            raise LimitExceededError(
                f"journal: a key of {len(key.encode())} bytes, limit KEY_LIMIT_BYTES is {KEY_LIMIT_BYTES}"
            )
        if value is not None and len(value) > VALUE_LIMIT_BYTES:
            raise LimitExceededError(
                f"journal: record {key!r} of {len(value)} bytes, limit VALUE_LIMIT_BYTES is {VALUE_LIMIT_BYTES}"
            )


class DictJournal:
    """A journal that lives and dies with its process: for a simulation, and where a runtime offers no disk."""

    def __init__(self) -> None:
        self._records: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        return self._records.get(key)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        yield from ((key, self._records[key]) for key in sorted(self._records) if key.startswith(prefix))

    def write(self, changes: Changes) -> None:
        check_changes(changes)
        _apply(self._records, changes)

    def close(self) -> None:
        """Nothing is held."""


class MemoryDisk:
    """An append-only file in memory that forgets what was not synced.

    Bytes that were written and not synced may survive a crash whole, in part or not at all; bytes that were synced do.
    A test overrides `step` to raise at a chosen operation and calls `crash` with the number of unsynced bytes to keep.
    """

    def __init__(self) -> None:
        self._durable = bytearray()
        self._pending = bytearray()

    def step(self, operation: str) -> None:
        """Called before a write, after it, and after a sync ("write", "written", "synced"). The place to crash."""

    def append(self, data: bytes) -> None:
        self.step("write")
        self._pending += data
        self.step("written")

    def sync(self) -> None:
        self._durable += self._pending
        self._pending.clear()
        self.step("synced")

    def read(self) -> bytes:
        """What a reader of the running machine sees."""
        return bytes(self._durable + self._pending)

    def durable(self) -> bytes:
        """What a loss of power would leave for certain."""
        return bytes(self._durable)

    def unsynced(self) -> int:
        """Bytes that a crash may lose."""
        return len(self._pending)

    def crash(self, keep_unsynced_bytes: int = 0) -> None:
        """Lose the power, keeping a prefix of what was not synced: 0 is all lost, `unsynced()` is all kept."""
        self._durable += self._pending[:keep_unsynced_bytes]
        self._pending.clear()

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes, durably."""
        del self._durable[size:]


class MemoryJournal:
    """A journal in memory over a `MemoryDisk`: one framed, checksummed append and one sync per transaction."""

    def __init__(self, disk: MemoryDisk | None = None) -> None:
        self._disk = disk if disk is not None else MemoryDisk()
        self._records, size = replay(self._disk.read())
        # What follows the last whole frame is a transaction that never returned: it is cut off, as if it had not begun.
        self._disk.truncate(size)

    def get(self, key: str) -> bytes | None:
        return self._records.get(key)

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        yield from ((key, self._records[key]) for key in sorted(self._records) if key.startswith(prefix))

    def write(self, changes: Changes) -> None:
        check_changes(changes)
        self._disk.append(_frame(changes))
        self._disk.sync()
        _apply(self._records, changes)

    def close(self) -> None:
        """Nothing is held."""


def replay(data: bytes) -> tuple[dict[str, bytes], int]:
    """The records that a file of frames holds, and the size of its whole frames in bytes."""
    records: dict[str, bytes] = {}
    position = 0
    while len(data) - position >= _HEADER_BYTES:
        size = int.from_bytes(data[position : position + 8], "big")
        checksum = int.from_bytes(data[position + 8 : position + _HEADER_BYTES], "big")
        body = data[position + _HEADER_BYTES : position + _HEADER_BYTES + size]
        if len(body) < size or zlib.crc32(body) != checksum:
            break
        _apply(records, _parse(body))
        position += _HEADER_BYTES + size
    return records, position


_HEADER_BYTES: Final = 12
_DELETED: Final = 2**64 - 1


def _frame(changes: Changes) -> bytes:
    body = bytearray()
    for key, value in changes.items():
        name = key.encode()
        body += len(name).to_bytes(4, "big") + name
        body += (_DELETED if value is None else len(value)).to_bytes(8, "big") + (value or b"")
    return len(body).to_bytes(8, "big") + zlib.crc32(body).to_bytes(4, "big") + bytes(body)


def _parse(body: bytes) -> dict[str, bytes | None]:
    changes: dict[str, bytes | None] = {}
    position = 0
    while position < len(body):
        start = position + 4 + int.from_bytes(body[position : position + 4], "big")
        key = body[position + 4 : start].decode()
        size = int.from_bytes(body[start : start + 8], "big")
        position = start + 8 + (0 if size == _DELETED else size)
        changes[key] = None if size == _DELETED else body[start + 8 : position]
    return changes


def _apply(records: dict[str, bytes], changes: Changes) -> None:
    for key, value in changes.items():
        if value is None:
            records.pop(key, None)
        else:
            records[key] = value
