"""What the coordinator keeps: runs, their journals with every round and checkpoint, events and models, in one database.

SQLite in WAL mode by default, with every commit synced to disk; any other SQLAlchemy URL works alike. One process writes
(the state folder's lock sees to it), from several threads. What a method returned from survives a kill -9 and a loss of power.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import FedlearnError, StateError
from server import blobs, schema
from server.records import RUN_TRANSITIONS, RunRow, RunStatus

MODEL: Final = "model"
EVENTS_READ: Final = 256
"""Events that one read returns at most."""


class Store:
    """The coordinator's database.

    Args:
        url: a SQLAlchemy URL.
        clock: stamps records for people.

    Raises:
        StateError: the database cannot be opened, or was written by a newer version.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._writer = threading.Lock()
        try:
            self._engine = _open(url)
        except (SQLAlchemyError, ImportError) as error:
            shown = url.rsplit("@", maxsplit=1)[-1].split(":", maxsplit=1)[0]
            raise StateError(
                f"database {shown!r}: cannot be opened: {type(error).__name__}",
                hint="expected a SQLAlchemy URL such as sqlite:////path/state.db or postgresql+psycopg://...",
            ) from None
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    # Runs.

    def add_run(self, run: str, name: str, study: str, overrides: Sequence[str], rounds: int, submitter: str) -> RunRow:
        """Record a submitted run as queued."""
        values = {
            "run": run,
            "name": name,
            "status": RunStatus.QUEUED.value,
            "study": study,
            "overrides": json.dumps(list(overrides)),
            "round": 0,
            "rounds": rounds,
            "submitted_at": self._clock.wall(),
            "submitter": submitter,
        }
        with self.writing() as db:
            db.execute(sa.insert(schema.runs).values(values))
        return self.run(run)

    def run(self, run: str) -> RunRow:
        """One run by its id.

        Raises:
            StateError: there is none.
        """
        with self.reading() as db:
            row = db.execute(sa.select(schema.runs).where(schema.runs.c.run == run)).one_or_none()
        if row is None:
            raise StateError(f"run {run!r}: no such run", hint="`fedlearn runs` lists them")
        return _run_row(row)

    def runs(self, *statuses: RunStatus) -> list[RunRow]:
        """Runs with one of the statuses, or all; newest first."""
        query = sa.select(schema.runs).order_by(schema.runs.c.number.desc())
        if statuses:
            query = query.where(schema.runs.c.status.in_([s.value for s in statuses]))
        with self.reading() as db:
            return [_run_row(row) for row in db.execute(query)]

    def move(self, run: str, status: RunStatus, *, reason: str = "", last: Sequence[tuple[int, str]] = ()) -> RunRow:
        """Change a run's status, and append its last events in the same transaction.

        Raises:
            StateError: `RUN_TRANSITIONS` does not have the step.
        """
        with self.writing() as db:
            have = db.execute(sa.select(schema.runs.c.status).where(schema.runs.c.run == run)).scalar_one_or_none()
            if have is None or status not in RUN_TRANSITIONS[RunStatus(have)]:
                raise StateError(f"run {run}: it is {have or 'unknown'}, and cannot become {status.value}")
            values: dict[str, Any] = {"status": status.value, "reason": reason}
            if status.ended:
                values["ended_at"] = self._clock.wall()
            db.execute(sa.update(schema.runs).where(schema.runs.c.run == run).values(values))
            if last:
                db.execute(sa.insert(schema.events), [{"run": run, "number": n, "event": e} for n, e in last])
        return self.run(run)

    def ask_to_stop(self, run: str) -> None:
        """Remember that somebody wants the run to stop, also for the next process."""
        with self.writing() as db:
            db.execute(sa.update(schema.runs).where(schema.runs.c.run == run).values(stop_asked=True))

    def add_participants(self, run: str, clients: Iterable[str]) -> None:
        """Remember which clients took part; they may see the run and fetch its model."""
        table = schema.participants
        with self.writing() as db:
            have = set(db.execute(sa.select(table.c.client).where(table.c.run == run)).scalars())
            new = [{"run": run, "client": client} for client in sorted(set(clients) - have)]
            if new:
                db.execute(sa.insert(table), new)

    def participants(self, run: str) -> frozenset[str]:
        """Names of the clients that took part in a run."""
        table = schema.participants
        with self.reading() as db:
            return frozenset(db.execute(sa.select(table.c.client).where(table.c.run == run)).scalars())

    def runs_of(self, client: str) -> frozenset[str]:
        """Ids of the runs that a client took part in."""
        table = schema.participants
        with self.reading() as db:
            return frozenset(db.execute(sa.select(table.c.run).where(table.c.client == client)).scalars())

    # The final model.

    def save_model(self, run: str, model: bytes) -> None:
        """Keep a run's final model; a run that is resumed after its last round saves the same one again."""
        with self.writing() as db:
            blobs.delete(db, run, MODEL)
            blobs.write(db, run, MODEL, model)

    def load_model(self, run: str) -> bytes | None:
        """A run's final model, or None before it has one."""
        with self.reading() as db:
            return blobs.read(db, run, MODEL)

    # Events.

    def next_event(self, run: str) -> int:
        """The number that the run's next event will have; numbers start from 0."""
        table = schema.events
        with self.reading() as db:
            last = db.execute(sa.select(sa.func.max(table.c.number)).where(table.c.run == run)).scalar()
        return 0 if last is None else int(last) + 1

    def add_events(self, events: Sequence[tuple[str, int, str]], rounds_done: Mapping[str, int] | None = None) -> None:
        """Append events, as (run, number, JSON), and note how many rounds runs have committed; in one transaction."""
        if not events:
            return
        with self.writing() as db:
            db.execute(sa.insert(schema.events), [{"run": r, "number": n, "event": e} for r, n, e in events])
            for run, done in (rounds_done or {}).items():
                db.execute(sa.update(schema.runs).where(schema.runs.c.run == run).values(round=done))

    def events(self, run: str, start: int, limit: int = EVENTS_READ) -> list[tuple[int, str]]:
        """Events from number `start` on, as (number, JSON); at most `limit`."""
        table = schema.events
        query = sa.select(table.c.number, table.c.event).where(table.c.run == run, table.c.number >= start)
        with self.reading() as db:
            return [(int(n), str(e)) for n, e in db.execute(query.order_by(table.c.number).limit(limit))]

    def events_of(
        self, run: str, kind: str, *, limit: int, having: str = "", newest: bool = False
    ) -> list[tuple[int, str]]:
        """Events of one kind as (number, JSON), in their order or the newest first; at most `limit`.

        Args:
            run: whose.
            kind: the event's name.
            limit: how many.
            having: text that they hold, as it stands in their JSON.
            newest: begin at the end.
        """
        table = schema.events
        query = sa.select(table.c.number, table.c.event).where(
            table.c.run == run,
            table.c.event.startswith(f'{{"event":"{kind}"', autoescape=True),
            table.c.event.contains(having, autoescape=True),
        )
        with self.reading() as db:
            number = table.c.number.desc() if newest else table.c.number
            return [(int(n), str(e)) for n, e in db.execute(query.order_by(number).limit(limit))]

    # Transactions, for this package.

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database."""
        with _errors(), self._engine.begin() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that changes it: all or nothing, one at a time."""
        with self._writer, _errors(), self._engine.connect() as db, db.execution_options(fedlearn_write=True).begin():
            yield db

    def _prepare(self) -> None:
        with self.writing() as db:
            schema.metadata.create_all(db)
            version = db.execute(sa.select(schema.schema.c.version)).scalar_one_or_none()
            if version is None:
                db.execute(sa.insert(schema.schema).values(version=schema.SCHEMA_VERSION))
            elif version != schema.SCHEMA_VERSION:
                raise StateError(
                    f"database: its schema has version {version}, this fedlearn knows version {schema.SCHEMA_VERSION}",
                    hint="install the fedlearn that wrote it, or start with another state folder",
                )


def _run_row(row: sa.Row[Any]) -> RunRow:
    values = {f: getattr(row, f) for f in RunRow.__dataclass_fields__}
    return RunRow(**values | {"status": RunStatus(row.status), "overrides": tuple(json.loads(row.overrides))})


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except FedlearnError:
        raise
    except SQLAlchemyError as error:
        # The statement and its parameters are in str(error): they may hold a study or a model.
        cause = getattr(error, "orig", None) or type(error).__name__
        raise StateError(
            f"database: {cause}", hint="check that the disk is neither full nor read-only, and that the server is up"
        ) from None


def _open(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    engine = sa.create_engine(parsed, connect_args={"timeout": 60.0} if sqlite else {}, pool_pre_ping=not sqlite)
    if sqlite:
        # The driver's own transactions begin late and leave DDL out; these two hand them to SQLAlchemy.
        sa.event.listen(engine, "connect", _sqlite_connect)
        sa.event.listen(engine, "begin", _sqlite_begin)
    return engine


def _sqlite_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("fedlearn_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
