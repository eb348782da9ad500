"""Values of any size in a database: cut into parts, each with a checksum."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
import xxhash

from fedlearn.errors import StateError
from server import schema

PART_BYTES: Final = 16 * 1024**2


def write(db: sa.Connection, run: str, name: str, data: bytes) -> None:
    """Store a value under a name that holds none yet. An empty value is one empty part."""
    view = memoryview(data)
    starts = range(0, max(1, len(data)), PART_BYTES)
    for part, start in enumerate(starts):
        piece = view[start : start + PART_BYTES].tobytes()
        checksum = xxhash.xxh3_64_hexdigest(piece)
        row = {"run": run, "name": name, "part": part, "parts": len(starts), "checksum": checksum, "data": piece}
        db.execute(sa.insert(schema.blobs).values(row))


def read(db: sa.Connection, run: str, name: str) -> bytes | None:
    """A value, or None.

    Raises:
        StateError: what is stored is not what was written.
    """
    table = schema.blobs
    query = sa.select(table.c.part, table.c.parts, table.c.checksum, table.c.data)
    rows = db.execute(query.where(table.c.run == run, table.c.name == name).order_by(table.c.part))
    pieces: list[bytes] = []
    parts = 0
    for part, parts, checksum, data in rows:  # noqa: B007  # the last row's `parts` is compared below
        if part != len(pieces) or xxhash.xxh3_64_hexdigest(data) != checksum:
            raise StateError(f"run {run}: {name!r} is damaged in part {len(pieces)}", hint="restore from a backup")
        pieces.append(bytes(data))
    if not pieces:
        return None
    if len(pieces) != parts:
        raise StateError(f"run {run}: {name!r} has {len(pieces)} parts of {parts}", hint="restore from a backup")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def delete(db: sa.Connection, run: str, name: str) -> None:
    """Delete a value; nothing happens when there is none."""
    table = schema.blobs
    db.execute(sa.delete(table).where(table.c.run == run, table.c.name == name))


def names(db: sa.Connection, run: str, prefix: str) -> list[str]:
    """Names that start with `prefix`, in the order of their code points, whatever the database's collation."""
    table = schema.blobs
    query = sa.select(table.c.name).distinct().where(table.c.run == run)
    found = db.execute(query.where(sa.func.substr(table.c.name, 1, len(prefix)) == prefix)).scalars()
    return sorted(found)
