"""Control calls over real gRPC: every call, every role, every way to fail."""

import asyncio
import contextlib

import pytest

from fedlearn import errors
from fedlearn.errors import (
    FedlearnError,
    LimitExceededError,
    LinkError,
    PolicyRefusedError,
    RemoteProtocolError,
    StateError,
    StudyError,
    TlsError,
)
from fedlearn.link import ControlClient, LinkServer, ModelFile, Role, RunDetail, RunSummary, create_authority
from fedlearn.link import control as control_module
from fedlearn.link.control import error_to_fault, fault_to_error
from tests.support.link_live import QUICK, Net, echo

RUN = RunSummary("run-1", "heart", "running", 3, 20, 1_700_000_000.5)


class Coordinator:
    """Handlers with one run."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []
        self.go_on = asyncio.Event()

    async def submit(self, caller, study, overrides):
        self.calls.append((caller.uri, study, overrides))
        if "bad" in study:
            raise StudyError("got 'bad', expected a study", hint="write one")
        return "run-1"

    async def stop(self, caller, run_id):
        return RUN

    async def runs(self, caller):
        return [RUN]

    async def show(self, caller, run_id):
        if run_id != "run-1":
            raise StateError(f"no run {run_id!r}")
        return RunDetail(RUN, '{"a": 1}')

    async def watch(self, caller, run_id, start):
        for index in range(start, 3):
            yield index, f'{{"event": {index}}}'
        await self.go_on.wait()
        yield 3, '{"event": "RunFinished"}'

    async def model(self, caller, run_id):
        return ModelFile(self.folder / "m.bin", "model.safetensors")


@contextlib.asynccontextmanager
async def coordinator(tmp_path):
    world = Net(tmp_path, QUICK)
    handlers = Coordinator(tmp_path)
    world.server = LinkServer("127.0.0.1:0", world.server._tls, QUICK, emit=world.log, control=handlers)
    await world.server.start()
    try:
        yield world, handlers
    finally:
        for task in world.tasks:
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)
        await world.server.stop(0.0)


def asked(world, work, role=Role.OPERATOR, name="boss"):
    def call():
        with ControlClient(world.server.address, world.bundle(name, role), QUICK, timeout_s=10) as client:
            return work(client)

    return asyncio.to_thread(call)


async def test_an_operator_submits_lists_shows_and_stops(tmp_path):
    async with coordinator(tmp_path) as (world, handlers):
        assert await asked(world, lambda c: c.submit("[study]", ["a=1", "b=2"])) == "run-1"
        assert handlers.calls == [("fedlearn://operator/boss", "[study]", ("a=1", "b=2"))]
        assert await asked(world, lambda c: c.runs()) == [RUN]
        assert await asked(world, lambda c: c.show("run-1")) == RunDetail(RUN, '{"a": 1}')
        assert await asked(world, lambda c: c.stop("run-1")) == RUN


async def test_nodes_are_listed(tmp_path):
    async with coordinator(tmp_path) as (world, _):
        world.start("cleveland", echo)
        (node_id,) = await world.connected(1)
        (node,) = await asked(world, lambda c: c.nodes())
        assert (node.node_id, node.client_id, node.connected, node.facts) == (
            node_id,
            "cleveland",
            True,
            {"site": "cleveland"},
        )


async def test_a_run_is_watched_live_from_any_event_on(tmp_path):
    async with coordinator(tmp_path) as (world, handlers):

        def watch(client):
            seen = []
            for index, event in client.watch("run-1", 1):
                seen.append((index, event))
                if index == 2:
                    world.loop.call_soon_threadsafe(handlers.go_on.set)
            return seen

        world.loop = asyncio.get_running_loop()
        seen = await asked(world, watch)
        assert seen == [(1, '{"event": 1}'), (2, '{"event": 2}'), (3, '{"event": "RunFinished"}')]


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
async def test_a_model_is_fetched_and_checked(tmp_path, size):
    async with coordinator(tmp_path) as (world, _):
        (tmp_path / "m.bin").write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
        path = await asked(world, lambda c: c.model("run-1", tmp_path / "out"), Role.CLIENT, "cleveland")
        assert path == tmp_path / "out" / "model.safetensors"
        assert path.read_bytes() == (tmp_path / "m.bin").read_bytes()
        assert list(path.parent.iterdir()) == [path]


async def test_a_model_that_comes_damaged_is_not_kept(tmp_path, monkeypatch):
    async with coordinator(tmp_path) as (world, _):
        (tmp_path / "m.bin").write_bytes(b"model")
        monkeypatch.setattr(control_module, "_datas", lambda first, chunks: (c.data[::-1] for c in chunks))
        with pytest.raises(RemoteProtocolError, match="SHA-256"):
            await asked(world, lambda c: c.model("run-1", tmp_path / "out"))
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "", "a/b"])
async def test_a_model_with_a_path_for_a_name_is_refused(tmp_path, monkeypatch, name):
    async with coordinator(tmp_path) as (world, handlers):
        (tmp_path / "m.bin").write_bytes(b"model")

        async def model(_caller, _run_id):
            return ModelFile(tmp_path / "m.bin", name)

        monkeypatch.setattr(handlers, "model", model)
        with pytest.raises(RemoteProtocolError, match="expected a plain one"):
            await asked(world, lambda c: c.model("run-1", tmp_path / "out"))


async def test_a_client_may_look_and_not_touch(tmp_path):
    async with coordinator(tmp_path) as (world, handlers):
        assert await asked(world, lambda c: c.runs(), Role.CLIENT, "cleveland") == [RUN]
        for work in (lambda c: c.submit("x"), lambda c: c.stop("run-1"), lambda c: c.nodes()):
            with pytest.raises(PolicyRefusedError, match=r"fedlearn://client/cleveland may not"):
                await asked(world, work, Role.CLIENT, "cleveland")
        assert not handlers.calls


async def test_the_coordinators_errors_arrive_as_what_they_are(tmp_path):
    async with coordinator(tmp_path) as (world, _):
        with pytest.raises(StudyError) as caught:
            await asked(world, lambda c: c.submit("bad"))
        assert (caught.value.message, caught.value.hint) == ("got 'bad', expected a study", "write one")
        with pytest.raises(StateError, match="no run 'x'"):
            await asked(world, lambda c: c.show("x"))


async def test_an_oversized_study_is_refused_on_both_sides(tmp_path, monkeypatch):
    async with coordinator(tmp_path) as (world, handlers):
        with pytest.raises(LimitExceededError, match="study_bytes"):
            await asked(world, lambda c: c.submit("x" * (QUICK.study_bytes + 1)))
        with pytest.raises(LimitExceededError, match="study_bytes"):
            await asked(world, lambda c: c.submit("", ["x" * (QUICK.study_bytes + 1)]))
        assert not handlers.calls


async def test_a_stranger_and_an_empty_port_are_told_apart(tmp_path):
    async with coordinator(tmp_path) as (world, _):
        other = create_authority(tmp_path / "other")
        stranger = world.bundle("boss", Role.OPERATOR, other)

        def call():
            with ControlClient(world.server.address, stranger, timeout_s=10) as client:
                client.runs()

        with pytest.raises(TlsError, match="refused"):
            await asyncio.to_thread(call)
        await world.server.stop(0.0)
        with pytest.raises(LinkError, match="cannot be reached"):
            await asked(world, lambda c: c.runs())
        await world.server.start()


@pytest.mark.parametrize(
    "kind",
    [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FedlearnError)],
    ids=lambda kind: kind.__name__,
)
def test_every_error_survives_the_wire(kind):
    back = fault_to_error(error_to_fault(kind("what was got", hint="what to do")))
    assert back.kind == kind.kind
    assert (back.message, back.hint) == ("what was got", "what to do")
    assert issubclass(kind, type(back))
