"""Secure aggregation in a simulation: every key and mask in this process, or the same integers without them.

Both give the same bits, since the open sum of a masked round *is* the sum of the survivors' integers. In the exact way a client's randomness follows from
the study's seed, so a simulation that is resumed in the middle of a round makes the same keys again; nothing here is secret anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn.arrays import specs_of
from fedlearn.errors import FedlearnError, UnsupportedError
from fedlearn.learning.backend import Backend, Exchange, Failed, Fitted, Said, Scored, Summed, Work, raised
from fedlearn.learning.masked import MaskedRounds
from fedlearn.learning.secure_sum import SecureRounds, SecureSum
from fedlearn.learning.vectors import SUITE, Vectors, rounding_key, subject_of, surplus_draw
from fedlearn.release.keys import AttemptId, ReleaseKey
from fedlearn.secagg import checks
from fedlearn.secagg.client import Identity
from fedlearn.secagg.enrolment import Declared
from fedlearn.secagg.plan import digest_of
from fedlearn.secagg.primitives import SECRET_BYTES, SeededDraw, new_identity
from fedlearn.secagg.ring import dtype_of, pack, unpack
from fedlearn.secagg.session import MaskingSession
from fedlearn.secagg.surplus import level_keys

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.strategy import Strategy
    from fedlearn.release.coordinator import RoundMachine
    from fedlearn.release.journal import Journal
    from fedlearn.secagg.quantize import Decoded
    from fedlearn.secagg.ring import Vector
    from fedlearn.study import Study

EXACT_CLIENTS: Final = 20
"""`mode = "auto"` makes every mask in rounds of up to so many clients."""


def secure_rounds(
    study: Study, strategy: Strategy, initial: Arrays, backend: Backend, journal: Journal, population: int
) -> SecureRounds | None:
    """How a simulated study's rounds are masked; None where it does not ask for it.

    Args:
        study: what to run.
        strategy: says what is released.
        initial: the model, for its shapes.
        backend: trains the clients.
        journal: of the run.
        population: clients of the study.

    Raises:
        StudyError, UnsupportedError: as `Vectors.of`; or the mode cannot be had.
    """
    table = study.secure_aggregation
    if not table.enabled:
        return None
    vectors = Vectors.of(study, strategy, specs_of(initial))
    cohort = min(study.cohort.size or population, population)
    if cohort > vectors.plan.encoding.clients:
        raise UnsupportedError(
            f"secure aggregation: rounds of {cohort} clients, the plan has room for {vectors.plan.encoding.clients}",
            hint=f"set secure_aggregation.max_clients = {cohort}, or cohort.size",
        )
    if cohort < vectors.plan.minimum:
        raise UnsupportedError(
            f"secure aggregation: rounds of {cohort} clients, and sums of fewer than {vectors.plan.minimum} are not opened",
            hint="set secure_aggregation.max_clients to how many there are, lower privacy.survivors, or raise cohort.size",
        )
    if table.mode == "equivalent" or (table.mode == "auto" and cohort > EXACT_CLIENTS):
        return EquivalentRounds(vectors, backend)
    clients = MaskedClients(study, vectors, backend)
    return MaskedRounds(study, study.name, strategy, initial, clients, journal, Declared())


def encoded(vectors: Vectors, work: Work, fitted: Fitted) -> Vector:
    """A simulated client's vector."""
    key = rounding_key(vectors.study, work.round, fitted.client, rehearsal=True)
    frame = vectors.frame(work.round, work.shared)
    return vectors.encode(fitted.update, key, frame, _surplus_key(vectors, work.round, fitted.client))


def _surplus_key(vectors: Vectors, round_: int, client: str) -> bytes | None:
    """A simulated client's key of surplus noise; None where none is taken off."""
    draw = surplus_draw(vectors.study, round_, client, rehearsal=True) if vectors.plan.surplus else None
    return None if draw is None else draw(SECRET_BYTES)


class MaskedClients:
    """A `MaskedBackend` over simulated clients.

    Args:
        study: with [secure_aggregation].
        vectors: of the study.
        inner: trains them.
    """

    def __init__(self, study: Study, vectors: Vectors, inner: Backend) -> None:
        self._study, self._vectors, self._inner = study, vectors, inner
        self._sessions: dict[str, MaskingSession] = {}

    def secure(
        self, exchange: Exchange, work: Work, bodies: Mapping[str, bytes], length: int
    ) -> Iterator[Said | Failed]:
        assert length == self._vectors.length
        if exchange is Exchange.TRAIN:
            yield from self._masked(work, bodies)
            return
        at, plan = AttemptId(work.round, work.attempt), self._vectors.plan
        for client in work.cohort:
            session = self._session(client)
            try:
                if exchange is Exchange.CHECK_IN:
                    yield Said(client, b"", session.check_in(at, plan))
                elif exchange in {Exchange.REVEAL, Exchange.SHARE}:
                    said = session.reveal if exchange is Exchange.REVEAL else session.share
                    subject = subject_of(self._study, work.model_digest)
                    surplus = surplus_draw(self._study, work.round, client, rehearsal=True)
                    yield Said(client, said(at, plan, subject, bodies[client], surplus=surplus))
                elif exchange is Exchange.AGREE:
                    yield Said(client, session.agree(at, bodies[client]))
                else:
                    yield Said(client, session.open(at, bodies[client]))
            except FedlearnError as error:
                yield Failed(client, error.message)

    def _masked(self, work: Work, bodies: Mapping[str, bytes]) -> Iterator[Said | Failed]:
        at, next_at = AttemptId(work.round, work.attempt), AttemptId(work.round + 1, 1)
        subject = subject_of(self._study, work.model_digest)
        for reply in own_updates(self._inner.fit(work)):
            if isinstance(reply, Failed):
                yield reply
                continue
            session = self._session(reply.client)
            try:
                body = session.mask(at, subject, bodies[reply.client], encoded(self._vectors, work, reply))
                yield Said(reply.client, body, session.check_in(next_at, self._vectors.plan))
            except FedlearnError as error:
                yield raised(reply.client, error)

    def _session(self, client: str) -> MaskingSession:
        if client not in self._sessions:
            key = new_identity(SUITE, self._draw(client))
            self._sessions[client] = MaskingSession(
                self._study.name,
                Identity(client, key),
                key.public,
                Declared(),
                lambda at: self._draw(client, at.round, at.attempt),
            )
        return self._sessions[client]

    def _draw(self, *place: str | int) -> SeededDraw:
        return SeededDraw(digest_of("rehearsal", self._study.seed, *place))


class EquivalentRounds(SecureRounds):
    """Rounds whose vectors are added as they are: what a masked round's open sum is, for any number of clients.

    A round is void where the protocol would open nothing: below the threshold, which counts all that were asked as sharers.
    """

    def __init__(self, vectors: Vectors, backend: Backend) -> None:
        super().__init__(vectors)
        self._backend = backend

    def new_sum(self) -> SecureSum:
        return PlainSum(self.vectors)

    def train(self, machine: RoundMachine[bytes, SecureSum], work: Work) -> Iterator[Said | Failed]:  # noqa: ARG002  # nothing is exchanged before
        bits = self.vectors.plan.encoding.ring_bits
        for reply in own_updates(self._backend.fit(work)):
            if isinstance(reply, Failed):
                yield reply
                continue
            try:
                yield Said(reply.client, pack(encoded(self.vectors, work, reply), bits))
            except FedlearnError as error:
                yield raised(reply.client, error)


class PlainSum:
    """The sum of encoded updates without masks.

    Args:
        vectors: of the study.
    """

    def __init__(self, vectors: Vectors) -> None:
        self._vectors, self._plan = vectors, vectors.plan
        self._surplus_keys: list[bytes] = []
        encoding = self._plan.encoding
        self._sum = np.zeros(encoding.coordinates, dtype=dtype_of(encoding.ring_bits))
        self._clients = 0

    def add(self, client: str, payload: bytes) -> None:  # noqa: ARG002  # the machine knows whose it is
        encoding = self._plan.encoding
        self._sum += unpack(payload, encoding.coordinates, encoding.ring_bits)
        self._clients += 1

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:
        """Nothing to ask.

        Raises:
            SecureAggregationError: BELOW_THRESHOLD: a masked round would not be opened.
        """
        checks.enough(len(survivors), self._plan.minimum, "clients that sent a vector")
        found = self._plan.parameters(len(roster))
        # In a sparse graph each client's neighbours count; in expectation as many of them are left as of all.
        around = len(survivors) if found.complete else found.degree * len(survivors) // len(roster)
        checks.enough(around, found.threshold, "survivors around a client")
        if self._plan.agrees(len(roster)):
            checks.enough(len(survivors), self._plan.quorum(len(roster)), "clients that agreed")
        if level := self._plan.level(len(survivors)):
            tops = [_surplus_key(self._vectors, key.round, client) for client in survivors]
            self._surplus_keys = [
                level_keys(top, len(self._plan.surplus))[level - 1] for top in tops if top is not None
            ]
        return {}

    def answer(self, client: str, answer: bytes) -> None:
        """Never called: nobody is asked."""

    def ready(self) -> bool:
        return True

    def unmask(self, total: SecureSum) -> None:
        """Nothing to take off."""

    @property
    def clients(self) -> int:
        return self._clients

    @property
    def decoded(self) -> Decoded:
        return self._plan.encoding.decode(self._sum)

    @property
    def surplus_keys(self) -> Sequence[bytes]:
        return self._surplus_keys


def own_updates(replies: Iterator[Fitted | Summed | Scored | Failed]) -> Iterator[Fitted | Failed]:
    """Replies of a backend that was told to keep every client's update by itself."""
    for reply in replies:
        assert isinstance(reply, Fitted | Failed), "updates were summed before they were masked"
        yield reply
