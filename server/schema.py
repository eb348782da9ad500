"""The coordinator's tables, and the one number that says which version of them a database holds."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_VERSION: Final = 1

metadata = MetaData()

schema = Table("fedlearn_schema", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

runs = Table(
    "runs",
    metadata,
    # Order of submission. Not the id: ids are random, so that nobody can guess another's.
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("run", String(32), nullable=False, unique=True),
    Column("name", String(200), nullable=False),
    Column("status", String(16), nullable=False),
    Column("study", Text, nullable=False),
    Column("overrides", Text, nullable=False),  # a JSON list of strings
    Column("round", Integer, nullable=False, default=0),
    Column("rounds", Integer, nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("ended_at", Float),
    Column("submitter", String(80), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("stop_asked", Boolean, nullable=False, default=False),
)

events = Table(
    "events",
    metadata,
    Column("run", String(32), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("event", Text, nullable=False),  # a JSON object
)

participants = Table(
    "participants",
    metadata,
    Column("run", String(32), nullable=False),
    Column("client", String(80), nullable=False),
    UniqueConstraint("run", "client"),
)

# Over all runs: a site's ledger outlives them.
ledger_heads = Table(
    "ledger_heads",
    metadata,
    Column("client", String(80), primary_key=True),
    Column("data_set", String(200), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("head", Text, nullable=False),  # canonical JSON, signed by the site
)

# Large values in parts: no database takes a value of any size, and a part is what one read holds in memory.
blobs = Table(
    "blobs",
    metadata,
    Column("run", String(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("part", Integer, nullable=False),
    Column("parts", Integer, nullable=False),
    Column("checksum", String(16), nullable=False),  # xxh3-64 of data, hex
    Column("data", LargeBinary, nullable=False),
    UniqueConstraint("run", "name", "part"),
)

Index("runs_by_status", runs.c.status)
