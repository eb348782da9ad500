"""Who is let in, and how both ends say why not."""

import asyncio
import dataclasses
import datetime as dt
import socket

import grpc
import pytest

from fedlearn.errors import AddressInUseError, LinkError, ProtocolError, TlsError
from fedlearn.link import LinkClient, LinkServer, Role, TlsBundle, create_authority, framing, issue, wire
from fedlearn.link.events import LinkConnected, PeerRefused
from fedlearn.link.frames import Hello
from tests.support.link_live import QUICK, echo, net


def client_of(world, tls, address=None):
    return LinkClient(address or world.server.address, tls, echo, {}, QUICK)


async def test_a_dry_run_says_that_all_is_well(tmp_path):
    async with net(tmp_path) as world:
        await client_of(world, world.bundle("a")).check()
        assert world.log.all(LinkConnected)


async def test_a_certificate_of_another_authority_is_refused_for_good(tmp_path):
    async with net(tmp_path) as world:
        other = create_authority(tmp_path / "other")
        with pytest.raises(TlsError, match="the server's certificate is refused"):
            await asyncio.wait_for(client_of(world, world.bundle("a", authority=other)).run(), 20)
        assert not world.log.all(LinkConnected)


async def test_a_client_that_trusts_the_server_but_is_another_authoritys_is_refused(tmp_path):
    async with net(tmp_path) as world:
        other = world.bundle("a", authority=create_authority(tmp_path / "other"))
        forged = TlsBundle(
            other.identity, (tmp_path / "ca" / "ca.pem").read_bytes(), other.cert_pem, other.key_pem, other.directory
        )
        with pytest.raises(TlsError, match="the server refuses this end's certificate"):
            await asyncio.wait_for(client_of(world, forged).run(), 20)
        assert not world.log.all(LinkConnected)


async def test_an_expired_certificate_is_refused_by_the_server(tmp_path):
    async with net(tmp_path) as world:
        out = tmp_path / "old"
        issue(tmp_path / "ca", "a", Role.CLIENT, out, days=1, not_before=dt.datetime.now(dt.UTC) - dt.timedelta(days=9))
        valid = world.bundle("a")
        files = [(out / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")]
        expired = TlsBundle(valid.identity, *files, out)
        with pytest.raises(TlsError, match="expired on"):
            await asyncio.wait_for(client_of(world, expired).run(), 20)


async def test_nobody_connects_without_a_certificate(tmp_path):
    async with net(tmp_path) as world:
        bundle = world.bundle("a")
        credentials = grpc.ssl_channel_credentials(bundle.ca_pem)
        async with grpc.aio.secure_channel(world.server.address, credentials) as channel:
            call = channel.stream_stream(wire.CONNECT)()
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(world.server.address) as channel:
            with pytest.raises(grpc.RpcError):
                await channel.stream_stream(wire.CONNECT)().read()
        assert not world.log.all(LinkConnected)


async def test_an_operator_is_no_client(tmp_path):
    async with net(tmp_path) as world:
        with pytest.raises(TlsError, match="may not connect as a client"):
            await asyncio.wait_for(client_of(world, world.bundle("boss", Role.OPERATOR)).run(), 20)
        assert world.log.all(PeerRefused)


async def test_a_client_cannot_pose_as_the_server(tmp_path):
    create_authority(tmp_path / "ca")
    client = TlsBundle.load(issue(tmp_path / "ca", "a", Role.CLIENT, tmp_path / "a"))
    with pytest.raises(TlsError, match="expected the role server"):
        LinkServer("127.0.0.1:0", client)
    # Even one that forces its way: its certificate is not for serving, and names no host.
    posing = LinkServer("127.0.0.1:0", TlsBundle.load(issue(tmp_path / "ca", "s", Role.SERVER, tmp_path / "s")), QUICK)
    posing._tls = client
    await posing.start()
    try:
        victim = LinkClient(
            posing.address, TlsBundle.load(issue(tmp_path / "ca", "b", Role.CLIENT, tmp_path / "b")), echo
        )
        with pytest.raises(TlsError, match="the server's certificate is refused"):
            await asyncio.wait_for(victim.run(), 20)
    finally:
        await posing.stop()


async def test_a_server_of_another_name_is_refused(tmp_path):
    create_authority(tmp_path / "ca")
    elsewhere = issue(tmp_path / "ca", "s", Role.SERVER, tmp_path / "s", hosts=("coordinator.example",))
    server = LinkServer("127.0.0.1:0", TlsBundle.load(elsewhere), QUICK)
    await server.start()
    try:
        client = LinkClient(
            server.address, TlsBundle.load(issue(tmp_path / "ca", "a", Role.CLIENT, tmp_path / "a")), echo
        )
        with pytest.raises(TlsError, match="IP address mismatch"):
            await asyncio.wait_for(client.run(), 20)
    finally:
        await server.stop()


async def test_the_name_is_the_certificates_whatever_the_client_says(tmp_path):
    async with net(tmp_path) as world:
        bundle = world.bundle("mallory")
        client = LinkClient(world.server.address, bundle, echo, {"client-id": "cleveland", "node_id": "1"}, QUICK)
        await client.check()
        assert [event.peer for event in world.log.all(LinkConnected)] == ["mallory"]
        assert [node.client_id for node in world.server.nodes()] == ["mallory"]


async def test_another_version_is_refused_for_good(tmp_path, monkeypatch):
    async with net(tmp_path) as world:
        real = framing.pack

        def pack(frame):
            return real(dataclasses.replace(frame, version_min=7, version_max=9) if isinstance(frame, Hello) else frame)

        monkeypatch.setattr(framing, "pack", pack)
        with pytest.raises(ProtocolError, match="versions 7 to 9"):
            await asyncio.wait_for(client_of(world, world.bundle("a")).run(), 20)


async def test_a_dry_run_against_nobody_says_so(tmp_path):
    create_authority(tmp_path / "ca")
    bundle = TlsBundle.load(issue(tmp_path / "ca", "a", Role.CLIENT, tmp_path / "a"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(LinkError, match="cannot be reached"):
        await LinkClient(f"127.0.0.1:{port}", bundle, echo, {}, QUICK).check()


async def test_a_port_in_use_is_said_to_be(tmp_path):
    async with net(tmp_path) as world:
        second = LinkServer(world.server.address, world.bundle("coordinator", Role.SERVER))
        with pytest.raises(AddressInUseError, match=f"{world.server.address} is in use"):
            await second.start()


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", ":1", "a:b", "h:70000"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(LinkError, match="expected HOST:PORT"):
        wire.split_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:80", "[::1]:443", "h.example:0"])
def test_an_address_comes_back_as_it_went(address):
    assert wire.join_address(*wire.split_address(address)) == address


async def test_an_address_of_another_machine_cannot_be_listened_on(tmp_path):
    create_authority(tmp_path / "ca")
    bundle = TlsBundle.load(issue(tmp_path / "ca", "s", Role.SERVER, tmp_path / "s"))
    with pytest.raises(LinkError, match="cannot listen"):
        await LinkServer("192.0.2.1:0", bundle).start()
