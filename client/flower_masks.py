"""Secure aggregation in a Flower ClientApp on stock Flower, where each message may find another process.

What an attempt needs is in `Context.state`, which a SuperNode keeps in memory: a fresh seed for the attempt's keys and the coordinator's messages so
far, from which the same state is reached again. It is named by run, round and attempt, and deleted once the sum can be opened; who finds none has
dropped out.

With `tls` in the node's config (a folder of `fedlearn certs issue`) a client signs with its certificate and takes whom its authority has certified.
Without, identities are what everybody says of himself: a rehearsal, as all on stock Flower, where the server ships the code.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from flwr.app import ConfigRecord

from fedlearn.errors import RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.strategy import ServerState
from fedlearn.learning.vectors import SUITE, Vectors, masking_plan, rounding_key, subject_of, surplus_draw
from fedlearn.release.keys import AttemptId
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import Identity
from fedlearn.secagg.enrolment import Declared, Enrolment
from fedlearn.secagg.primitives import SeededDraw, new_identity
from fedlearn.secagg.session import MaskingSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import Context, RecordDict

    from fedlearn.learning.messages import Request
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.update import Update
    from fedlearn.secagg.plan import Plan
    from fedlearn.study import Study

PREFIX: Final = "masks/"
LAST: Final = "masks"
BY_AGENT: Final = "masked-by-agent"
"""In the node's config: this app runs in the worker of an agent, which masks what the app answers."""
SEED_BYTES: Final = 32


@dataclass(frozen=True)
class _Kept:
    """One attempt between two messages.

    Args:
        seed: of its keys, from the operating system.
        subject: what the keys are bound to.
        entries: the roster, once it came.
        revealed: the roster was answered with a nonce: the graph is sparse.
        nonces: everybody's, once they came.
        delivery: what the others sealed, once it came; then the update has left under its masks.
        survivors: that were agreed to, once they were.
    """

    seed: bytes = field(repr=False)
    subject: bytes = b""
    entries: bytes = field(default=b"", repr=False)
    revealed: bool = False
    nonces: bytes = field(default=b"", repr=False)
    delivery: bytes = field(default=b"", repr=False)
    survivors: bytes = field(default=b"", repr=False)


class FlowerMasks:
    """One client's masks, for one message.

    Args:
        context: of the message.
        study: with [secure_aggregation].
        client: who this is in the study.
    """

    def __init__(self, context: Context, study: Study, client: str) -> None:
        self._state: RecordDict = context.state
        self._config: Mapping[str, Any] = context.node_config
        self._study, self._client = study, client

    def answer(self, request: Request) -> RecordDict:
        """The answer to CHECK_IN, REVEAL, SHARE, AGREE or UNMASK.

        Raises:
            SecureAggregationError: what the server says is refused, or this client holds no keys of the attempt.
        """
        at, plan = _at(request), masking_plan(self._study, request.length)
        if request.exchange is Exchange.CHECK_IN:
            return messages.encode_said(b"", self._check_in(request.run, at, plan))
        if request.exchange in {Exchange.REVEAL, Exchange.SHARE}:
            return messages.encode_said(self._share(request, at, plan))
        if request.exchange is Exchange.AGREE:
            return messages.encode_said(self._agree(request, at, plan))
        kept = self._need(request.run, at)
        opening = self._again(request.run, at, plan, kept).open(at, request.body)
        del self._state[_place(request.run, at)]
        return messages.encode_said(opening)

    def masked(self, request: Request, strategy: Strategy, update: Update) -> RecordDict:
        """An update under its masks, and the keys for the next round; once for each attempt.

        Raises:
            SecureAggregationError: this client holds no keys of the attempt, or used them.
            UpdateError: the update is not what the strategy releases.
        """
        from fedlearn.arrays import specs_of

        vectors = Vectors.of(self._study, strategy, specs_of(request.model))
        if vectors.length != request.length:
            raise RemoteProtocolError(
                f"message: keys were agreed for {request.length} numbers, an update of this model has {vectors.length}"
            )
        at = _at(request)
        kept = self._need(request.run, at)
        if kept.delivery:
            raise SecureAggregationError(Breach.REPLAY, f"the update of {at} has left already")
        subject = subject_of(self._study, broadcast_digest(ServerState(request.model, request.shared)))
        key = rounding_key(self._study, request.round, self._client)
        session, frame = self._again(request.run, at, vectors.plan, kept), vectors.frame(request.round, request.shared)
        vector = vectors.encode(update, key, frame, session.surplus_key(at, subject, request.body))
        body = session.mask(at, subject, request.body, vector)
        self._keep(request.run, at, replace(kept, delivery=request.body))
        entry = b""
        if request.round < self._study.rounds:
            entry = self._check_in(request.run, AttemptId(request.round + 1, 1), vectors.plan)
        return messages.encode_said(body, entry)

    def _check_in(self, run: str, at: AttemptId, plan: Plan) -> bytes:
        kept = self._find(run, at)
        if kept is None:
            last = self._last(run)
            if last is not None and at <= last:
                raise SecureAggregationError(Breach.REPLAY, f"asked for {at}, but took part in {last} already")
            kept = _Kept(os.urandom(SEED_BYTES))
            self._keep(run, at, kept)
        return self._fresh(run, kept).check_in(at, plan)

    def _share(self, request: Request, at: AttemptId, plan: Plan) -> bytes:
        kept, reveal = self._need(request.run, at), request.exchange is Exchange.REVEAL
        subject = subject_of(self._study, request.model_digest)
        known = kept.nonces if kept.revealed and not reveal else kept.entries
        if (known and known != request.body) or (kept.entries and kept.subject != subject):
            raise SecureAggregationError(
                Breach.EQUIVOCATION, "got another roster, other nonces or another model than before"
            )
        if kept.revealed and not reveal:
            kept = replace(kept, nonces=request.body)
        else:
            kept = replace(kept, subject=subject, entries=request.body, revealed=reveal)
        shares = self._shared(self._fresh(request.run, kept), at, plan, kept, again=reveal)
        for name in [name for name in self._state if name.startswith(PREFIX)]:
            if name < _place(request.run, at) or not name.startswith(_place(request.run)):
                del self._state[name]  # what is over, of this run and of others
        self._keep(request.run, at, kept)
        self._state[LAST] = ConfigRecord({"run": request.run, "round": at.round, "attempt": at.attempt})
        return shares

    def _agree(self, request: Request, at: AttemptId, plan: Plan) -> bytes:
        kept = self._need(request.run, at)
        if kept.survivors and kept.survivors != request.body:
            raise SecureAggregationError(Breach.EQUIVOCATION, "got other survivors than before")
        signed = self._again(request.run, at, plan, kept).agree(at, request.body)
        self._keep(request.run, at, replace(kept, survivors=request.body))
        return signed

    def _again(self, run: str, at: AttemptId, plan: Plan, kept: _Kept) -> MaskingSession:
        """The session as the last message left it."""
        if not kept.entries:
            raise SecureAggregationError(Breach.UNEXPECTED, f"no roster of {at} came here")
        session = self._fresh(run, kept)
        self._shared(session, at, plan, kept)
        if kept.delivery:
            session.skip_masking(at, kept.subject, kept.delivery)
        if kept.survivors:
            session.agree(at, kept.survivors)
        return session

    def _shared(self, session: MaskingSession, at: AttemptId, plan: Plan, kept: _Kept, *, again: bool = False) -> bytes:
        """What answers the roster; or, where it was answered with a nonce, what answers the nonces."""
        surplus = surplus_draw(self._study, at.round, self._client)
        said = session.share(at, plan, kept.subject, kept.entries, surplus=surplus)
        return session.share(at, plan, kept.subject, kept.nonces) if kept.nonces and not again else said

    def _fresh(self, run: str, kept: _Kept) -> MaskingSession:
        enrolment: Enrolment
        if folder := str(self._config.get("tls", "")):
            from fedlearn.link.enrolment import CertificateEnrolment, identity_of
            from fedlearn.link.tls import TlsBundle

            bundle = TlsBundle.load(folder)
            identity, claim = identity_of(bundle)
            enrolment = CertificateEnrolment(bundle.ca_pem)
        else:
            identity = Identity(self._client, new_identity(SUITE, SeededDraw(b"identity" + kept.seed)))
            claim, enrolment = identity.key.public, Declared()
        return MaskingSession(run, identity, claim, enrolment, lambda _at: SeededDraw(b"keys" + kept.seed))

    def _find(self, run: str, at: AttemptId) -> _Kept | None:
        record = self._state.get(_place(run, at))
        return _Kept(**record) if isinstance(record, ConfigRecord) else None  # type: ignore[arg-type]  # as `_keep` wrote it

    def _need(self, run: str, at: AttemptId) -> _Kept:
        kept = self._find(run, at)
        if kept is None:
            raise SecureAggregationError(
                Breach.UNEXPECTED,
                f"this client holds no keys of {at}",
                hint="its state was lost during the round; it takes part in the next one",
            )
        return kept

    def _keep(self, run: str, at: AttemptId, kept: _Kept) -> None:
        self._state[_place(run, at)] = ConfigRecord(asdict(kept))

    def _last(self, run: str) -> AttemptId | None:
        record = self._state.get(LAST)
        if not isinstance(record, ConfigRecord) or record["run"] != run:
            return None
        return AttemptId(int(str(record["round"])), int(str(record["attempt"])))


def _at(request: Request) -> AttemptId:
    return AttemptId(request.round, request.attempt)


def _place(run: str, at: AttemptId | None = None) -> str:
    return f"{PREFIX}{run}/" + ("" if at is None else f"{at.round:010d}/{at.attempt:010d}")
