"""What one run sees of the store: its checkpoints, and durable records for the release path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedlearn.release.journal import Changes, check_changes
from server import blobs

if TYPE_CHECKING:
    from fedlearn.learning.runtime import Checkpoint
    from server.store import Store


class RunCheckpoints:
    """`fedlearn.learning.runtime.Checkpoints` of one run."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run

    def load(self) -> Checkpoint | None:
        return self._store.load_checkpoint(self._run)

    def save(self, round_: int, attempt: int, arrays: bytes, facts: Mapping[str, Any]) -> None:
        self._store.save_checkpoint(self._run, round_, attempt, arrays, facts)

    def finish(self, model: bytes, facts: Mapping[str, Any]) -> None:
        del facts
        self._store.save_model(self._run, model)


class RunJournal:
    """`fedlearn.release.journal.Journal` of one run, in the coordinator's database."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run

    def get(self, key: str) -> bytes | None:
        with self._store.reading() as db:
            return blobs.read(db, self._run, _record(key))

    def scan(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        with self._store.reading() as db:
            found = [(n, blobs.read(db, self._run, n)) for n in blobs.names(db, self._run, _record(prefix))]
        yield from ((name.removeprefix(_record("")), data) for name, data in found if data is not None)

    def write(self, changes: Changes) -> None:
        check_changes(changes)
        with self._store.writing() as db:
            for key, value in changes.items():
                blobs.delete(db, self._run, _record(key))
                if value is not None:
                    blobs.write(db, self._run, _record(key), value)

    def close(self) -> None:
        """The store is closed by its owner."""


def _record(key: str) -> str:
    return f"journal/{key}"
