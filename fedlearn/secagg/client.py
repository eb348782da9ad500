"""The client of secure aggregation: one attempt at one round, without I/O.

    NEW -> CHECKED_IN -> [REVEALED ->] SHARED -> READY -> MASKED -> [AGREED ->] OPENED        any -> FAILED

It takes the server's messages and returns the answers; keys, trust and randomness are arguments. Everything that the server
says is checked against what the client computes itself, and one wrong message ends the attempt: secrets are dropped, nothing more is answered. The
same message again gets the same answer; another one for a step that was taken is an equivocation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, unique
from typing import Final, Never

from fedlearn.errors import LocalProtocolError
from fedlearn.release.keys import AttemptId
from fedlearn.secagg import checks
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import Graph, members_of, to_bits
from fedlearn.secagg.masks import apply_masks
from fedlearn.secagg.messages import (
    NONCE_BYTES,
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
from fedlearn.secagg.plan import CheckIn, Terms, graph_of, nonce_commitment, transcript_of
from fedlearn.secagg.primitives import SECRET_BYTES, Draw, KeyPair, agreement, derive, new_key, seal, sign, unseal
from fedlearn.secagg.ring import Vector, dtype_of, pack
from fedlearn.secagg.shamir import SHARE_BYTES, check_share, split
from fedlearn.secagg.surplus import anchor_of, share_keys


@unique
class ClientState(Enum):
    """Where a client stands."""

    NEW = "new"
    CHECKED_IN = "checked-in"  # waits for the roster
    REVEALED = "revealed"  # waits for the nonces
    SHARED = "shared"  # waits for its shares of the others' secrets
    READY = "ready"  # can mask
    MASKED = "masked"  # waits for the survivors
    AGREED = "agreed"  # waits for the others' agreement
    OPENED = "opened"  # gave its shares; holds no secret any more
    FAILED = "failed"  # gave up; holds no secret any more


EXPECTED: Final[Mapping[ClientState, type]] = {
    ClientState.CHECKED_IN: Roster,
    ClientState.REVEALED: Reveals,
    ClientState.SHARED: Delivery,
    ClientState.MASKED: Survivors,
    ClientState.AGREED: Agreements,
}
"""The one message of the server that each state takes."""
SECRETS: Final = ("_mask_key", "_transport_key", "_nonce", "_seed", "_surplus", "_held", "_channels")
"""The attributes that hold a secret of this attempt; each goes as soon as it is needed no more."""


@dataclass(frozen=True)
class Identity:
    """Who a client is: its name and its enrolled signing key."""

    name: str
    key: KeyPair


class ClientRound:
    """One client in one attempt.

    Args:
        terms: the attempt and the plan, as this client holds them.
        identity: who it is.
        trust: enrolled identity keys by client name; its own among them.
        draw: a CSPRNG, `os.urandom`.
        after: the last attempt that this client took part in; terms that are not later are refused.

    Raises:
        SecureAggregationError: REPLAY.
    """

    def __init__(
        self,
        terms: Terms,
        identity: Identity,
        trust: Mapping[str, bytes],
        draw: Draw,
        *,
        after: AttemptId | None = None,
    ) -> None:
        if after is not None and terms.at <= after:
            raise SecureAggregationError(Breach.REPLAY, f"asked for {terms.at}, but took part in {after} already")
        if trust.get(identity.name) != identity.key.public:
            raise LocalProtocolError(f"secure aggregation: {identity.name!r} is not enrolled with its own key")
        self.name: Final = identity.name
        self._terms, self._identity, self._trust, self._draw = terms, identity, trust, draw
        self._suite = terms.plan.suite
        self._state = ClientState.NEW
        self._subject: bytes | None = None
        self._members: tuple[CheckIn, ...] = ()
        self._answered: dict[type, tuple[FromServer, FromClient | None]] = {}

    @property
    def state(self) -> ClientState:
        """Where it stands."""
        return self._state

    @property
    def reveals(self) -> bool:
        """True when the roster was answered with a nonce: a sparse graph's shares follow on everybody's."""
        return isinstance(self._answered.get(Roster, (None, None))[1], Reveal)

    @property
    def agrees(self) -> bool:
        """True when the survivors on this roster are signed by a quorum before anything is opened. Once the roster is there."""
        return bool(self._members) and self._terms.plan.agrees(len(self._members))

    def __repr__(self) -> str:
        return f"ClientRound({self.name!r}, {self._terms.at}, {self._state.value})"

    def __reduce__(self) -> Never:
        raise TypeError("a client's round holds secrets, which are never stored")

    def check_in(self) -> CheckIn:
        """Draw this attempt's keys. May be sent while the round before is finishing."""
        self._expect(ClientState.NEW)
        self._mask_key, self._transport_key = new_key(self._suite, self._draw), new_key(self._suite, self._draw)
        self._nonce = self._draw(NONCE_BYTES)
        commitment = nonce_commitment(self.name, self._nonce)
        unsigned = CheckIn(self.name, self._mask_key.public, self._transport_key.public, commitment, b"")
        signature = sign(self._suite, self._identity.key.secret, unsigned.signed(self._terms))
        self._own = CheckIn(self.name, unsigned.mask_key, unsigned.transport_key, commitment, signature)
        self._state = ClientState.CHECKED_IN
        return self._own

    def bind(self, subject: bytes, *, surplus: Draw | None = None) -> None:
        """Say what is trained on, before the roster is taken.

        Args:
            subject: digest of the model and the configuration, as they arrived here.
            surplus: draws the key of surplus noise in a rehearsal, where it follows from what is trained on; None: with the other keys.
        """
        if self._state not in {ClientState.NEW, ClientState.CHECKED_IN}:
            raise LocalProtocolError(f"secure aggregation: bind in state {self._state.value}")
        self._subject = subject
        self._draw_surplus = self._draw if surplus is None else surplus

    def receive(self, message: FromServer) -> FromClient | None:
        """Take a message of the server.

        Returns:
            What to answer. None after `Delivery`: call `mask` when the update is ready.

        Raises:
            SecureAggregationError: the message is refused and the attempt is over for this client.
            LocalProtocolError: nothing was bound.
        """
        if self._subject is None:
            raise LocalProtocolError("secure aggregation: bind() what is trained on first")
        before = self._answered.get(type(message))
        if before is not None and before[0] == message and self._state is not ClientState.FAILED:
            return before[1]
        try:
            self._check_turn(message)
            answer = self._take(message)
        except Exception:  # whatever it is: who has seen something wrong keeps no secrets and answers nothing more
            self.abandon()
            raise
        self._answered[type(message)] = (message, answer)
        return answer

    @property
    def surplus_key(self) -> bytes | None:
        """Where the plan takes surplus noise off: the secret key of this client's, for `DistributedPlan.encode`, until the update is masked."""
        self._expect(ClientState.READY)
        return self._surplus if self._terms.plan.surplus else None

    def mask(self, vector: Vector, *, threads: int = 1) -> Masked:
        """The update under its masks. Once only: what is sent is stored by the caller, and sent again as it is.

        Args:
            vector: ring elements from `Encoding.encode`, shape (coordinates,); masked where it is, and not the caller's any more.
            threads: how many may work.
        """
        self._expect(ClientState.READY)
        encoding = self._terms.plan.encoding
        if vector.shape != (encoding.coordinates,) or vector.dtype != dtype_of(encoding.ring_bits):
            raise LocalProtocolError(f"secure aggregation: got {vector.dtype} {vector.shape} to mask")
        me, secret_of = self._index, agreement(self._suite, self._mask_key.secret)
        plus = [derive(self._seed, self._transcript.self_mask(me))]
        minus: list[bytes] = []
        for other in members_of(self._sharers & self._neighbours):
            shared = secret_of(self._members[other].mask_key)
            (plus if other > me else minus).append(derive(shared, self._transcript.pair_mask(me, other)))
        apply_masks(vector, plus, minus, suite=self._suite, threads=threads)
        signature = self._sign(self._transcript.inclusion(me, self._sharers, len(self._members)))
        self._drop("_mask_key", "_seed", "_surplus")
        self._state = ClientState.MASKED
        return Masked(signature, pack(vector, encoding.ring_bits))

    def skip_masking(self) -> None:
        """The vector was masked and sent by this client in another process: go on to where the survivors are taken."""
        self._expect(ClientState.READY)
        self._drop("_mask_key", "_seed", "_surplus")
        self._state = ClientState.MASKED

    def abandon(self) -> None:
        """Give up: drop every secret and answer nothing more."""
        self._drop(*SECRETS)
        self._answered = {}
        self._state = ClientState.FAILED

    def _check_turn(self, message: FromServer) -> None:
        kind = type(message)
        if kind in self._answered:
            raise SecureAggregationError(Breach.EQUIVOCATION, f"got another {kind.__name__} than before")
        if EXPECTED.get(self._state) is not kind:
            raise SecureAggregationError(Breach.UNEXPECTED, f"got {kind.__name__} in state {self._state.value}")

    def _take(self, message: FromServer) -> FromClient | None:
        match message:
            case Roster():
                return self._on_roster(message)
            case Reveals():
                return self._on_reveals(message)
            case Delivery():
                self._on_delivery(message)
                return None
            case Survivors():
                return self._on_survivors(message)
            case Agreements():
                return self._on_agreements(message)

    def _on_roster(self, message: Roster) -> Shares | Reveal:
        self._identities = checks.roster(message, self._terms, self._trust, self._own)
        self._members = message.members
        self._index = self._members.index(self._own)
        if self._terms.plan.parameters(len(self._members)).complete:
            self._revealed = (1 << len(self._members)) - 1
            return self._share(graph_of(self._terms, self._members, ()))
        self._state = ClientState.REVEALED
        return Reveal(self._nonce)

    def _on_reveals(self, message: Reveals) -> Shares:
        self._revealed = checks.reveals(message, self._members, self._terms.plan)
        if not self._revealed >> self._index & 1:
            raise SecureAggregationError(Breach.SELF_MISSING, "this client's own nonce is withheld")
        return self._share(graph_of(self._terms, self._members, message.nonces))

    def _share(self, graph: Graph) -> Shares:
        assert self._subject is not None
        self._graph, me = graph, self._index
        self._transcript = transcript_of(self._terms, self._members, self._identities, graph, self._subject)
        self._neighbours, holders = to_bits(graph.neighbours(me)), graph.holders(me)
        self._seed = self._draw(SECRET_BYTES)
        seeds = dict(zip(holders, split(self._seed, graph.threshold, len(holders), self._draw), strict=True))
        keys = dict(zip(holders, split(self._mask_key.secret, graph.threshold, len(holders), self._draw), strict=True))
        levels = len(self._terms.plan.surplus)
        more, anchor = dict.fromkeys(holders, b""), b""
        if levels:
            self._surplus = self._draw_surplus(SECRET_BYTES)
            anchor = anchor_of(self._surplus, levels)
            surplus = share_keys(self._surplus, levels, graph.threshold, len(holders), self._draw)
            more = dict(zip(holders, surplus, strict=True))
        self._held = {me: (seeds[me], b"", *_pieces(more[me]))} if graph.parameters.complete else {}
        secret_of = agreement(self._suite, self._transport_key.secret)
        self._channels = {j: secret_of(self._members[j].transport_key) for j in graph.neighbours(me)}
        sealed = tuple(
            seal(
                derive(shared, self._transcript.share_key(me, j)),
                seeds[j] + keys[j] + more[j],
                self._transcript.share_data(me, j),
            )
            for j, shared in self._channels.items()
        )
        self._drop("_transport_key", "_nonce")
        self._state = ClientState.SHARED
        return Shares(self._transcript.seed_commitment(me, self._seed), sealed, anchor)

    def _on_delivery(self, message: Delivery) -> None:
        me, t, sharers = self._index, self._transcript, message.sharers
        checks.within(sharers, self._revealed, "sharers")
        checks.has(sharers, me, "sharers")
        senders = list(members_of(sharers & self._neighbours))
        checks.count(len(message.sealed), len(senders), "sealed shares")
        for j, sealed in zip(senders, message.sealed, strict=True):
            pieces = _pieces(unseal(derive(self._channels[j], t.share_key(j, me)), sealed, t.share_data(j, me)))
            checks.count(len(pieces), 2 + len(self._terms.plan.surplus), "shares in a ciphertext")
            self._held[j] = tuple(check_share(piece) for piece in pieces)
        checks.enough(
            (sharers & self._graph.holder_set(me)).bit_count(), self._graph.threshold, "sharers around this client"
        )
        checks.enough(sharers.bit_count(), self._terms.plan.minimum, "sharers")
        self._sharers = sharers
        self._drop("_channels")
        self._state = ClientState.READY

    def _on_survivors(self, message: Survivors) -> Agreement | Opening:
        checks.survivors(message, self._sharers, self._index, self._graph, self._terms.plan)
        alive = list(members_of(message.survivors & self._neighbours))
        for j, signature in zip(alive, message.inclusions, strict=True):
            signed = self._transcript.inclusion(j, self._sharers, len(self._members))
            checks.signature(self._suite, self._identities[j], signature, signed, self._members[j].client)
        self._survivors = message.survivors
        if not self.agrees:
            return self._open()
        self._state = ClientState.AGREED
        return Agreement(self._sign(self._agreed()))

    def _on_agreements(self, message: Agreements) -> Opening:
        checks.within(message.signers, self._survivors, "signers")
        checks.count(len(message.signatures), message.signers.bit_count(), "signatures")
        checks.enough(message.signers.bit_count(), self._terms.plan.quorum(len(self._members)), "signers")
        for j, signature in zip(members_of(message.signers), message.signatures, strict=True):
            checks.signature(self._suite, self._identities[j], signature, self._agreed(), self._members[j].client)
        return self._open()

    def _open(self) -> Opening:
        """One kind of share for each, and of surplus noise the reached level's; then no secret is left here.

        Where the vector is in the sum it is the seed's share, else the key's.
        """
        owners = list(members_of(self._sharers & to_bits(tuple(self._held))))
        shares = tuple(self._held[j][0 if self._survivors >> j & 1 else 1] for j in owners)
        level = self._terms.plan.level(self._survivors.bit_count())
        surplus = tuple(self._held[j][1 + level] for j in owners if level and self._survivors >> j & 1)
        signed = self._transcript.opening(self._index, self._survivors, len(self._members), (*shares, *surplus))
        opening = Opening(shares, self._sign(signed), surplus)
        self._drop("_held")
        self._state = ClientState.OPENED
        return opening

    def _agreed(self) -> bytes:
        return self._transcript.agreement(self._sharers, self._survivors, len(self._members))

    def _sign(self, message: bytes) -> bytes:
        return sign(self._suite, self._identity.key.secret, message)

    def _drop(self, *secrets: str) -> None:
        # Python cannot overwrite bytes; dropping the last reference is all that can be done.
        for name in secrets:
            self.__dict__.pop(name, None)

    def _expect(self, state: ClientState) -> None:
        if self._state is not state:
            raise LocalProtocolError(f"secure aggregation: state {self._state.value}, expected {state.value}")


def _pieces(data: bytes) -> tuple[bytes, ...]:
    """The shares of one plaintext: a seed's, a key's, and one for each level of surplus noise."""
    return tuple(data[i : i + SHARE_BYTES] for i in range(0, len(data), SHARE_BYTES))
