"""What both gRPC ends agree on: method names, channel options, and how a peer's certificate names it."""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fedlearn.errors import AddressInUseError, LinkError, TlsError
from fedlearn.link.tls import CERT_FILE, KEY_FILE, Identity, Role, TlsBundle

if TYPE_CHECKING:
    from fedlearn.link.limits import LinkLimits

LINK_SERVICE: Final = "fedlearn.link.v1.Link"
CONTROL_SERVICE: Final = "fedlearn.control.v1.Control"
CONNECT: Final = f"/{LINK_SERVICE}/Connect"

_NEVER_MS: Final = 2**31 - 1
_PROBE_S: Final = 5.0
_PROBES: Final = 3
_PROBE_PAUSE_S: Final = 0.2


def channel_options(limits: LinkLimits) -> list[tuple[str, Any]]:
    """gRPC options of both ends. Retries and keepalive are off: the session has its own.

    The flow-control window is fixed: left to itself it grows on a fast network until gRPC holds tens of megabytes a stream.
    """
    return [
        ("grpc.max_receive_message_length", limits.frame_bytes),
        ("grpc.max_send_message_length", limits.frame_bytes),
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", _NEVER_MS),
        ("grpc.http2.max_frame_size", 1024**2),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", limits.window_bytes),
    ]


def server_options(limits: LinkLimits) -> list[tuple[str, Any]]:
    """`channel_options` and what only a server needs; a port that is taken is an error, not shared."""
    return [*channel_options(limits), ("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 64)]


def client_options(limits: LinkLimits, address: str) -> list[tuple[str, Any]]:
    """`channel_options` and what only a client needs. Loopback is never dialled through a proxy."""
    options = [*channel_options(limits), ("grpc.use_local_subchannel_pool", 1)]
    if split_address(address)[0] in {"localhost", "127.0.0.1", "::1"}:
        options.append(("grpc.enable_http_proxy", 0))
    return options


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` to host and port.

    Raises:
        LinkError: it is neither.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise LinkError(f"address: got {address!r}, expected HOST:PORT such as 127.0.0.1:9443")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer_identity(auth_context: Mapping[str, Sequence[bytes]]) -> Identity:
    """Who the peer's certificate says it is; gRPC has verified the certificate against our authority.

    Raises:
        TlsError: the certificate names nobody, or more than one.
    """
    names = auth_context.get("x509_subject_alternative_name", ())
    return Identity.from_uris([bytes(name).decode("utf-8", "replace") for name in names])


def check_bindable(address: str) -> None:
    """Say clearly why an address cannot be listened on.

    Raises:
        AddressInUseError: the port is taken.
        LinkError: any other reason.
    """
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(
                f"{address} is in use", hint="stop the program that listens there, or choose another port (0: any)"
            ) from None
        raise LinkError(f"{address}: cannot listen: {error.strerror or error}") from None


def probe(address: str, tls: TlsBundle) -> None:
    """Shake hands with a server by the standard library, because gRPC does not tell a refusal from an outage.

    Returns when the server accepts our certificate and we accept its, or when it cannot be reached at all.

    Raises:
        TlsError: one side refuses the other's certificate, or it is not a server's.
    """
    # A server that refuses a certificate may just hang up, as one that is stopping does; only the first does it again.
    for attempt in range(_PROBES):
        if attempt:
            time.sleep(_PROBE_PAUSE_S)
        if not _hangs_up(address, tls):
            return
    TlsBundle.load(tls.directory)
    raise _refusal(address, "it hangs up once it has seen it")


def _hangs_up(address: str, tls: TlsBundle) -> bool:
    """True when the server ends a complete handshake without a word."""
    host, port = split_address(address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=tls.ca_pem.decode())
    context.load_cert_chain(tls.directory / CERT_FILE, tls.directory / KEY_FILE)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=_PROBE_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as secured,
        ):
            certificate: dict[str, Any] = secured.getpeercert() or {}
            # With TLS 1.3 the server's verdict on our certificate comes after the handshake; its settings, if it likes us.
            greeting = secured.recv(1)
    except ssl.SSLCertVerificationError as error:
        raise TlsError(
            f"{address}: the server's certificate is refused: {error.verify_message}",
            hint="it must be signed by the ca.pem of this end and name the host that is dialled",
        ) from None
    except ssl.SSLError as error:
        if error.reason is not None and ("ALERT" in error.reason or "CERTIFICATE" in error.reason):
            raise _refusal(address, error.reason.lower().replace("_", " ")) from None
        return False
    except OSError:
        return False
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    if uris and Identity.from_uris(uris).role is not Role.SERVER:
        raise TlsError(f"{address}: got a certificate for {uris[0]}, expected a server's")
    return not greeting


def _refusal(address: str, why: str) -> TlsError:
    return TlsError(
        f"{address}: the server refuses this end's certificate: {why}",
        hint="it must be signed by the server's authority and be valid now; ask for a new one",
    )
