"""A client's part in secure aggregation over all attempts of one run: what an agent, a Flower client and a simulated one have in common.

It takes and gives bytes, as they travel. The attempt under way and the check-in for the next one are open at a time; a later one ends the earlier ones, and
their secrets go. Nothing is stored: who loses this object has dropped out of its attempts, which the others survive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from fedlearn.release.keys import AttemptId
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import ClientRound, Identity
from fedlearn.secagg.enrolment import Enrolment, Entry, entries_from_bytes, entries_to_bytes, identities_of
from fedlearn.secagg.messages import Agreements, Delivery, Reveals, Roster, Survivors, from_bytes, to_bytes
from fedlearn.secagg.plan import Plan, Terms
from fedlearn.secagg.primitives import Draw
from fedlearn.secagg.ring import Vector

Said = TypeVar("Said", Reveals, Delivery, Survivors, Agreements)
OPEN_ATTEMPTS: Final = 4
"""Attempts that a client holds keys for: the current one, the next one, and those that a retry overtakes."""


@dataclass
class _Open:
    round: ClientRound
    entry: bytes
    plan: Plan
    trust: dict[str, bytes] = field(repr=False)
    subject: bytes = b""


class MaskingSession:
    """One client in one run.

    Args:
        run: the run's name.
        identity: who it is.
        claim: what proves that its key is its own.
        enrolment: verifies the others' claims.
        draw: randomness for an attempt: the operating system's in earnest.
    """

    def __init__(
        self, run: str, identity: Identity, claim: bytes, enrolment: Enrolment, draw: Callable[[AttemptId], Draw]
    ) -> None:
        self._run, self._identity, self._claim = run, identity, claim
        self._enrolment, self._draw = enrolment, draw
        self._open: dict[AttemptId, _Open] = {}
        self._last: AttemptId | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MaskingSession({self._identity.name!r}, {self._run}, {len(self._open)} open)"

    def check_in(self, at: AttemptId, plan: Plan) -> bytes:
        """Fresh public keys for an attempt, as one entry; the same again for the same attempt.

        Raises:
            SecureAggregationError: REPLAY: a later attempt was taken part in. EQUIVOCATION: it was asked for under another plan.
        """
        with self._lock:
            return self._checked_in(at, plan).entry

    def reveal(
        self, at: AttemptId, plan: Plan, subject: bytes, entries: bytes, *, surplus: Draw | None = None
    ) -> bytes:
        """Where there are too many for a complete graph: verify the roster, and give the nonce that helps to order it.

        Arguments and errors as of `share`, for which everybody's nonces are then what is said.
        """
        with self._lock:
            return self._enter(at, plan, subject, entries, surplus)

    def share(self, at: AttemptId, plan: Plan, subject: bytes, said: bytes, *, surplus: Draw | None = None) -> bytes:
        """Verify the roster, and share this client's secrets of the attempt. Earlier attempts are over.

        Args:
            at: the attempt.
            plan: the study's.
            subject: digest of the model and the configuration that this client will train with.
            said: the roster's check-ins with their claims; after `reveal`, everybody's nonces.
            surplus: see `ClientRound.bind`.

        Raises:
            SecureAggregationError: by what is wrong; the attempt is over for this client.
        """
        with self._lock:
            mine = self._open.get(at)
            if mine is None or not mine.round.reveals:
                return self._enter(at, plan, subject, said, surplus)
            _check_subject(mine, at, subject)
            return _answered(mine, said, Reveals)

    def expect(self, at: AttemptId, subject: bytes, delivery: bytes) -> None:
        """Take the shares that the others sealed for this client; `mask` would, too, after the work is done.

        Args:
            at: the attempt.
            subject: what this client is about to train with; it must be what the keys were bound to, or a server could send each client another
                model to tell the updates in a sum apart (Pasquini et al. 2022).
            delivery: what the server says.

        Raises:
            SecureAggregationError: it is refused, or this client holds no keys of the attempt.
        """
        with self._lock:
            self._taken(at, subject, delivery)

    def surplus_key(self, at: AttemptId, subject: bytes, delivery: bytes) -> bytes | None:
        """The key of this client's surplus noise, to encode its update with; None where the plan takes none off.

        Args:
            at: the attempt.
            subject: what this client has trained with; see `expect`.
            delivery: what the server says.

        Raises:
            SecureAggregationError: the delivery is refused, or this client holds no keys of the attempt.
        """
        with self._lock:
            return self._taken(at, subject, delivery).round.surplus_key

    def mask(self, at: AttemptId, subject: bytes, delivery: bytes, vector: Vector, *, threads: int = 1) -> bytes:
        """The encoded update under its masks; once for each attempt.

        Args:
            at: the attempt.
            subject: what this client has trained with; see `expect`.
            delivery: what the server says.
            vector: ring elements; not the caller's any more.
            threads: how many may work.

        Raises:
            SecureAggregationError: the delivery is refused, or this client holds no keys of the attempt.
        """
        with self._lock:
            mine = self._taken(at, subject, delivery)
            return to_bytes(mine.round.mask(vector, threads=threads))

    def skip_masking(self, at: AttemptId, subject: bytes, delivery: bytes) -> None:
        """Go on to where `mask` led, in a process that is gone: the vector has left, and what is left to do is to open the sum.

        Raises:
            SecureAggregationError: the delivery is refused, or this client holds no keys of the attempt.
        """
        with self._lock:
            self._taken(at, subject, delivery).round.skip_masking()

    def agree(self, at: AttemptId, survivors: bytes) -> bytes:
        """This client's signature under these survivors, and no others ever: it is part of what opens the sum.

        Raises:
            SecureAggregationError: the survivors are refused, nothing is agreed upon in this plan, or this client holds no keys of the attempt.
        """
        with self._lock:
            mine = self._need(at)
            if not mine.round.agrees:
                raise SecureAggregationError(
                    Breach.UNEXPECTED, "asked to sign survivors that are not agreed upon in this plan"
                )
            return _answered(mine, survivors, Survivors)

    def open(self, at: AttemptId, said: bytes) -> bytes:
        """This client's shares that open the sum; its secrets of the attempt are gone then.

        Args:
            at: the attempt.
            said: whose vectors are in the sum; where that is agreed upon, a quorum's signatures under it.

        Raises:
            SecureAggregationError: what is said is refused, or this client holds no keys of the attempt.
        """
        with self._lock:
            mine = self._need(at)
            if mine.round.agrees:
                return _answered(mine, said, Agreements)
            return _answered(mine, said, Survivors)

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            self._forget_before(None)

    def _checked_in(self, at: AttemptId, plan: Plan) -> _Open:
        known = self._open.get(at)
        if known is not None:
            if known.plan != plan:
                raise SecureAggregationError(Breach.EQUIVOCATION, f"asked for {at} under another plan than before")
            return known
        trust = {self._identity.name: self._identity.key.public}
        party = ClientRound(Terms(self._run, at, plan), self._identity, trust, self._draw(at), after=self._last)
        entry = entries_to_bytes([Entry(party.check_in(), self._claim)])
        if len(self._open) >= OPEN_ATTEMPTS:
            self._open.pop(min(self._open)).round.abandon()
        self._open[at] = _Open(party, entry, plan, trust)
        return self._open[at]

    def _enter(self, at: AttemptId, plan: Plan, subject: bytes, entries: bytes, surplus: Draw | None) -> bytes:
        mine = self._checked_in(at, plan)
        self._forget_before(at)
        self._last = at
        roster = entries_from_bytes(entries)
        known = len(mine.trust) > 1
        if not known:  # the same roster again is answered as before, another one is refused by the round
            mine.trust.update(identities_of(self._enrolment, [e for e in roster if not self._is_own(e)]))
            mine.round.bind(subject, surplus=surplus)
            mine.subject = subject
        _check_subject(mine, at, subject)
        answer = mine.round.receive(Roster(tuple(entry.check_in for entry in roster)))
        assert answer is not None
        return to_bytes(answer)

    def _taken(self, at: AttemptId, subject: bytes, delivery: bytes) -> _Open:
        mine = self._need(at)
        _check_subject(mine, at, subject)
        mine.round.receive(_from_server(delivery, Delivery))
        return mine

    def _need(self, at: AttemptId) -> _Open:
        if at not in self._open:
            raise SecureAggregationError(
                Breach.UNEXPECTED,
                f"this client holds no keys of {at}",
                hint="it was restarted during the round; it takes part in the next one",
            )
        return self._open[at]

    def _is_own(self, entry: Entry) -> bool:
        return entry.check_in.client == self._identity.name

    def _forget_before(self, at: AttemptId | None) -> None:
        for other in [other for other in self._open if at is None or other < at]:
            self._open.pop(other).round.abandon()


def _check_subject(mine: _Open, at: AttemptId, subject: bytes) -> None:
    if mine.subject != subject:
        raise SecureAggregationError(
            Breach.EQUIVOCATION, f"the keys of {at} are bound to another model or configuration than this one"
        )


def _answered(mine: _Open, said: bytes, kind: type[Said]) -> bytes:
    answer = mine.round.receive(_from_server(said, kind))
    assert answer is not None
    return to_bytes(answer)


def _from_server(data: bytes, kind: type[Said]) -> Said:
    """A message of the server; each exchange takes one kind, so that none answers what another one asks."""
    message = from_bytes(data)
    if not isinstance(message, kind):
        raise SecureAggregationError(Breach.UNEXPECTED, f"got {type(message).__name__}, expected {kind.__name__}")
    return message
