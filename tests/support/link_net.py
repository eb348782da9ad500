"""A coordinator's link and its sites in one process: real gRPC over real mutual TLS on loopback, one loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from fedlearn.link import LinkClient, LinkGrid, LinkServer, Role, TlsBundle, create_authority, issue

App = Callable[[Message, Context], Message]
HandlerOf = Callable[[TlsBundle], Callable[[Message], Awaitable[Message]]]
"""Makes what answers a site's messages, from its certificate."""


class Site:
    """One client: a ClientApp behind a LinkClient, one message at a time, its state kept between them."""

    def __init__(self, name: str, app: App, config: Mapping[str, str]) -> None:
        self.name, self._app, self._config = name, app, dict(config)
        self._states: dict[int, RecordDict] = {}
        self._lock = threading.Lock()

    async def handle(self, message: Message) -> Message:
        return await asyncio.get_running_loop().run_in_executor(None, self._call, message)

    def _call(self, message: Message) -> Message:
        with self._lock:
            run = message.metadata.run_id
            context = Context(
                run, message.metadata.dst_node_id, self._config, self._states.setdefault(run, RecordDict()), {}
            )
            reply = self._app(message, context)
            self._states[run] = context.state
            return reply


class LinkNet:
    """A server with its clients connected."""

    def __init__(self, server: LinkServer, authority: Path) -> None:
        self.server, self._authority = server, authority
        self.authority_pem = (authority / "ca.pem").read_bytes()

    def issue(self, name: str) -> Path:
        """A client's bundle from this net's authority, for a process of its own."""
        return issue(self._authority, name, Role.CLIENT, self._authority.parent / "tls" / name)

    def grid(self, run_id: int) -> LinkGrid:
        return self.server.grid(run_id)

    def name_of(self, node_id: int) -> str:
        """The name in a client's certificate."""
        return {node.node_id: node.client_id for node in self.server.nodes()}[node_id]


@contextlib.contextmanager
def link_net(
    folder: Path, names: Sequence[str] = (), app: App | None = None, handler_of: HandlerOf | None = None
) -> Iterator[LinkNet]:
    """All clients of `names`, connected to a server on a free port of loopback; everything is stopped in the end.

    Without names there is only the server: its clients are processes that the test starts.
    """
    authority = create_authority(folder / "ca")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def on_loop(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    server = LinkServer(
        "127.0.0.1:0", TlsBundle.load(issue(authority, "coordinator", Role.SERVER, folder / "coordinator"))
    )
    tasks: list[asyncio.Task] = []
    try:
        address = on_loop(server.start())

        async def dial() -> None:
            for name in names:
                bundle = TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name))
                if handler_of is None:
                    assert app is not None
                    handler = Site(name, app, {"client-id": name}).handle
                else:
                    handler = handler_of(bundle)
                client = LinkClient(address, bundle, handler)
                tasks.append(asyncio.create_task(client.run()))

        on_loop(dial())
        connected = server.grid(0).wait_nodes(len(names), 30)
        assert len(connected) == len(names), f"only {len(connected)} of {len(names)} clients connected"
        yield LinkNet(server, authority)
    finally:

        async def stop() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.stop(1.0)
            begun = [task for task in asyncio.all_tasks() if task.get_name() == "training"]
            for task in begun:  # that nobody asked for
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
            if rest := asyncio.all_tasks() - {asyncio.current_task()}:  # their reservations go back
                await asyncio.wait(rest, timeout=5.0)

        on_loop(stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
