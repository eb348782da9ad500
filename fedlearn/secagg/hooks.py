"""Where the round machine of the release path meets secure aggregation: one attempt's server as its accumulator and its masking.

The machine takes masked payloads, journals the survivors, asks for openings and reads the sum; the order of these, what is durable when and what a
crash costs are its own. Before it begins, check-ins and shares have been exchanged: `record_of` is what has to be durable of them, with the roster, so that a
coordinator that comes back can `restore` its server and take the same payloads again.

Where survivors are agreed upon, `agree` and `agreed` come between the machine's survivors and its openings. A client opens for one set of agreements, so these
have to be durable, too, before it is asked: `agreements_of`, and `restore_agreements`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError

from fedlearn.errors import LocalProtocolError, StateError
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
    """

    def __init__(self, server: ServerRound) -> None:
        if server.stage is not Stage.MASK:
            raise LocalProtocolError(f"secure aggregation: collects {server.stage.value}, expected masked vectors")
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
        """What each survivor is told: it must answer before the sum can be read, with what opens it, or first with its agreement.

        Raises:
            SecureAggregationError: too few survive.
            LocalProtocolError: other survivors than those whose vectors came.
        """
        del key, roster
        if set(survivors) != self._taken:
            raise LocalProtocolError("secure aggregation: the survivors are not those whose vectors are in the sum")
        return {name: to_bytes(message) for name, message in self._server.close().items()}

    @property
    def agrees(self) -> bool:
        """True when survivors have to agree before they open."""
        return self._server.stage is Stage.AGREE

    def agree(self, client: str, answer: bytes) -> None:
        """One survivor's agreement.

        Raises:
            SecureAggregationError: it cannot be used; nothing changed.
        """
        self._server.receive(client, from_client(answer))

    def agreed(self) -> tuple[dict[str, bytes], bytes]:
        """Everybody who agrees has said so.

        Returns:
            What each survivor must answer now, and what has to be durable before it is asked.

        Raises:
            SecureAggregationError: they are too few.
        """
        told = self._server.close()
        return {name: to_bytes(message) for name, message in told.items()}, agreements_of(self._server)

    def agreed_before(self, record: bytes) -> dict[str, bytes]:
        """`agreed`, after a crash, from what was made durable.

        Raises:
            StateError: the record is damaged, or belongs to another attempt.
        """
        return {name: to_bytes(message) for name, message in restore_agreements(self._server, record).items()}

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
    return _recorded(server.setup)


def agreements_of(server: ServerRound) -> bytes:
    """What of a server has to be durable before anything is opened, where survivors are agreed upon. It holds nothing secret."""
    return _recorded([server.agreements])


def restore(server: ServerRound, record: bytes) -> tuple[Mapping[str, FromServer], ...]:
    """Bring a fresh server to where the recorded one began to take masked vectors.

    Args:
        server: made with the same terms, trust and subject.
        record: what `record_of` returned.

    Returns:
        What the clients were told, stage by stage: the roster, in a sparse graph the nonces, and last what each that shared has to be told again.

    Raises:
        StateError: the record is damaged, or belongs to another attempt.
    """
    told = _replayed(server, record)
    if server.stage is not Stage.MASK:
        raise StateError(f"secure aggregation: the recorded setup of {server!r} is incomplete")
    return told


def restore_agreements(server: ServerRound, record: bytes) -> Mapping[str, FromServer]:
    """Bring a server that collects agreements to where the recorded one began to take openings.

    Args:
        server: at that stage, over the same survivors.
        record: what `agreements_of` returned.

    Returns:
        What each survivor has to be told, again.

    Raises:
        StateError: the record is damaged, or belongs to another attempt.
    """
    told = _replayed(server, record)
    if server.stage is not Stage.OPEN:
        raise StateError(f"secure aggregation: the recorded agreements of {server!r} are incomplete")
    return told[-1]


def _recorded(stages: Iterable[Mapping[str, FromClient]]) -> bytes:
    kept = [
        pb.Setup.Stage(kept=[pb.Setup.Kept(client=name, message=to_bytes(message)) for name, message in came.items()])
        for came in stages
    ]
    return bytes(pb.Setup(stages=kept).SerializeToString(deterministic=True))


def _replayed(server: ServerRound, record: bytes) -> tuple[Mapping[str, FromServer], ...]:
    setup, told = pb.Setup(), []
    try:
        setup.ParseFromString(record)
        for stage in setup.stages:
            for kept in stage.kept:
                server.receive(kept.client, from_client(kept.message))
            told.append(server.close())
    except (DecodeError, SecureAggregationError, LocalProtocolError) as error:
        raise StateError(f"secure aggregation: what is recorded of {server!r} is damaged: {error}") from None
    return tuple(told)


def from_client(data: bytes) -> FromClient:
    """A client's message from its bytes. Raises SecureAggregationError."""
    message = from_bytes(data)
    if not isinstance(message, FromClient):
        raise SecureAggregationError(Breach.UNEXPECTED, f"got {type(message).__name__}, which only a server says")
    return message
