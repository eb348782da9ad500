"""A coordinator over its real link and store, with clients in the same process and a tiny app."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedlearn import events
from fedlearn.errors import AddressInUseError, PolicyRefusedError, StateError, StudyError
from fedlearn.link import ControlClient, LinkClient, Role, TlsBundle, create_authority, issue
from server.coordinator import Coordinator
from server.options import CoordinatorOptions
from server.store import Store
from tests.unit.server.apps import squares


class World:
    """A state folder, certificates and an app; coordinators come and go on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = create_authority(folder / "ca")
        self.tls = {
            name: TlsBundle.load(issue(authority, name, role, folder / "tls" / name))
            for name, role in (
                ("coordinator", Role.SERVER),
                ("operator", Role.OPERATOR),
                ("ada", Role.CLIENT),
                ("bob", Role.CLIENT),
            )
        }
        self.app = squares(folder / "app")
        self.address = "127.0.0.1:0"
        self.asked: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    @contextlib.asynccontextmanager
    async def coordinator(self, max_runs: int = 4) -> AsyncIterator[Coordinator]:
        options = CoordinatorOptions(self.address, self.folder, self.folder / "tls" / "coordinator", max_runs=max_runs)
        store = Store(f"sqlite:///{self.folder / 'state.db'}")
        found = Coordinator(options, self.app, self.tls["coordinator"], store)
        try:
            self.address = await found.start()
            yield found
        finally:
            assert await found.stop()
            store.close()

    @contextlib.asynccontextmanager
    async def client(self, name: str = "ada") -> AsyncIterator[None]:
        async def answer(message: Message) -> Message:
            n = int(message.content["ask"]["n"])
            self.asked.append(n)
            await self.gate.wait()
            return Message(RecordDict({"answer": ConfigRecord({"n": n * n})}), reply_to=message)

        task = asyncio.create_task(LinkClient(self.address, self.tls[name], answer).run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def ask(self, call, who: str = "operator"):
        """A control call, in a thread: the control client is synchronous."""

        def run():
            with ControlClient(self.address, self.tls[who]) as control:
                return call(control)

        return await asyncio.to_thread(run)

    async def follow(self, run: str, start: int = 0, who: str = "operator") -> list[events.Event]:
        return [events.from_json(line)[0] for _, line in await self.ask(lambda c: list(c.watch(run, start)), who)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "app"), *sys.path])
    for name in [n for n in sys.modules if n.partition(".")[0] == "squares"]:
        monkeypatch.delitem(sys.modules, name)
    return World(tmp_path)


def kinds(found: list[events.Event]) -> list[str]:
    return [type(event).__name__ for event in found]


async def until(events_: AsyncIterator[tuple[int, str]], kind: type[events.Event]) -> events.Event:
    async for _, line in events_:
        if isinstance(event := events.from_json(line)[0], kind):
            return event
    raise AssertionError(f"the events ended without {kind.__name__}")


async def test_a_run_is_submitted_watched_shown_and_its_model_fetched(world: World):
    async with world.coordinator(), world.client():
        run = await world.ask(lambda c: c.submit("rounds = 3", ()))
        assert kinds(await world.follow(run)) == ["RunStarted", *["RoundStarted", "RoundFinished"] * 3, "RunFinished"]
        assert kinds(await world.follow(run, 6)) == ["RoundFinished", "RunFinished"]
        (summary,) = await world.ask(lambda c: c.runs())
        assert (summary.run_id, summary.status, summary.round) == (run, "finished", 3)
        detail = json.loads((await world.ask(lambda c: c.show(run[:6]))).detail_json)
        assert [row["total"] for row in detail["history"]] == [1, 5, 14]
        assert (detail["metric"], detail["clients"]) == ("sum", ["ada"])
        path = await world.ask(lambda c: c.model(run, world.folder / "out"))
        assert path.read_bytes() == b"14"


async def test_a_client_sees_only_the_runs_that_it_took_part_in(world: World):
    async with world.coordinator():
        async with world.client("ada"):
            run = await world.ask(lambda c: c.submit("", ()))
            await world.follow(run)
        assert [r.run_id for r in await world.ask(lambda c: c.runs(), "ada")] == [run]
        assert await world.ask(lambda c: c.runs(), "bob") == []
        for call in (lambda c: c.show(run), lambda c: list(c.watch(run)), lambda c: c.model(run, world.folder)):
            with pytest.raises(StateError, match="no such run"):
                await world.ask(call, "bob")
        with pytest.raises(PolicyRefusedError):
            await world.ask(lambda c: c.submit("", ()), "ada")


async def test_a_site_is_not_told_who_was_drawn_where_clients_are_protected(world: World):
    """The operator is; and a site is where records are protected, whose cohorts are no secret."""
    async with world.coordinator(), world.client():
        for unit, hidden in (("client", True), ("record", False)):
            run = await world.ask(lambda c, unit=unit: c.submit(f'unit = "{unit}"', ()))
            all_of_it = await world.follow(run)
            seen = await world.follow(run, who="ada")
            (started,) = (e for e in seen if isinstance(e, events.RunStarted))
            assert (started.clients == ()) is hidden
            assert ("RoundStarted" in kinds(seen)) is not hidden
            assert {e.clients for e in seen if isinstance(e, events.RoundFinished)} == ({0} if hidden else {1})
            assert kinds(await world.follow(run, 3, "ada"))[:2] == (
                ["RoundFinished", "RoundFinished"] if hidden else ["RoundFinished", "RoundStarted"]
            ), "also of one who comes later"
            details = [await world.ask(lambda c, run=run: c.show(run), who) for who in ("ada", "operator")]
            site, operator = (json.loads(one.detail_json) for one in details)
            assert operator["clients"] == ["ada"]
            assert site["clients"] == ([] if hidden else ["ada"])
            assert all(("clients" in row) is not hidden for row in site["history"])
            assert all("clients" in row for row in operator["history"])
            assert "RoundStarted" in kinds(all_of_it)
            assert site["privacy"]["unit"] == unit


async def test_a_run_that_was_suspended_goes_on_in_the_next_process(world: World):
    world.gate.clear()
    async with world.coordinator() as first, world.client():
        run = await world.ask(lambda c: c.submit("rounds = 2", ()))
        assert isinstance(await until(first.event_log.watch(run, 0), events.RoundStarted), events.RoundStarted)
    world.gate.set()
    async with world.coordinator(), world.client():
        found = await world.follow(run)
        assert kinds(found)[-1] == "RunFinished"
        assert found[-1].model_digest == "5"
        assert kinds(found).count("RunStarted") == 2


async def test_runs_over_the_limit_wait_in_order(world: World):
    world.gate.clear()
    async with world.coordinator(max_runs=1) as coordinator, world.client():
        runs = [await world.ask(lambda c: c.submit("rounds = 1", ())) for _ in range(3)]
        await until(coordinator.event_log.watch(runs[0], 0), events.RoundStarted)
        assert [r.status for r in reversed(await world.ask(lambda c: c.runs()))] == ["running", "queued", "queued"]
        assert (await world.ask(lambda c: c.stop(runs[1]))).status == "stopped"
        world.gate.set()
        for run in (runs[0], runs[2]):
            assert kinds(await world.follow(run))[-1] == "RunFinished"
        assert kinds(await world.follow(runs[1])) == ["RunStopped"]


async def test_a_stop_lets_the_round_end(world: World):
    world.gate.clear()
    async with world.coordinator() as coordinator, world.client():
        run = await world.ask(lambda c: c.submit("rounds = 100", ()))
        await until(coordinator.event_log.watch(run, 0), events.RoundStarted)
        assert (await coordinator.stop_run(run, 0.0)).stop_asked
        world.gate.set()
        found = await world.follow(run)
        assert kinds(found)[-2:] == ["RoundFinished", "RunStopped"]
        assert (await world.ask(lambda c: c.show(run))).summary.status == "stopped"
        with pytest.raises(StateError, match="has no model"):
            await world.ask(lambda c: c.model(run, world.folder / "out"))


async def test_a_second_stop_does_not_wait_for_the_round(world: World):
    world.gate.clear()
    async with world.coordinator() as coordinator, world.client():
        run = await world.ask(lambda c: c.submit("rounds = 100", ()))
        await until(coordinator.event_log.watch(run, 0), events.RoundStarted)
        await coordinator.stop_run(run, 0.0)
        assert (await coordinator.stop_run(run, 20.0)).status.value == "stopped"
        assert kinds(await world.follow(run))[-1] == "RunStopped"


async def test_a_serverapp_that_raises_fails_its_run_and_nothing_else(world: World):
    async with world.coordinator(), world.client():
        run = await world.ask(lambda c: c.submit("", ("fail=2",)))
        last = (await world.follow(run))[-1]
        assert isinstance(last, events.RunFailed)
        assert "ValueError: no such luck" in last.reason
        assert (await world.ask(lambda c: c.show(run))).summary.status == "failed"
        other = await world.ask(lambda c: c.submit("", ()))
        assert kinds(await world.follow(other))[-1] == "RunFinished"


@pytest.mark.parametrize(
    ("text", "overrides", "match"),
    [
        ("ronds = 3", (), "unknown key 'ronds'"),
        ("rounds = ", (), "not valid TOML"),
        ("rounds = [1]", (), "rounds is list"),
        ("", ("nested.nome=y",), "unknown key 'nested.nome'"),
    ],
)
async def test_a_run_config_that_the_app_does_not_know_is_refused(world: World, text: str, overrides, match: str):
    async with world.coordinator():
        with pytest.raises(StudyError, match=match):
            await world.ask(lambda c: c.submit(text, overrides))
        assert await world.ask(lambda c: c.runs()) == []


async def test_a_port_in_use_is_named(world: World):
    async with world.coordinator() as first:
        store = Store(f"sqlite:///{world.folder / 'other.db'}")
        options = CoordinatorOptions(world.address, world.folder, world.folder)
        second = Coordinator(options, world.app, world.tls["coordinator"], store)
        try:
            with pytest.raises(AddressInUseError, match=world.address):
                await second.start()
        finally:
            await second.stop()
            store.close()
        assert first.failure is None


async def test_a_disk_that_refuses_ends_the_process_with_its_reason(world: World, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise StateError("database: disk full")

    async with world.coordinator() as coordinator, world.client():
        monkeypatch.setattr(coordinator._store, "add_events", refuse)
        await world.ask(lambda c: c.submit("", ()))
        await asyncio.wait_for(coordinator.wait(), 20)
        assert coordinator.failure is not None
        assert "disk full" in str(coordinator.failure)
