"""A real server with real clients on loopback, all on the test's own asyncio loop, and a proxy that cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedlearn.link import LinkClient, LinkLimits, LinkServer, Role, TlsBundle, create_authority, issue
from fedlearn.link.events import LinkConnected, LinkEvent

QUICK = LinkLimits(backoff_min_s=0.01, backoff_max_s=0.1, stop_s=1.0)
T = TypeVar("T", bound=LinkEvent)


class Log:
    """The events of one end; a test waits for one instead of for a time."""

    def __init__(self) -> None:
        self.events: list[LinkEvent] = []
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task] = set()

    def __call__(self, event: LinkEvent) -> None:
        self.events.append(event)
        task = asyncio.get_running_loop().create_task(self._tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def all(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind: type[T], count: int = 1, timeout_s: float = 20.0) -> T:
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len(self.all(kind)) >= count)
        return self.all(kind)[count - 1]


class Proxy:
    """Passes bytes between a client and the server; cuts every connection when told to, or after so many bytes."""

    def __init__(self, target: str) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task] = set()
        self.passed = {"down": 0, "up": 0}
        self.cut_after: dict[str, int] = {}
        self.cuts = 0
        self._moved = asyncio.Condition()
        self.frozen = asyncio.Event()
        self.frozen.set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self.cut()
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self.cuts += 1
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()

    async def until_passed(self, size_bytes: int) -> None:
        """Wait until so many bytes have passed each way."""
        async with self._moved:
            await self._moved.wait_for(lambda: min(self.passed.values()) >= size_bytes)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            other_reader, other_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, other_writer}
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._copy(reader, other_writer, "up"), self._copy(other_reader, writer, "down"))
        for end in (writer, other_writer):
            self._writers.discard(end)
            end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while data := await reader.read(65536):
            await self.frozen.wait()
            self.passed[way] += len(data)
            async with self._moved:
                self._moved.notify_all()
            if way in self.cut_after and self.passed[way] >= self.cut_after[way]:
                del self.cut_after[way]
                self.cut()
                return
            writer.write(data)
            await writer.drain()
        writer.write_eof()


class Net:
    """A running server and the means to start clients."""

    def __init__(self, folder: Path, limits: LinkLimits) -> None:
        self.folder, self.limits, self.log = folder, limits, Log()
        self.tasks: list[asyncio.Task] = []
        create_authority(folder / "ca")
        self.server = LinkServer(
            "127.0.0.1:0", self.bundle("coordinator", Role.SERVER), limits, emit=self.log, control=None
        )

    def bundle(self, name: str, role: Role = Role.CLIENT, authority: Path | None = None) -> TlsBundle:
        out = self.folder / f"{role.value}-{name}-{'own' if authority is None else 'other'}"
        return TlsBundle.load(issue(authority or self.folder / "ca", name, role, out))

    def start(self, name: str, handler: Callable, address: str | None = None, limits: LinkLimits | None = None):
        log = Log()
        client = LinkClient(
            address or self.server.address, self.bundle(name), handler, {"site": name}, limits or self.limits, emit=log
        )
        task = asyncio.create_task(client.run())
        self.tasks.append(task)
        return client, task, log

    async def connected(self, count: int) -> list[int]:
        ids = await asyncio.to_thread(self.server.grid(1).wait_nodes, count, 20)
        assert len(ids) == count
        return list(ids)


@contextlib.asynccontextmanager
async def net(folder: Path, limits: LinkLimits = QUICK) -> AsyncIterator[Net]:
    """A server on a free port; everything is stopped in the end."""
    world = Net(folder, limits)
    await world.server.start()
    try:
        yield world
    finally:
        for task in world.tasks:
            task.cancel()
        await asyncio.gather(*world.tasks, return_exceptions=True)
        await world.server.stop(1.0)


async def stop(task: asyncio.Task) -> None:
    """Stop one client and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def message_of(data: bytes, node_id: int, ttl: float = 30.0) -> Message:
    """An instruction with one array of raw bytes."""
    record = ArrayRecord({"x": Array("uint8", (len(data),), "test.raw", data)})
    return Message(RecordDict({"a": record}), node_id, "train", ttl=ttl)


def data_of(message: Message) -> bytes:
    assert message.has_content(), message.error
    return message.content["a"]["x"].data


__all__ = ["QUICK", "LinkConnected", "Log", "Net", "Proxy", "data_of", "echo", "message_of", "net", "stop"]
