"""Secure aggregation at a site: its keys and masks live in the agent's process, and the worker never sees them.

Keys are drawn from the operating system for each attempt, are in memory alone, and are signed with the key of the site's certificate. Other
sites are whom this site's own authority has certified; the coordinator's word counts for nothing.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from fedlearn.arrays import specs_of
from fedlearn.errors import RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange
from fedlearn.learning.vectors import Vectors, masking_plan, rounding_key, subject_of, surplus_draw
from fedlearn.release.keys import NUMBER_LIMIT, AttemptId
from fedlearn.secagg.breach import SecureAggregationError
from fedlearn.secagg.session import MaskingSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.app import RecordDict

    from fedlearn.learning.messages import Request
    from fedlearn.learning.strategy import Strategy
    from fedlearn.secagg.client import Identity
    from fedlearn.secagg.enrolment import Enrolment
    from fedlearn.study import Study

RUNS: Final = 16
"""Runs whose keys are held; the one that was asked about longest ago goes first."""


class Masking:
    """A site's keys for secure aggregation, over all runs. Calls may overlap.

    Args:
        identity: who this site is.
        claim: what proves it to the others.
        enrolment: verifies who the others are.
        strategy_of: gives a study's strategy, which says what an update holds.
        threads: how many may mask.
    """

    def __init__(
        self,
        identity: Identity,
        claim: bytes,
        enrolment: Enrolment,
        strategy_of: Callable[[Study], Strategy],
        *,
        threads: int = 1,
    ) -> None:
        self.client: Final = identity.name
        self.strategy_of: Final = strategy_of
        self.threads: Final = threads
        self._identity, self._claim, self._enrolment = identity, claim, enrolment
        self._sessions: OrderedDict[str, MaskingSession] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, study: Study) -> Masks:
        """For one study's messages."""
        return Masks(self, study)

    def session(self, run: str) -> MaskingSession:
        """This site's part in a run."""
        with self._lock:
            if run not in self._sessions:
                self._sessions[run] = MaskingSession(
                    run, self._identity, self._claim, self._enrolment, lambda _at: os.urandom
                )
                while len(self._sessions) > RUNS:
                    self._sessions.popitem(last=False)[1].close()
            self._sessions.move_to_end(run)
            return self._sessions[run]


class Masks:
    """What a site does with the messages of one masked study.

    Args:
        masking: the site's keys.
        study: with [secure_aggregation].
    """

    def __init__(self, masking: Masking, study: Study) -> None:
        self._masking, self.study = masking, study

    def answer(self, request: Request) -> RecordDict:
        """The answer to CHECK_IN, REVEAL or SHARE: public keys, a nonce, or sealed shares. Nothing of the data is in any.

        Raises:
            SecureAggregationError: what the server says is refused.
        """
        session, at = self._session(request)
        plan = masking_plan(self.study, request.length)
        if request.exchange is Exchange.CHECK_IN:
            return messages.encode_said(b"", session.check_in(at, plan))
        surplus = surplus_draw(self.study, request.round, self._masking.client)
        said = session.reveal if request.exchange is Exchange.REVEAL else session.share
        return messages.encode_said(said(at, plan, self._subject(request), request.body, surplus=surplus))

    def expect(self, request: Request) -> None:
        """Take what the others sealed for this site, before it trains.

        Raises:
            SecureAggregationError: it is refused, or this site holds no keys of the attempt.
        """
        session, at = self._session(request)
        session.expect(at, self._subject(request), request.body)

    def masked(self, request: Request, reply: RecordDict) -> RecordDict:
        """The update of a worker's reply under its masks.

        Args:
            request: with the broadcast's arrays.
            reply: the worker's; it stays here.

        Raises:
            SecureAggregationError: this site holds no keys of the attempt.
            UpdateError: the update is not what the study's strategy releases.
        """
        study = self.study
        vectors = Vectors.of(study, self._masking.strategy_of(study), specs_of(request.model))
        if vectors.length != request.length:
            raise RemoteProtocolError(
                f"message: keys were agreed for {request.length} numbers, an update of this model has {vectors.length}"
            )
        key = rounding_key(study, request.round, self._masking.client)
        (session, at), subject = self._session(request), self._subject(request)
        frame, surplus_key = (
            vectors.frame(request.round, request.shared),
            session.surplus_key(at, subject, request.body),
        )
        vector = vectors.encode(messages.decode_update(reply), key, frame, surplus_key)
        body = session.mask(at, subject, request.body, vector, threads=self._masking.threads)
        return messages.encode_said(body)

    def next_check_in(self, request: Request) -> bytes:
        """Keys for the first attempt at the next round; empty where there is none to come."""
        if request.round >= self.study.rounds:
            return b""
        session, _ = self._session(request)
        try:
            return session.check_in(AttemptId(request.round + 1, 1), masking_plan(self.study, request.length))
        except SecureAggregationError:  # a later attempt was asked for meanwhile
            return b""

    def agreement(self, request: Request) -> bytes:
        """This site's signature under the survivors that the server names; one set of them, ever.

        Raises:
            SecureAggregationError: they are refused, or this site holds no keys of the attempt.
        """
        session, at = self._session(request)
        return session.agree(at, request.body)

    def opening(self, request: Request) -> bytes:
        """What opens the sum over the survivors that the server names, or that a quorum has signed; one set of them, ever.

        Raises:
            SecureAggregationError: they are refused, or this site holds no keys of the attempt.
        """
        session, at = self._session(request)
        return session.open(at, request.body)

    def _subject(self, request: Request) -> bytes:
        """What the request says is trained with; of a TRAIN's arrays the site has checked that they are what it says."""
        return subject_of(self.study, request.model_digest)

    def _session(self, request: Request) -> tuple[MaskingSession, AttemptId]:
        if request.round < 1 or not 1 <= request.attempt <= NUMBER_LIMIT:
            raise RemoteProtocolError(f"message: round {request.round} attempt {request.attempt}, expected 1 and more")
        return self._masking.session(request.run), AttemptId(request.round, request.attempt)
