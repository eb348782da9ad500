"""Server, clients and grid over real gRPC and real mutual TLS on loopback."""

import asyncio
import dataclasses
import random

import pytest
import xxhash
from flwr.app import Message

from fedlearn.errors import LimitExceededError, LocalProtocolError, PolicyRefusedError
from fedlearn.link import GridCancelledError, flower
from fedlearn.link.events import (
    ChecksumFailed,
    HandlerFailed,
    LinkConnected,
    LinkLost,
    MessageExpired,
    PeerRefused,
    TransferResumed,
)
from fedlearn.link.limits import MIB
from fedlearn.link.transfer import Payload
from tests.support.link_live import QUICK, Proxy, data_of, echo, message_of, net, stop


async def test_messages_go_out_and_answers_come_back(tmp_path):
    async with net(tmp_path) as world:
        for name in ("a", "b", "c"):
            world.start(name, echo)
        ids = await world.connected(3)
        assert [node.client_id for node in world.server.nodes()] == ["a", "b", "c"]
        assert {node.node_id for node in world.server.nodes()} == set(ids)
        assert world.server.nodes()[0].facts == {"site": "a"}
        data = random.Random(1).randbytes(3 * MIB + 5)
        grid = world.server.grid(1)
        replies = await asyncio.to_thread(grid.send_and_receive, [message_of(data, i) for i in ids])
        assert [data_of(reply) for reply in replies] == [data] * 3
        assert {reply.metadata.src_node_id for reply in replies} == set(ids)
        assert all(reply.metadata.run_id == 1 and reply.metadata.message_id for reply in replies)


async def test_an_answer_is_handed_over_once_and_nothing_stays(tmp_path):
    async with net(tmp_path) as world:
        world.start("a", echo)
        (node,) = await world.connected(1)
        grid = world.server.grid(1)
        ids = grid.push_messages([message_of(b"x" * 1000, node) for _ in range(3)])
        assert len(set(ids)) == 3
        got = []
        while len(got) < 3:
            got += await asyncio.to_thread(grid.wait_messages, ids, 10)
        assert sorted(reply.metadata.reply_to_message_id for reply in got) == sorted(ids)
        assert grid.pull_messages(ids) == []
        assert await asyncio.to_thread(grid.wait_messages, ids) == []
        assert not grid._ready
        assert not grid._waiting
        assert not world.server._pending
        peer = world.server._peers[node]
        assert not peer.mailbox.outgoing
        assert not peer.mailbox.incoming
        assert not grid._payloads


@pytest.mark.parametrize("way", ["down", "up"])
async def test_a_transfer_goes_on_after_the_cut_from_the_last_byte_that_came(tmp_path, way):
    async with net(tmp_path) as world:
        proxy = Proxy(world.server.address)
        ran = []

        async def handler(message):
            ran.append(message.metadata.message_id)
            return await echo(message)

        _, _, log = world.start("a", handler, await proxy.start())
        (node,) = await world.connected(1)
        size = 24 * MIB
        data = random.Random(2).randbytes(size)
        proxy.cut_after = {way: proxy.passed[way] + size // 2}
        replies = await asyncio.to_thread(world.server.grid(1).send_and_receive, [message_of(data, node)], timeout=30)
        assert data_of(replies[0]) == data
        assert proxy.cuts == 1
        assert len(ran) == 1
        (resumed,) = (log if way == "down" else world.log).all(TransferResumed)
        assert MIB <= resumed.offset < size
        # Only what was in flight was sent twice, far less than from the beginning.
        assert proxy.passed[way] < size * 1.45
        await proxy.stop()


async def test_a_message_runs_once_though_the_connection_is_cut_while_it_runs(tmp_path):
    async with net(tmp_path) as world:
        proxy = Proxy(world.server.address)
        ran, began, go_on = [], asyncio.Event(), asyncio.Event()

        async def handler(message):
            ran.append(message.metadata.message_id)
            began.set()
            await go_on.wait()
            return await echo(message)

        _, _, log = world.start("a", handler, await proxy.start())
        (node,) = await world.connected(1)
        ids = world.server.grid(1).push_messages([message_of(b"x" * 100, node)])
        await began.wait()
        for round_number in range(2, 5):
            proxy.cut()
            assert (await log.until(LinkConnected, round_number)).resumed
        go_on.set()
        (reply,) = await asyncio.to_thread(world.server.grid(1).wait_messages, ids, 10)
        assert data_of(reply) == b"x" * 100
        assert len(ran) == 1
        await proxy.stop()


async def test_a_client_that_was_killed_and_restarted_gets_its_message_again(tmp_path):
    async with net(tmp_path) as world:
        started = asyncio.Event()

        async def never(_message):
            started.set()
            await asyncio.Event().wait()

        _, task, _ = world.start("a", never)
        (node,) = await world.connected(1)
        ids = world.server.grid(1).push_messages([message_of(b"data", node)])
        await started.wait()
        await stop(task)
        await world.log.until(LinkLost)
        world.start("a", echo)
        (reply,) = await asyncio.to_thread(world.server.grid(1).wait_messages, ids, 10)
        assert data_of(reply) == b"data"


async def test_a_second_connection_of_one_client_replaces_the_first(tmp_path):
    async with net(tmp_path) as world:
        proxy = Proxy(world.server.address)
        _, task, _ = world.start("a", echo, await proxy.start())
        (node,) = await world.connected(1)
        # The stream hangs: nothing comes through any more and nobody is told.
        proxy.frozen.clear()
        world.start("a", echo)
        await world.log.until(LinkConnected, 2)
        assert [n.client_id for n in world.server.nodes() if n.connected] == ["a"]
        replies = await asyncio.to_thread(world.server.grid(1).send_and_receive, [message_of(b"y", node)], timeout=10)
        assert data_of(replies[0]) == b"y"
        await stop(task)
        await proxy.stop()


async def test_a_silent_peer_is_taken_for_dead_by_both_ends(tmp_path):
    limits = dataclasses.replace(QUICK, heartbeat_s=0.05, heartbeat_grace_s=0.2)
    async with net(tmp_path, limits) as world:
        proxy = Proxy(world.server.address)
        _, _, log = world.start("a", echo, await proxy.start())
        await log.until(LinkConnected)
        proxy.frozen.clear()
        assert "no sign of life" in (await log.until(LinkLost)).reason
        assert "no sign of life" in (await world.log.until(LinkLost)).reason
        proxy.cut()
        proxy.frozen.set()
        await log.until(LinkConnected, 2)
        await proxy.stop()


async def test_heartbeats_keep_an_idle_connection(tmp_path):
    limits = dataclasses.replace(QUICK, heartbeat_s=0.02, heartbeat_grace_s=0.5)
    async with net(tmp_path, limits) as world:
        proxy = Proxy(world.server.address)
        _, _, log = world.start("a", echo, await proxy.start())
        await log.until(LinkConnected)
        await asyncio.wait_for(proxy.until_passed(6_000), 20)
        assert not log.all(LinkLost)
        assert not world.log.all(LinkLost)
        await proxy.stop()


async def test_a_client_that_vanishes_costs_the_deadline_and_no_more(tmp_path):
    async with net(tmp_path) as world:
        asked = asyncio.Event()

        async def never(_message):
            asked.set()
            await asyncio.Event().wait()

        _, task, _ = world.start("a", never)
        (node,) = await world.connected(1)
        ids = world.server.grid(1).push_messages([message_of(b"", node, ttl=0.5)])
        await asked.wait()
        await stop(task)
        (reply,) = await asyncio.to_thread(world.server.grid(1).wait_messages, ids, 10)
        assert reply.error.code == flower.ERROR_NO_REPLY
        assert "no answer within 0.5 s" in reply.error.reason
        assert reply.metadata.src_node_id == node
        assert world.log.all(MessageExpired)


async def test_a_client_may_be_away_for_so_long(tmp_path):
    async with net(tmp_path, dataclasses.replace(QUICK, reconnect_s=0.2)) as world:
        _, task, _ = world.start("a", echo)
        (node,) = await world.connected(1)
        await stop(task)
        await world.log.until(LinkLost)
        ids = world.server.grid(1).push_messages([message_of(b"", node, ttl=1000.0)])
        (reply,) = await asyncio.to_thread(world.server.grid(1).wait_messages, ids, 10)
        assert reply.error.code == flower.ERROR_UNREACHABLE
        assert "away for more than 0.2 s" in reply.error.reason


async def test_a_message_to_a_client_that_left_long_ago_fails_as_well(tmp_path):
    async with net(tmp_path, dataclasses.replace(QUICK, reconnect_s=0.05)) as world:
        _, task, _ = world.start("a", echo)
        (node,) = await world.connected(1)
        await stop(task)
        await world.log.until(LinkLost)
        grid = world.server.grid(1)
        for _ in range(2):
            ids = grid.push_messages([message_of(b"", node, ttl=1000.0)])
            (reply,) = await asyncio.to_thread(grid.wait_messages, ids, 10)
            assert reply.error.code == flower.ERROR_UNREACHABLE


async def test_a_message_to_nobody_fails_at_once(tmp_path):
    async with net(tmp_path) as world:
        replies = await asyncio.to_thread(world.server.grid(1).send_and_receive, [message_of(b"", 12345)])
        assert replies[0].error.code == flower.ERROR_UNREACHABLE


async def test_the_deadline_reaches_the_handler_as_a_cancellation(tmp_path):
    async with net(tmp_path) as world:
        cancelled = asyncio.Event()

        async def slow(_message):
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        world.start("a", slow)
        (node,) = await world.connected(1)
        world.server.grid(1).push_messages([message_of(b"", node, ttl=0.3)])
        await asyncio.wait_for(cancelled.wait(), 10)


async def test_ttl_is_relative_to_the_clients_own_clock(tmp_path):
    async with net(tmp_path) as world:
        seen = []

        async def handler(message):
            seen.append((message.metadata.created_at, message.metadata.ttl, message.metadata.dst_node_id))
            return await echo(message)

        world.start("a", handler)
        (node,) = await world.connected(1)
        message = message_of(b"", node, ttl=30.0)
        flower.stamp(message, created_at=12.0)  # a server whose clock stands in 1970
        await asyncio.to_thread(world.server.grid(1).send_and_receive, [message])
        ((created_at, ttl, dst),) = seen
        assert created_at > 1e9
        assert 20 < ttl <= 30
        assert dst == node


async def test_a_handler_that_raises_costs_one_message(tmp_path):
    async with net(tmp_path) as world:

        async def broken(message):
            if message.metadata.message_type == "train":
                raise RuntimeError("no data today")
            if message.metadata.message_type == "query":
                error = PolicyRefusedError("policy: not this study", hint="ask for another")
                error.permanent = bytes(data_of(message)) == b"for good"
                raise error
            return await echo(message)

        _, _, log = world.start("a", broken)
        (node,) = await world.connected(1)
        grid = world.server.grid(1)
        replies = await asyncio.to_thread(grid.send_and_receive, [message_of(b"", node)])
        assert replies[0].error.code == flower.ERROR_CLIENT_RAISED
        assert replies[0].error.reason == "RuntimeError: no data today"
        assert log.all(HandlerFailed)
        for said, code in ((b"for good", flower.ERROR_REFUSED), (b"today", flower.ERROR_CLIENT_RAISED)):
            asked = message_of(said, node)
            asked.metadata.message_type = "query"
            (reply,) = await asyncio.to_thread(grid.send_and_receive, [asked])
            assert (reply.error.code, reply.error.reason) == (code, "policy: not this study\n  ask for another")
        fine = message_of(b"z", node)
        fine.metadata.message_type = "evaluate"
        replies = await asyncio.to_thread(grid.send_and_receive, [fine])
        assert data_of(replies[0]) == b"z"


async def test_a_damaged_chunk_is_sent_again_and_never_used(tmp_path, monkeypatch):
    whole = Payload._build
    damaged = []

    def once(self, index):
        frame = whole(self, index)
        if index == 2 and len(damaged) < 2:
            damaged.append(index)
            return frame[:-1] + bytes([frame[-1] ^ 1])
        return frame

    monkeypatch.setattr(Payload, "_build", once)
    async with net(tmp_path) as world:
        _, _, log = world.start("a", echo)
        (node,) = await world.connected(1)
        data = random.Random(3).randbytes(6 * MIB)
        replies = await asyncio.to_thread(world.server.grid(1).send_and_receive, [message_of(data, node)], timeout=20)
        assert data_of(replies[0]) == data
        assert [(e.offset, e.attempt) for e in log.all(ChecksumFailed)] == [(MIB, 1), (MIB, 2)]
        assert not log.all(LinkLost)


async def test_a_message_that_always_comes_damaged_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda _data: 0)
    async with net(tmp_path) as world:
        _, _, log = world.start("a", echo)
        (node,) = await world.connected(1)
        replies = await asyncio.to_thread(world.server.grid(1).send_and_receive, [message_of(b"x", node)], timeout=20)
        assert "refused the message: checksum" in replies[0].error.reason
        assert len(log.all(ChecksumFailed)) == QUICK.checksum_retries


async def test_an_oversized_message_is_refused_before_it_is_sent(tmp_path):
    async with net(tmp_path, dataclasses.replace(QUICK, message_bytes=1000)) as world:
        world.start("a", echo)
        (node,) = await world.connected(1)
        grid = world.server.grid(1)
        with pytest.raises(LimitExceededError, match="got 1001, limit message_bytes is 1000"):
            grid.push_messages([message_of(b"x", node), message_of(b"x" * 1001, node)])
        assert not grid._waiting
        assert not world.server._pending
        replies = await asyncio.to_thread(grid.send_and_receive, [message_of(b"x" * 1000, node)])
        assert len(data_of(replies[0])) == 1000


async def test_an_oversized_answer_comes_back_as_an_error_and_the_client_lives(tmp_path):
    async with net(tmp_path, dataclasses.replace(QUICK, message_bytes=1000)) as world:

        async def grow(message):
            size = 1001 if data_of(message) == b"grow" else 3
            reply = message_of(b"y" * size, 1)
            return Message(reply.content, reply_to=message)

        # This client's own limits would let it pass; the server's do not.
        world.start("a", grow, limits=QUICK)
        (node,) = await world.connected(1)
        grid = world.server.grid(1)
        replies = await asyncio.to_thread(grid.send_and_receive, [message_of(b"grow", node)], timeout=20)
        assert "limit message_bytes is 1000" in replies[0].error.reason
        assert world.log.all(PeerRefused)
        replies = await asyncio.to_thread(grid.send_and_receive, [message_of(b"stay", node)], timeout=20)
        assert data_of(replies[0]) == b"yyy"


async def test_the_server_restarts_on_the_same_port_and_clients_come_back(tmp_path):
    async with net(tmp_path) as world:
        _, _, log = world.start("a", echo)
        (node,) = await world.connected(1)
        from fedlearn.link import LinkServer

        await world.server.stop(1.0)
        await log.until(LinkLost)
        tls = world.server._tls
        world.server = LinkServer(world.server.address, tls, QUICK, emit=world.log)
        await world.server.start()
        assert await world.connected(1) == [node]
        replies = await asyncio.to_thread(world.server.grid(1).send_and_receive, [message_of(b"again", node)])
        assert data_of(replies[0]) == b"again"


async def test_cancel_ends_whoever_waits(tmp_path):
    async with net(tmp_path) as world:
        asked, dropped = asyncio.Event(), asyncio.Event()

        async def never(_message):
            asked.set()
            try:
                await asyncio.Event().wait()
            finally:
                dropped.set()

        world.start("a", never)
        (node,) = await world.connected(1)
        grid = world.server.grid(1)
        thread = asyncio.create_task(asyncio.to_thread(grid.send_and_receive, [message_of(b"", node)]))
        await asked.wait()
        grid.cancel()
        with pytest.raises(GridCancelledError):
            await thread
        with pytest.raises(GridCancelledError):
            grid.push_messages([])
        await asyncio.wait_for(dropped.wait(), 10)
        assert world.server.grid(1) is grid
        world.server.close_grid(1)
        assert world.server.grid(1) is not grid


async def test_a_waiting_call_on_the_servers_loop_is_refused_not_deadlocked(tmp_path):
    async with net(tmp_path) as world:
        grid = world.server.grid(1)
        with pytest.raises(LocalProtocolError, match="another thread"):
            grid.send_and_receive([message_of(b"", 5)])


async def test_one_push_is_encoded_once_for_all_clients(tmp_path, monkeypatch):
    built = []
    whole = Payload._build

    def count(self, index):
        built.append((self.payload_id, index))
        return whole(self, index)

    async with net(tmp_path) as world:

        async def short(message):
            return Message(message_of(b"ok", 1).content, reply_to=message)

        for name in "abcdef":
            world.start(name, short)
        ids = await world.connected(6)
        data = bytes(8 * MIB)
        monkeypatch.setattr(Payload, "_build", count)
        grid = world.server.grid(1)
        content = message_of(data, 1).content
        # Even in pushes of their own, as the round loop sends them.
        sent = [grid.push_messages([Message(content, i, "train")])[0] for i in ids]
        got = []
        while len(got) < 6:
            got += await asyncio.to_thread(grid.wait_messages, sent, 20)
        assert len({payload for payload, _ in built if len([b for b in built if b[0] == payload]) == 16}) == 1
        assert len(built) == 16 + 6


async def test_goodbye_of_a_stopped_client_is_told(tmp_path):
    async with net(tmp_path) as world:
        _, task, _ = world.start("a", echo)
        await world.connected(1)
        await stop(task)
        assert (await world.log.until(LinkLost)).reason == "the peer said goodbye"
        assert world.server.grid(1).get_node_ids() == []
        assert [node.connected for node in world.server.nodes()] == [False]
