"""Where the round machine of the release path meets secure aggregation: one attempt's server as its accumulator and its masking.

The machine takes masked payloads, journals the survivors, asks for openings and reads the sum; the order of these, what is durable when and what a
crash costs are its own. Before it begins, check-ins and shares have been exchanged: `record_of` is what has to be durable of them, with the roster, so that a
coordinator that comes back can `restore` its server and take the same payloads again.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from fedlearn.errors import LocalProtocolError, StateError, UnsupportedError
from fedlearn.proto import secagg_pb2 as pb
from fedlearn.release.keys import ReleaseKey
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.messages import FromClient, FromServer, from_bytes, to_bytes
from fedlearn.secagg.quantize import Decoded
from fedlearn.secagg.server import ServerRound, Stage


class MaskedAttempt:
    """Both hooks of one attempt; give the machine the same object for both.

    Args:
        server: collects masked vectors; fresh, or restored after a crash.

    Raises:
        LocalProtocolError: the server is at another stage.
        UnsupportedError: the plan's survivors are agreed upon before anything is opened.
    """

    def __init__(self, server: ServerRound) -> None:
        if server.stage is not Stage.MASK:
            raise LocalProtocolError(f"secure aggregation: collects {server.stage.value}, expected masked vectors")
        if server.agrees:
            raise UnsupportedError(
                "secure aggregation: the round machine asks the survivors once, and this plan's agreement is one exchange more",
                hint="take the semi-malicious profile and at most 200 clients, or drive the server without the round machine",
            )
        self._server = server
        self._taken: set[str] = set()

    def add(self, client: str, payload: bytes) -> None:
        """Add one client's masked vector to the sum.

        Raises:
            SecureAggregationError: it is no such thing, or not this client's; nothing was added.
        """
        self._server.receive(client, from_client(payload))
        self._taken.add(client)

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:
        """What each survivor must answer before the sum can be read.

        Raises:
            SecureAggregationError: too few survive.
            LocalProtocolError: other survivors than those whose vectors came.
        """
        del key, roster
        if set(survivors) != self._taken:
            raise LocalProtocolError("secure aggregation: the survivors are not those whose vectors are in the sum")
        return {name: to_bytes(message) for name, message in self._server.close().items()}

    def answer(self, client: str, answer: bytes) -> None:
        """One survivor's opening.

        Raises:
            SecureAggregationError: it cannot be used; nothing changed.
        """
        self._server.receive(client, from_client(answer))

    def ready(self) -> bool:
        """True when the openings suffice."""
        return self._server.ready()

    def unmask(self, total: MaskedAttempt) -> None:
        """Open the sum.

        Raises:
            SecureAggregationError: the openings do not open it.
        """
        assert total is self
        self._server.close()

    @property
    def clients(self) -> int:
        """How many vectors are in the sum."""
        return len(self._taken)

    @property
    def total(self) -> Decoded:
        """The open sum."""
        return self._server.total

    @property
    def surplus_keys(self) -> tuple[bytes, ...]:
        """See `ServerRound.surplus_keys`."""
        return self._server.surplus_keys


def record_of(server: ServerRound) -> bytes:
    """What of a server has to be durable before masked vectors are taken. It holds nothing secret."""
    stages = [
        pb.Setup.Stage(kept=[pb.Setup.Kept(client=name, message=to_bytes(message)) for name, message in came.items()])
        for came in server.setup
    ]
    return bytes(pb.Setup(stages=stages).SerializeToString(deterministic=True))


def restore(server: ServerRound, record: bytes) -> Mapping[str, FromServer]:
    """Bring a fresh server to where the recorded one began to take masked vectors.

    Args:
        server: made with the same terms, trust and subject.
        record: what `record_of` returned.

    Returns:
        What each client that shared has to be told, again.

    Raises:
        StateError: the record is damaged, or belongs to another attempt.
    """
    setup = pb.Setup()
    told: Mapping[str, FromServer] = {}
    try:
        setup.ParseFromString(record)
        for stage in setup.stages:
            for kept in stage.kept:
                server.receive(kept.client, from_client(kept.message))
            told = server.close()
    except (DecodeError, SecureAggregationError, LocalProtocolError) as error:
        raise StateError(f"secure aggregation: the recorded setup of {server!r} is damaged: {error}") from None
    if server.stage is not Stage.MASK:
        raise StateError(f"secure aggregation: the recorded setup of {server!r} is incomplete")
    return told


def from_client(data: bytes) -> FromClient:
    """A client's message from its bytes. Raises SecureAggregationError."""
    message = from_bytes(data)
    if not isinstance(message, FromClient):
        raise SecureAggregationError(Breach.UNEXPECTED, f"got {type(message).__name__}, which only a server says")
    return message
