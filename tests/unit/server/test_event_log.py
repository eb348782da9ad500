from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlearn import events
from fedlearn.clock import MockClock
from fedlearn.errors import StateError
from server.event_log import EventLog
from server.records import RunStatus
from server.store import Store


@pytest.fixture
async def logged(tmp_path: Path) -> AsyncIterator[tuple[EventLog, Store]]:
    store = Store(f"sqlite:///{tmp_path / 'state.db'}")
    store.add_run("a1", "heart", "", (), 3, "operator")
    store.move("a1", RunStatus.RUNNING)
    log = EventLog(store, lambda error: pytest.fail(str(error)), MockClock(5.0))
    yield log, store
    await asyncio.to_thread(log.close)
    store.close()


def finished(round_: int, run: str = "a1") -> events.RoundFinished:
    return events.RoundFinished(run, round_, 1, 2, 0, 0.5, 0.1, 0.2)


async def test_events_of_many_threads_are_numbered_without_gaps(logged):
    log, store = logged
    threads = [threading.Thread(target=lambda: [log.put("a1", finished(n)) for n in range(1, 101)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await asyncio.to_thread(log.flush)
    found = store.events("a1", 0, limit=1000)
    assert [number for number, _ in found] == list(range(400))
    assert events.from_json(found[0][1]) == (finished(1), 5.0)


async def test_numbers_go_on_after_a_restart(logged):
    log, store = logged
    log.put("a1", finished(1))
    await asyncio.to_thread(log.close)
    again = EventLog(store, pytest.fail, MockClock())
    again.put("a1", finished(2))
    await asyncio.to_thread(again.close)
    assert [number for number, _ in store.events("a1", 0)] == [0, 1]


async def test_a_watcher_sees_what_was_and_what_comes_until_the_run_ends(logged):
    log, _ = logged
    log.put("a1", finished(1))
    log.put("a1", finished(2))
    seen = []
    async for number, line in log.watch("a1", 1):
        seen.append((number, type(events.from_json(line)[0]).__name__))
        if number == 1:
            log.put("a1", finished(3))
            await asyncio.to_thread(log.end, "a1", RunStatus.FINISHED, events.RunFinished("a1", 3, 1.0, "d"))
    assert seen == [(1, "RoundFinished"), (2, "RoundFinished"), (3, "RunFinished")]


async def test_watchers_end_when_the_log_is_closed(logged):
    log, _ = logged
    watching = asyncio.ensure_future(anext(log.watch("a1", 0), None))
    await asyncio.to_thread(log.close)
    assert await asyncio.wait_for(watching, 10) is None
    with pytest.raises(StateError, match="no such run"):
        await anext(log.watch("zz", 0))


async def test_rounds_done_follow_the_events(logged):
    log, store = logged
    log.put("a1", finished(1))
    log.put("a1", finished(2))
    await asyncio.to_thread(log.flush)
    assert store.run("a1").round == 2


async def test_a_disk_that_refuses_is_told_once_and_nobody_waits_for_ever(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path / 'state.db'}")
    told: list[StateError] = []
    log = EventLog(store, told.append)
    with store.writing() as db:
        db.exec_driver_sql("DROP TABLE events")
    for n in (1, 2):
        log.put("a1", finished(n))
        await asyncio.to_thread(log.flush)
    await asyncio.to_thread(log.close)
    store.close()
    assert len(told) == 1
