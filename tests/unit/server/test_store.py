from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fedlearn import events
from fedlearn.clock import MockClock
from fedlearn.errors import LimitExceededError, StateError
from server import blobs, schema
from server.records import RUN_TRANSITIONS, RunStatus
from server.run_state import RunJournal, RunModel
from server.store import Store


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url, clock=MockClock(50.0))
    yield opened
    opened.close()


def add(store: Store, run: str = "a1") -> str:
    store.add_run(run, "heart", "rounds = 3", ["seed=1"], 3, "operator")
    return run


def test_a_run_is_queued_and_read_back(store: Store) -> None:
    add(store, "a1")
    add(store, "b2")
    row = store.run("a1")
    assert (row.status, row.overrides, row.round, row.rounds, row.submitted_at) == (
        RunStatus.QUEUED,
        ("seed=1",),
        0,
        3,
        50.0,
    )
    assert [r.run for r in store.runs()] == ["b2", "a1"]
    with pytest.raises(StateError, match="no such run"):
        store.run("zz")


@pytest.mark.parametrize("start", RunStatus)
@pytest.mark.parametrize("end", RunStatus)
def test_a_status_moves_only_along_the_table(store: Store, start: RunStatus, end: RunStatus) -> None:
    run = add(store)
    if start is not RunStatus.QUEUED:
        store.move(run, RunStatus.RUNNING)
    if start.ended:
        store.move(run, start)
    if end in RUN_TRANSITIONS[start]:
        assert store.move(run, end, reason="why").status is end
        assert (store.run(run).ended_at is not None) == end.ended
    else:
        with pytest.raises(StateError, match="cannot become"):
            store.move(run, end)
        assert store.run(run).status is start


def test_large_values_are_cut_into_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "PART_BYTES", 7)
    run = add(store)
    for size in (0, 1, 7, 8, 100):
        data = bytes(range(size))
        store.save_model(run, data)
        assert store.load_model(run) == data
    assert store.load_model("other") is None


@pytest.mark.parametrize("damage", ["change", "lose"])
def test_damage_is_found(store: Store, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(blobs, "PART_BYTES", 4)
    run = add(store)
    store.save_model(run, b"12345678")
    last = schema.blobs.c.part == 1
    with store.writing() as db:
        if damage == "change":
            db.execute(sa.update(schema.blobs).where(last).values(data=b"567x"))
        else:
            db.execute(sa.delete(schema.blobs).where(last))
    with pytest.raises(StateError, match=r"damaged|1 parts of 2"):
        store.load_model(run)


def test_events_are_numbered_and_read_from_any_number(store: Store) -> None:
    run = add(store)
    assert store.next_event(run) == 0
    store.add_events([(run, n, f'{{"n":{n}}}') for n in range(5)])
    assert store.next_event(run) == 5
    assert store.events(run, 3) == [(3, '{"n":3}'), (4, '{"n":4}')]
    assert store.events(run, 0, limit=2) == [(0, '{"n":0}'), (1, '{"n":1}')]
    assert store.events("other", 0) == []


def test_events_of_one_kind_are_found_among_others(store: Store) -> None:
    run = add(store)
    told = [
        events.ClientRefused(run, "a", "50% _of_ it"),
        events.ClientDropped(run, 1, "b", 'says "refused":true'),
        events.ClientDropped(run, 1, "c", "no", refused=True),
        events.ClientRefused(run, "d", "no"),
    ]
    store.add_events([(run, number, events.to_json(event, 0.0)) for number, event in enumerate(told)])

    def found(kind: str, **more: Any) -> list[events.Event]:
        return [events.from_json(line)[0] for _, line in store.events_of(run, kind, **{"limit": 9} | more)]

    assert found("ClientRefused") == [told[0], told[3]]
    assert found("ClientRefused", newest=True, limit=1) == [told[3]]
    assert found("ClientDropped", having='"refused":true') == [told[2]]
    assert found("Client") == []


def test_events_note_the_rounds_that_are_done(store: Store) -> None:
    run = add(store)
    store.add_events([(run, 0, "{}"), ("other", 0, "{}")], {run: 2})
    assert store.run(run).round == 2


def test_a_run_ends_together_with_its_last_event(store: Store) -> None:
    run = add(store)
    store.move(run, RunStatus.RUNNING)
    store.move(run, RunStatus.FAILED, reason="why", last=[(0, "{}")])
    assert (store.run(run).reason, store.events(run, 0)) == ("why", [(0, "{}")])
    with pytest.raises(StateError, match="cannot become"):
        store.move(run, RunStatus.STOPPED, last=[(1, "{}")])
    assert store.next_event(run) == 1


def test_the_wish_to_stop_is_remembered(store: Store) -> None:
    run = add(store)
    assert not store.run(run).stop_asked
    store.ask_to_stop(run)
    assert store.run(run).stop_asked


def test_participants_are_a_set(store: Store) -> None:
    run = add(store)
    store.add_participants(run, ["b", "a"])
    store.add_participants(run, ["a", "c"])
    assert store.participants(run) == {"a", "b", "c"}
    assert store.participants("other") == frozenset()
    store.add_participants("b2", ["a"])
    assert (store.runs_of("a"), store.runs_of("c"), store.runs_of("z")) == ({"a1", "b2"}, {"a1"}, frozenset())


def test_the_journal_is_a_journal_of_one_run(store: Store) -> None:
    journal, other = RunJournal(store, "a1"), RunJournal(store, "b2")
    journal.write({"release/2": b"two", "release/1": b"", "base": b"x"})
    other.write({"release/1": b"other"})
    assert journal.get("release/1") == b""
    assert list(journal.scan("release/")) == [("release/1", b""), ("release/2", b"two")]
    journal.write({"release/2": None, "base": b"y", "absent": None})
    assert list(journal.scan("")) == [("base", b"y"), ("release/1", b"")]
    assert other.get("release/1") == b"other"
    with pytest.raises(LimitExceededError):
        journal.write({"k" * 5000: b""})


def test_what_was_committed_is_there_for_the_next_process(database_url: str) -> None:
    first = Store(database_url)
    run = add(first)
    RunModel(first, run).finish(b"model", {})
    RunJournal(first, run).write({"k": b"v"})
    first.close()
    second = Store(database_url)
    try:
        assert (second.load_model(run), RunJournal(second, run).get("k")) == (b"model", b"v")
    finally:
        second.close()


def test_a_newer_schema_is_refused(database_url: str) -> None:
    store = Store(database_url)
    with store.writing() as db:
        db.execute(sa.update(schema.schema).values(version=schema.SCHEMA_VERSION + 1))
    store.close()
    with pytest.raises(StateError, match=f"version {schema.SCHEMA_VERSION + 1}"):
        Store(database_url)


def test_many_threads_write_and_nothing_is_lost(store: Store) -> None:
    run = add(store)
    errors: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            for n in range(10):
                store.add_events([(run, worker * 100 + n, "{}")])
                store.run(run)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.events(run, 0)) == 40


def test_sqlite_commits_are_synced_and_use_the_write_ahead_log(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'state.db'}")
    with store.reading() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


@pytest.mark.parametrize("url", ["not a url", "nosuchdatabase://x/y", "sqlite:////nonexistent/folder/state.db"])
def test_a_database_that_cannot_be_opened_is_a_state_error(url: str) -> None:
    with pytest.raises(StateError):
        Store(url)


def test_an_error_does_not_show_the_password_of_the_database() -> None:
    with pytest.raises(StateError) as caught:
        Store("nosuchdatabase://user:swordfish@host/y")
    assert "swordfish" not in str(caught.value)


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(StateError):
        Store(f"sqlite:///{tmp_path / 'state.db'}")
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "state.db").execute("select * from runs").close()
