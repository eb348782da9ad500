"""The journal for production: SQLite in a folder, with large values as files beside it.

A transaction is one SQLite commit in WAL mode with synchronous=FULL, so it is on the disk when `write` returns. A value of
more than `INLINE_LIMIT_BYTES` becomes a file of its own: SQLite would write it twice and keep its pages for good. The file
is written and synced first, under a name never used before, and the row that names it is committed after; a crash
between the two leaves a file that no row names, which is removed when the journal is opened.

The folder has one owner at a time: a lock on the file `lock` excludes a second process, and a second journal in this one.
Keep it on a local disk: locks and syncs of network file systems do not promise enough.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import xxhash

from fedlearn.durable import sync_folder
from fedlearn.errors import StateError
from fedlearn.release.journal import Changes, check_changes

INLINE_LIMIT_BYTES: Final = 64 * 1024
"""Larger values are files."""

_APPLICATION_ID: Final = 0x666C_726A
_VERSION: Final = 1
_SCHEMA: Final = "CREATE TABLE record (key TEXT PRIMARY KEY, value BLOB, file TEXT, checksum TEXT NOT NULL) STRICT"


class SqliteJournal:
    """A `Journal` in a folder. Calls from several threads are taken one at a time.

    Args:
        folder: made when missing, readable by its owner alone.
        inline_limit_bytes: larger values become files.
        durable: False where the folder is thrown away with the process: nothing waits for the disk then.

    Raises:
        StateError: another process has it open, it is not a journal of this version, or the disk refuses.
    """

    def __init__(self, folder: Path, *, inline_limit_bytes: int = INLINE_LIMIT_BYTES, durable: bool = True) -> None:
        self._folder, self._durable = folder, durable
        self._inline_limit_bytes = inline_limit_bytes
        self._mutex = threading.Lock()
        self._database: sqlite3.Connection | None = None
        try:
            (folder / "files").mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = _lock(folder)
            try:
                self._database = _open(folder / "journal.db", durable)
                for name in (folder, folder.parent):
                    sync_folder(name)
                self._sweep(self._database)
            except BaseException:
                self.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise self._failure("open", error) from error

    def get(self, key: str) -> bytes | None:
        with self._mutex:
            try:
                query = "SELECT value, file, checksum FROM record WHERE key = ?"
                row = self._connection().execute(query, (key,)).fetchone()
                return None if row is None else self._value(key, *row)
            except (OSError, sqlite3.Error) as error:
                raise self._failure("read", error) from error

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        with self._mutex:
            try:
                # Keys are compared as bytes, and no text goes on with a character above the last code point.
                query = "SELECT key, value, file, checksum FROM record WHERE key >= ? AND key < ? ORDER BY key"
                rows = self._connection().execute(query, (prefix, prefix + "\U0010ffff")).fetchall()
                found = [(str(key), self._value(key, *rest)) for key, *rest in rows]
            except (OSError, sqlite3.Error) as error:
                raise self._failure("read", error) from error
        yield from found

    def write(self, changes: Changes) -> None:
        check_changes(changes)
        with self._mutex:
            database = self._connection()
            try:
                rows = [(key, *self._stored(value)) for key, value in changes.items() if value is not None]
                if self._durable and any(file is not None for _, _, file, _ in rows):
                    sync_folder(self._folder / "files")
                database.execute("BEGIN IMMEDIATE")
                try:
                    old = [self._file_of(database, key) for key in changes]
                    gone = [(key,) for key, value in changes.items() if value is None]
                    database.executemany("DELETE FROM record WHERE key = ?", gone)
                    database.executemany("INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?)", rows)
                    database.execute("COMMIT")
                except BaseException:
                    if database.in_transaction:
                        database.execute("ROLLBACK")
                    raise
            except (OSError, sqlite3.Error) as error:
                raise self._failure("write", error) from error
            for file in old:
                if file is not None:
                    # No row names it any more; if this fails, the next opening sweeps it away.
                    (self._folder / "files" / file).unlink(missing_ok=True)

    def close(self) -> None:
        with self._mutex:
            if self._database is not None:
                self._database.close()
                self._database = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            raise StateError(f"journal {self._folder}: it is closed")
        return self._database

    def _stored(self, value: bytes) -> tuple[bytes | None, str | None, str]:
        """The columns of a value, which is on the disk already if it is a file."""
        checksum = xxhash.xxh3_128_hexdigest(value)
        if len(value) <= self._inline_limit_bytes:
            return value, None, checksum
        name = secrets.token_hex(16)
        handle = os.open(self._folder / "files" / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(value)
            if self._durable:
                file.flush()
                os.fsync(file.fileno())
        return None, name, checksum

    def _value(self, key: str, value: bytes | None, file: str | None, checksum: str) -> bytes:
        data = value if file is None else (self._folder / "files" / file).read_bytes()
        if data is None or xxhash.xxh3_128_hexdigest(data) != checksum:
            raise StateError(
                f"journal {self._folder}: record {key!r} is damaged: its checksum differs",
                hint="the disk lost or changed data; restore the folder from a backup",
            )
        return data

    @staticmethod
    def _file_of(database: sqlite3.Connection, key: str) -> str | None:
        row = database.execute("SELECT file FROM record WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def _sweep(self, database: sqlite3.Connection) -> None:
        named = {name for (name,) in database.execute("SELECT file FROM record WHERE file IS NOT NULL")}
        for path in (self._folder / "files").iterdir():
            if path.name not in named:
                path.unlink()

    def _failure(self, what: str, error: Exception) -> StateError:
        return StateError(
            f"journal {self._folder}: cannot {what}: {error}",
            hint="check that the folder is a journal, on a local disk, with space left and writable by this user",
        )


def _lock(folder: Path) -> int | None:
    """The descriptor that holds the lock; the system lets go of it when the process dies, however it dies."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StateError(
            f"journal {folder}: another process has it open",
            hint="one agent or server at a time may use a state folder; stop the other one, or name another folder",
        ) from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open(path: Path, durable: bool) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database, path, durable)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path, durable: bool) -> None:
    """Set what durability rests on, make the table in a new file, and refuse somebody else's."""
    (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StateError(f"journal {path}: SQLite offers journal mode {mode!r}, expected wal")
    database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
    database.execute("PRAGMA fullfsync = 1")
    database.execute("PRAGMA secure_delete = ON")  # what is deleted may be a key
    identity = _pragma(database, "application_id"), _pragma(database, "user_version")
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and identity == (0, 0):
        database.execute("BEGIN IMMEDIATE")
        database.execute(_SCHEMA)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("COMMIT")
    elif identity != (_APPLICATION_ID, _VERSION):
        raise StateError(
            f"journal {path}: application and version are {identity}, expected {(_APPLICATION_ID, _VERSION)}",
            hint="the folder belongs to another program or to another version of fedlearn",
        )


def _pragma(database: sqlite3.Connection, name: str) -> Any:
    return database.execute(f"PRAGMA {name}").fetchone()[0]
