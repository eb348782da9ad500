"""The server of secure aggregation: one attempt at one round, without I/O and without randomness.

    CHECK_IN -> [REVEAL ->] SHARE -> MASK -> [AGREE ->] OPEN -> OPENED        any -> VOID

In each stage `receive` takes one message from each client, in any order, and `close` ends the stage: it returns what to send to whom, or finds too few clients
left and ends the attempt. A message that breaks the protocol raises and counts as if it had not come: that client drops out, the round goes on.
What comes out follows from what went in, so a server that has kept the messages can be brought back by feeding them again.

It holds one sum: each masked vector is added when it arrives and freed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, unique
from typing import Any, Final

import numpy as np

from fedlearn.errors import LocalProtocolError, UnsupportedError
from fedlearn.release.checksum import checksum_of
from fedlearn.secagg import checks
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import PPM, members_of
from fedlearn.secagg.masks import cores
from fedlearn.secagg.messages import (
    Agreement,
    Agreements,
    Delivery,
    FromClient,
    FromServer,
    Masked,
    Opening,
    Reveal,
    Reveals,
    Roster,
    Shares,
    Survivors,
)
from fedlearn.secagg.opening import Attempted, Openings
from fedlearn.secagg.plan import CheckIn, Terms, graph_of, nonce_commitment, transcript_of
from fedlearn.secagg.primitives import KEY_BYTES, verified
from fedlearn.secagg.quantize import Decoded
from fedlearn.secagg.ring import dtype_of, unpack


@unique
class Stage(Enum):
    """What the server collects. The value is the message's name."""

    CHECK_IN = "check-ins"
    REVEAL = "nonces"
    SHARE = "shares"
    MASK = "masked vectors"
    AGREE = "agreements"
    OPEN = "openings"
    OPENED = "nothing: the sum is open"
    VOID = "nothing: the attempt is void"


COLLECTED: Final[Mapping[Stage, type]] = {
    Stage.CHECK_IN: CheckIn,
    Stage.REVEAL: Reveal,
    Stage.SHARE: Shares,
    Stage.MASK: Masked,
    Stage.AGREE: Agreement,
    Stage.OPEN: Opening,
}
"""The one kind of message that each stage takes."""


class ServerRound:
    """The server in one attempt.

    Args:
        terms: the attempt and the plan.
        trust: enrolled identity keys by client name.
        subject: digest of the model and the configuration that are sent out.
        threads: how many may unmask; None takes all cores.
    """

    def __init__(self, terms: Terms, trust: Mapping[str, bytes], subject: bytes, *, threads: int | None = None) -> None:
        self._terms, self._trust, self._subject = terms, trust, subject
        self._plan = terms.plan
        self._threads = threads or cores()
        self._stage = Stage.CHECK_IN
        self._came: dict[Stage, dict[str, Any]] = {stage: {} for stage in COLLECTED}
        self._asked: frozenset[str] = frozenset()
        self._keys: set[bytes] = set()
        self._index: dict[str, int] = {}
        self._sum = np.zeros(0, dtype=dtype_of(self._plan.encoding.ring_bits))

    @property
    def stage(self) -> Stage:
        """What is collected now."""
        return self._stage

    @property
    def waiting(self) -> frozenset[str]:
        """Whose message may still come in this stage; empty while check-ins are collected, when anybody's may."""
        return self._asked - self._came.get(self._stage, {}).keys()

    def __repr__(self) -> str:
        return f"ServerRound({self._terms.at}, collects {self._stage.value})"

    def receive(self, client: str, message: FromClient) -> bool:
        """Take one client's message. `client` is who the link says it is.

        Returns:
            True when it is new; False when it came before.

        Raises:
            SecureAggregationError: it is refused, and nothing changed.
        """
        came = self._came.get(self._stage)
        if came is None or type(message) is not COLLECTED[self._stage]:
            raise SecureAggregationError(
                Breach.UNEXPECTED,
                f"got {type(message).__name__} of {client!r}, collecting {self._stage.value}",
                culprits=(client,),
            )
        kept = _kept(message)
        if client in came:
            if came[client] == kept:
                return False
            raise SecureAggregationError(
                Breach.EQUIVOCATION,
                f"got another {type(message).__name__} of {client!r} than before",
                culprits=(client,),
            )
        if self._stage is not Stage.CHECK_IN and client not in self._asked:
            raise SecureAggregationError(
                Breach.WRONG_SET, f"{client!r} was not asked for {self._stage.value}", culprits=(client,)
            )
        try:
            self._check(client, message)
        except SecureAggregationError as error:
            error_of = SecureAggregationError(error.breach, f"{client!r}: {error.message}", culprits=(client,))
            raise error_of from None
        came[client] = kept
        return True

    def close(self) -> dict[str, FromServer]:
        """End the stage.

        Returns:
            What to send to whom; empty when the sum is open.

        Raises:
            SecureAggregationError: BELOW_THRESHOLD, UNSAFE_GRAPH or BAD_RECONSTRUCTION: the attempt is void, nothing was opened.
        """
        steps: dict[Stage, Callable[[], dict[str, FromServer]]] = {
            Stage.CHECK_IN: self._close_check_in,
            Stage.REVEAL: self._close_reveal,
            Stage.SHARE: self._close_share,
            Stage.MASK: self._close_mask,
            Stage.AGREE: self._close_agree,
            Stage.OPEN: self._close_open,
        }
        if self._stage not in steps:
            raise LocalProtocolError(f"secure aggregation: nothing to close, collecting {self._stage.value}")
        try:
            out = steps[self._stage]()
        except SecureAggregationError:
            self.void()
            raise
        self._asked = frozenset(out)
        return out

    def ready(self) -> bool:
        """True while openings are collected and those that came open the sum. While false shares are among them more are waited for."""
        enough = self._stage is Stage.OPEN and self._openings.ready()
        return enough and (not self.waiting or self._openings.fit())

    def void(self) -> None:
        """Give the attempt up; what was collected is dropped."""
        self._stage = Stage.VOID
        self._asked = frozenset()
        self._sum = self._sum[:0]
        self._came = {stage: {} for stage in COLLECTED}

    @property
    def agrees(self) -> bool:
        """True when the survivors are signed by a quorum before anything is opened."""
        return self._plan.agrees(len(self._members))

    @property
    def setup(self) -> tuple[Mapping[str, FromClient], ...]:
        """Every message of the stages before the masked vectors, stage by stage, as far as they are closed."""
        order = [Stage.CHECK_IN, *([] if self._complete() else [Stage.REVEAL]), Stage.SHARE] if self._index else []
        closed = order[: order.index(self._stage)] if self._stage in order else order
        return tuple(self._came[stage] for stage in closed)

    @property
    def agreements(self) -> Mapping[str, FromClient]:
        """Every agreement that came."""
        return self._came[Stage.AGREE]

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose vectors are in the sum."""
        return tuple(self._members[i].client for i in members_of(self._survivors))

    @property
    def culprits(self) -> tuple[str, ...]:
        """Clients that gave false shares, as far as it showed; the sum is right nevertheless."""
        return tuple(sorted(self._openings.culprits))

    @property
    def surplus_keys(self) -> tuple[bytes, ...]:
        """Keys of surplus noise that the survivors have opened, for `DistributedPlan.decode`; empty where no level is reached.

        Raises:
            LocalProtocolError: the sum is not open.
        """
        self._expect_opened()
        return self._openings.surplus_keys()

    @property
    def total(self) -> Decoded:
        """The open sum.

        Raises:
            LocalProtocolError: it is not open.
        """
        self._expect_opened()
        return self._plan.encoding.decode(self._sum)

    def _expect_opened(self) -> None:
        if self._stage is not Stage.OPENED:
            raise LocalProtocolError(f"secure aggregation: no total, collecting {self._stage.value}")

    def _complete(self) -> bool:
        return self._plan.parameters(len(self._members)).complete

    def _check(self, client: str, message: FromClient) -> None:
        match message:
            case CheckIn():
                self._check_in(client, message)
            case Reveal():
                if nonce_commitment(client, message.nonce) != self._members[self._index[client]].commitment:
                    raise SecureAggregationError(Breach.BAD_NONCE, "the nonce is not what it committed to")
            case Shares():
                checks.count(len(message.sealed), self._graph.parameters.degree, "sealed shares")
                anchor_bytes = KEY_BYTES if self._plan.surplus else 0
                checks.count(len(message.surplus_anchor), anchor_bytes, "bytes of a promise about surplus noise")
            case Masked():
                signed = self._transcript.inclusion(self._index[client], self._sharers, len(self._members))
                self._check_signature(client, message.signature, signed)
                encoding = self._plan.encoding
                self._sum += unpack(message.vector, encoding.coordinates, encoding.ring_bits)
            case Agreement():
                signed = self._transcript.agreement(self._sharers, self._survivors, len(self._members))
                self._check_signature(client, message.signature, signed)
            case Opening():
                index = self._index[client]
                every = (*message.shares, *message.surplus)
                signed = self._transcript.opening(index, self._survivors, len(self._members), every)
                self._check_signature(client, message.signature, signed)
                self._openings.add(index, message.shares, message.surplus)

    def _check_in(self, client: str, message: CheckIn) -> None:
        if message.client != client:
            raise SecureAggregationError(Breach.NOT_ENROLLED, f"checks in as {message.client!r}")
        came = self._came[Stage.CHECK_IN]
        if len(came) >= self._plan.encoding.clients:
            raise SecureAggregationError(Breach.ROSTER_SIZE, f"the roster is full with {len(came)}")
        keys = {message.mask_key, message.transport_key, checks.check_in(message, self._terms, self._trust)}
        if len(keys) < 3 or keys & self._keys:
            raise SecureAggregationError(Breach.REPEATED_KEY, "a public key stands on the roster already")
        self._keys |= keys

    def _check_signature(self, client: str, given: bytes, message: bytes) -> None:
        if not verified(self._plan.suite, self._trust[client], given, message):
            raise SecureAggregationError(Breach.BAD_SIGNATURE, "a signature does not verify")

    def _close_check_in(self) -> dict[str, FromServer]:
        came = self._came[Stage.CHECK_IN]
        checks.enough(len(came), self._plan.minimum, "clients")
        self._members = tuple(came[name] for name in sorted(came))
        self._index = {member.client: i for i, member in enumerate(self._members)}
        try:
            complete = self._complete()
        except UnsupportedError as error:
            raise SecureAggregationError(Breach.UNSAFE_GRAPH, error.message) from None
        if complete:
            self._draw_graph(())
        else:
            self._stage = Stage.REVEAL
        return dict.fromkeys(self._index, Roster(self._members))

    def _close_reveal(self) -> dict[str, FromServer]:
        came = self._came[Stage.REVEAL]
        allowed = len(self._members) * round(self._plan.dropout * PPM) // PPM
        checks.enough(len(came), len(self._members) - allowed, "nonces")
        nonces = tuple(came[m.client].nonce if m.client in came else b"" for m in self._members)
        self._draw_graph(nonces)
        return dict.fromkeys(came, Reveals(nonces))

    def _draw_graph(self, nonces: tuple[bytes, ...]) -> None:
        self._graph = graph_of(self._terms, self._members, nonces)
        identities = [self._trust[member.client] for member in self._members]
        self._transcript = transcript_of(self._terms, self._members, identities, self._graph, self._subject)
        self._stage = Stage.SHARE

    def _close_share(self) -> dict[str, FromServer]:
        came: dict[str, Shares] = self._came[Stage.SHARE]
        sharers = sum(1 << self._index[client] for client in came)
        while lonely := [i for i in members_of(sharers) if not self._enough(sharers, i)]:
            sharers &= ~sum(1 << i for i in lonely)  # whose secrets could never be opened does not take part
        checks.enough(sharers.bit_count(), self._plan.minimum, "clients that shared")
        self._sharers = sharers
        place = {i: {j: at for at, j in enumerate(self._graph.neighbours(i))} for i in members_of(sharers)}
        out: dict[str, FromServer] = {}
        for i in members_of(sharers):
            senders = [j for j in self._graph.neighbours(i) if sharers >> j & 1]
            sealed = tuple(came[self._members[j].client].sealed[place[j][i]] for j in senders)
            out[self._members[i].client] = Delivery(sharers, sealed)
        encoding = self._plan.encoding
        self._sum = np.zeros(encoding.coordinates, dtype=dtype_of(encoding.ring_bits))
        self._stage = Stage.MASK
        return out

    def _close_mask(self) -> dict[str, FromServer]:
        came: dict[str, tuple[bytes, str]] = self._came[Stage.MASK]
        survivors = sum(1 << self._index[client] for client in came)
        checks.enough(survivors.bit_count(), self._plan.minimum, "clients that sent a vector")
        for i in members_of(self._sharers):
            around = survivors & self._graph.holder_set(i)
            if around or survivors >> i & 1:  # nothing is left to open of who vanished with all its neighbours
                checks.enough(around.bit_count(), self._graph.threshold, "survivors around a client")
        self._survivors = survivors
        shared: dict[str, Shares] = self._came[Stage.SHARE]
        commitments = {self._index[c]: s.seed_commitment for c, s in shared.items()}
        anchors = {self._index[c]: s.surplus_anchor for c, s in shared.items()}
        self._openings = Openings(
            Attempted(
                self._plan.suite,
                self._members,
                self._graph,
                self._transcript,
                self._sharers,
                survivors,
                commitments,
                self._plan.level(survivors.bit_count()),
                anchors,
            )
        )
        self._stage = Stage.AGREE if self.agrees else Stage.OPEN
        out: dict[str, FromServer] = {}
        for i in members_of(survivors):
            alive = [j for j in self._graph.neighbours(i) if survivors >> j & 1]
            inclusions = tuple(came[self._members[j].client][0] for j in alive)
            out[self._members[i].client] = Survivors(survivors, inclusions)
        return out

    def _close_agree(self) -> dict[str, FromServer]:
        came: dict[str, Agreement] = self._came[Stage.AGREE]
        checks.enough(len(came), self._plan.quorum(len(self._members)), "clients that agreed")
        signers = sum(1 << self._index[client] for client in came)
        signatures = tuple(came[self._members[i].client].signature for i in members_of(signers))
        self._stage = Stage.OPEN
        return dict.fromkeys(self.survivors, Agreements(signers, signatures))

    def _close_open(self) -> dict[str, FromServer]:
        if not self._openings.ready():
            raise SecureAggregationError(Breach.BELOW_THRESHOLD, "too few clients gave their shares")
        self._openings.unmask(self._sum, threads=self._threads)
        self._stage = Stage.OPENED
        return {}

    def _enough(self, members: int, index: int) -> bool:
        return (members & self._graph.holder_set(index)).bit_count() >= self._graph.threshold


def _kept(message: FromClient) -> Any:
    """What tells a message from another one. A vector is added, not kept, so its checksum has to do."""
    return (message.signature, checksum_of(message.vector)) if isinstance(message, Masked) else message
