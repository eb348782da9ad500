"""Rounds whose updates come masked: the exchanges around training, and the sum that is opened in the end.

    [CHECK_IN] -> [REVEAL ->] SHARE -> TRAIN -> [AGREE ->] UNMASK

On our link SHARE brings the model down and training begins with it: shares, and their way through the coordinator, cost a round no time of their own. TRAIN then brings what
the others sealed, and asks for the update. On stock Flower, where a client does one thing at a time, the model comes with TRAIN.

Check-ins for a round ride on the masked vectors of the one before; who has sent none is asked. The setup (roster and shares) is durable
before the first masked vector is taken, so a coordinator that comes back goes on with the same keys; killed earlier, it asks again. Survivors are durable
before anybody is asked about them, and what they agreed upon before anybody is asked to open: a client answers either once.

REVEAL is for sparse graphs, above 200 clients; AGREE for these and for the malicious profile.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fedlearn.arrays import specs_of
from fedlearn.errors import RemoteProtocolError
from fedlearn.learning.backend import Exchange, Failed, MaskedBackend, Said, Work
from fedlearn.learning.secure_sum import SAMPLE, MaskedSum, SecureRounds, SecureSum, Seen
from fedlearn.learning.vectors import Vectors, subject_of
from fedlearn.release.keys import AttemptId, record_key
from fedlearn.release.round import Rejected, RoundState
from fedlearn.secagg.enrolment import Enrolment, Entry, entries_from_bytes, entries_to_bytes, identities_of
from fedlearn.secagg.hooks import from_client, record_of, restore
from fedlearn.secagg.messages import FromServer, Masked, to_bytes
from fedlearn.secagg.plan import Terms
from fedlearn.secagg.ring import packed_bytes, unpack
from fedlearn.secagg.server import ServerRound, Stage

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.strategy import Strategy
    from fedlearn.release.coordinator import RoundMachine
    from fedlearn.release.journal import Journal
    from fedlearn.study import Study

KEYS_S: Final = 60.0
"""How long an exchange of keys or shares waits: they are answered at once, by whoever is there."""
SLOW_BYTES_PER_S: Final = 1e6
"""The slowest line that a model on its way down with SHARE is waited for."""


class MaskedRounds(SecureRounds):
    """All attempts of one run.

    Args:
        study: with [secure_aggregation].
        run: the run's name.
        strategy: says what is released.
        initial: the model, for its shapes.
        backend: speaks with the clients.
        journal: of the run.
        enrolment: verifies who the clients are.
        threads: how many unmask; None takes all cores.

    Raises:
        StudyError, UnsupportedError: as `Vectors.of`.
    """

    def __init__(
        self,
        study: Study,
        run: str,
        strategy: Strategy,
        initial: Arrays,
        backend: MaskedBackend,
        journal: Journal,
        enrolment: Enrolment,
        *,
        threads: int | None = None,
    ) -> None:
        super().__init__(Vectors.of(study, strategy, specs_of(initial)))
        self._study, self._run, self._backend, self._journal = study, run, backend, journal
        self._enrolment, self._threads = enrolment, threads
        self._places = {part: record_key("masking", run, part) for part in ("at", "entries", "setup", "agreed")}
        self._early: dict[str, bytes] = {}
        self._early_for: AttemptId | None = None
        self._sum = MaskedSum()

    def new_sum(self) -> MaskedSum:
        self._sum = MaskedSum()
        return self._sum

    def train(self, machine: RoundMachine[bytes, SecureSum], work: Work) -> Iterator[Said | Failed]:
        at = AttemptId(work.round, work.attempt)
        try:
            told = self._again(at, work)
            if told is None:
                told = yield from self._set_up(at, work)
        except RemoteProtocolError as error:
            machine.void(error.message)
            return
        here = tuple(client for client in work.cohort if client in told)
        self._early, self._early_for = {}, AttemptId(work.round + 1, 1)
        self.seen = None
        for reply in self._say(Exchange.TRAIN, replace(work, cohort=here), told):
            if isinstance(reply, Said) and reply.entry:
                self._early[reply.client] = reply.entry
            if isinstance(reply, Said) and self.seen is None:
                self.seen = self._sample(reply)
            yield reply

    def open(self, machine: RoundMachine[bytes, SecureSum], work: Work) -> None:
        if not _is_unmasking(machine):
            return
        key, requests = machine.unmask_requests()
        if self._sum.agrees:
            requests = self._agreed(machine, work, requests)
            if not requests:
                return
        reason = ""
        for reply in self._say(Exchange.UNMASK, replace(work, cohort=tuple(sorted(requests))), requests):
            if isinstance(reply, Failed):
                reason = f"client {reply.client!r}: {reply.reason}"
                self._early.pop(reply.client, None)  # it may have been restarted, and asking again costs little
                machine.gone(reply.client)
            elif isinstance(answer := machine.unmasked(reply.client, key, reply.body), Rejected):
                reason = answer.message
                machine.gone(reply.client)
            if not _is_unmasking(machine):
                return
        machine.void(f"too few survivors opened the sum; the last of the others: {reason}")

    def _again(self, at: AttemptId, work: Work) -> dict[str, bytes] | None:
        """Where the coordinator was killed after the setup of this attempt: what each client has to be told; else None."""
        data = {part: self._journal.get(place) for part, place in self._places.items()}
        if data["at"] is None or AttemptId.from_pair(json.loads(data["at"]), what=self._places["at"]) != at:
            return None
        assert data["entries"] is not None
        assert data["setup"] is not None
        entries = entries_from_bytes(data["entries"])
        server = self._server(at, work, identities_of(self._enrolment, entries))
        rosters, *nonces, told = map(_as_bytes, restore(server, data["setup"]))
        self._sum.attach(server)
        # Who holds its keys answers as before; whose keys follow from the seed, in a simulation, makes them anew. Who lost them has
        # dropped out, but for what it committed.
        exchanges = [*([Exchange.REVEAL] if nonces else []), Exchange.SHARE]
        for exchange, said in zip(exchanges, [dict.fromkeys(rosters, data["entries"]), *nonces], strict=True):
            for _ in self._say(exchange, replace(work, cohort=tuple(sorted(said))), said):
                pass
        return told

    def _set_up(self, at: AttemptId, work: Work) -> Generator[Failed, None, dict[str, bytes]]:
        """Exchange keys and shares, and make them durable; gives those who dropped out.

        Returns:
            What each client that shared has to be told.

        Raises:
            RemoteProtocolError: too few are left.
        """
        trust: dict[str, bytes] = {}
        server = self._server(at, work, trust)
        entries: dict[str, Entry] = {}

        def enter(client: str, data: bytes) -> str:
            """Why a check-in cannot be used; empty when it is on the roster."""
            try:
                (entry,) = entries_from_bytes(data)
                trust[client] = self._enrolment.identity(client, entry.claim)
                server.receive(client, entry.check_in)
            except (RemoteProtocolError, ValueError) as error:
                return getattr(error, "message", "it sent more than its own check-in")
            entries[client] = entry
            return ""

        early = self._early if self._early_for == at else {}
        asked = tuple(client for client in work.cohort if client not in early or enter(client, early[client]))
        for reply in self._say(Exchange.CHECK_IN, replace(work, cohort=asked), dict.fromkeys(asked, b"")):
            if isinstance(reply, Failed):
                yield reply
            elif reason := enter(reply.client, reply.entry):
                yield Failed(reply.client, reason)
        everybody = tuple(server.close())
        roster = entries_to_bytes(entries[client] for client in sorted(everybody))
        told = dict.fromkeys(everybody, roster)
        if server.stage is Stage.REVEAL:
            told = yield from self._collected(server, Exchange.REVEAL, work, told)
        told = yield from self._collected(server, Exchange.SHARE, work, told)
        setup = {"at": json.dumps(list(at)).encode(), "entries": roster, "setup": record_of(server), "agreed": None}
        self._journal.write({self._places[part]: data for part, data in setup.items()})
        self._sum.attach(server)
        return told

    def _collected(
        self, server: ServerRound, exchange: Exchange, work: Work, told: Mapping[str, bytes]
    ) -> Generator[Failed, None, dict[str, bytes]]:
        """One exchange of the setup; gives those who dropped out in it, returns what the others have to be told next."""
        lost: set[str] = set()
        for reply in self._say(exchange, replace(work, cohort=tuple(sorted(told))), told):
            failed = _received(server, reply)
            if failed is not None:
                lost.add(reply.client)
                yield failed
        found = _as_bytes(server.close())
        for client in sorted(told.keys() - lost - found.keys()):
            yield Failed(client, "too few of its neighbours shared keys")
        return found

    def _agreed(
        self, machine: RoundMachine[bytes, SecureSum], work: Work, survivors: dict[str, bytes]
    ) -> dict[str, bytes]:
        """Let the survivors sign that they are; what they have to be told then is durable when it is returned. Empty: too few did, the attempt is void."""
        kept, reason = self._journal.get(self._places["agreed"]), ""
        for reply in self._say(Exchange.AGREE, replace(work, cohort=tuple(sorted(survivors))), survivors):
            if isinstance(reply, Failed):
                reason = f"client {reply.client!r}: {reply.reason}"
                self._early.pop(reply.client, None)  # see `open`
            elif kept is None:
                try:
                    self._sum.agree(reply.client, reply.body)
                except RemoteProtocolError as error:  # it counts as if it had not come
                    reason = error.message
        if kept is not None:
            # The answers stand. All were asked again for the sake of a simulation's clients, whose keys were lost with the process.
            return self._sum.agreed_before(kept)
        try:
            told, record = self._sum.agreed()
        except RemoteProtocolError as error:
            machine.void(f"the survivors did not agree: {error.message}; the last of the others: {reason}")
            return {}
        self._journal.write({self._places["agreed"]: record})
        return told

    def _server(self, at: AttemptId, work: Work, trust: Mapping[str, bytes]) -> ServerRound:
        terms = Terms(self._run, at, self.vectors.plan)
        return ServerRound(terms, trust, subject_of(self._study, work.model_digest), threads=self._threads)

    def _sample(self, reply: Said) -> Seen | None:
        """For people; None of what is no masked vector, which the machine refuses by name."""
        bits = self.vectors.plan.encoding.ring_bits
        try:
            message = from_client(reply.body)
        except RemoteProtocolError:
            return None
        if not isinstance(message, Masked):
            return None
        count = min(SAMPLE, len(message.vector) * 8 // bits)
        return Seen(reply.client, tuple(map(int, unpack(message.vector[: packed_bytes(count, bits)], count, bits))))

    def _say(self, exchange: Exchange, work: Work, bodies: Mapping[str, bytes]) -> Iterator[Said | Failed]:
        if not work.cohort:
            return iter(())
        if exchange is not Exchange.TRAIN:
            work = replace(work, deadline_s=min(work.deadline_s, _patience_s(exchange, work)))
        return self._backend.secure(exchange, work, bodies, self.vectors.length)


def _patience_s(exchange: Exchange, work: Work) -> float:
    """How long an exchange around training waits: SHARE for the model, too, which rides on it on our link."""
    if exchange is not Exchange.SHARE:
        return KEYS_S
    size = sum(array.nbytes for arrays in (work.model, work.shared) for array in arrays.values())
    return KEYS_S + size / SLOW_BYTES_PER_S


def _is_unmasking(machine: RoundMachine[bytes, SecureSum]) -> bool:
    return machine.state is RoundState.UNMASKING


def _received(server: ServerRound, reply: Said | Failed) -> Failed | None:
    """Hand a client's nonce or shares to the server; what is said of a client that has dropped out."""
    if isinstance(reply, Failed):
        return reply
    try:
        server.receive(reply.client, from_client(reply.body))
    except RemoteProtocolError as error:
        return Failed(reply.client, error.message)
    return None


def _as_bytes(told: Mapping[str, FromServer]) -> dict[str, bytes]:
    return {client: to_bytes(message) for client, message in told.items()}
