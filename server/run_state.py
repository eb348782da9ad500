"""What one run sees of the store: durable records for its round loop, and a place for its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedlearn.release.journal import Changes, check_changes
from server import blobs

if TYPE_CHECKING:
    from server.store import Store


class RunModel:
    """`fedlearn.learning.runtime.ModelSink` of one run."""

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run

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
