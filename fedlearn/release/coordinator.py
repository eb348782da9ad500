r"""The coordinator's round machine: one exact sum per round over exactly the journaled survivors, whatever crashes.

    IDLE -> OPEN -> [UNMASKING ->] SUMMED -> COMMITTED -> OPEN (next round) ...
                \______\______________\-> VOID -> OPEN (next attempt) | FAILED

What is durable, and when:

* `begin`: roster and broadcast, before anyone is asked.
* `close`: the survivor set with a checksum of each one's payload, before anything is unmasked.
* `commit`: the round's record, and each survivor's new `base`, in one transaction.
* `void` and `fail`: the reason.

The sum is in memory. A crash while OPEN loses it: the same attempt is resumed with an empty sum, and every site resends
the same bytes, free. A crash after `close` loses it too, but the survivors stand: in REFILL exactly those payloads, byte
for byte, are taken, since a site answers one unmask request only; if one cannot come again the attempt is void. A crash
after `commit` goes on with the next round. A machine opened on the journal stands exactly there: see `next_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any, Generic, TypeVar

from fedlearn.errors import LimitExceededError, LocalProtocolError, RemoteProtocolError, UpdateError
from fedlearn.release.checksum import checksum_of
from fedlearn.release.journal import Changes, Journal
from fedlearn.release.keys import TRAIN, UNMASK, AttemptId, ReleaseKey
from fedlearn.release.round import (
    ROUND_TRANSITIONS,
    Accepted,
    Accumulator,
    Attempt,
    Begin,
    Duplicate,
    Failed,
    Masking,
    NoMasking,
    Rejected,
    Rejection,
    Resume,
    RoundPolicy,
    RoundState,
)
from fedlearn.release.round_log import RoundLog

P = TypeVar("P")
A = TypeVar("A", bound=Accumulator[Any])

_LIVE = frozenset({RoundState.OPEN, RoundState.REFILL, RoundState.UNMASKING, RoundState.SUMMED})


def _size_of(payload: Any) -> int:
    return memoryview(payload).nbytes


class RoundMachine(Generic[P, A]):
    """All rounds of one run, one attempt at a time.

    Args:
        journal: where the run is recorded; a machine opened on it stands where the last one stood.
        run: the run's name.
        policy: thresholds and limits.
        accumulator: makes an empty sum of payloads of type P.
        checksum: tells payloads apart; equal payloads have equal ones. See `checksum_of`, the default for bytes.
        size: of a payload, in bytes.
        masking: makes the hook that takes masks off a sum.
        exchange: the exchange whose payloads are summed.

    Raises:
        StateError: the journal is damaged; or, of every call once a write has failed: open a new machine.
    """

    def __init__(
        self,
        journal: Journal,
        run: str,
        accumulator: Callable[[], A],
        *,
        checksum: Callable[[P], str] = checksum_of,
        size: Callable[[P], int] = _size_of,
        policy: RoundPolicy | None = None,
        masking: Callable[[], Masking[A]] = NoMasking,
        exchange: str = TRAIN,
    ) -> None:
        self._log = RoundLog(journal, run)
        self._run = run
        self._policy = policy if policy is not None else RoundPolicy()
        self._make_sum = accumulator
        self._checksum = checksum
        self._size = size
        self._make_masking = masking
        self._exchange = exchange
        self._state = _state_of(self._log)
        self._empty()
        if self._state is RoundState.REFILL and not self.waiting:
            self._unmask()  # the sum of nobody's payloads is here already

    @property
    def state(self) -> RoundState:
        """Where the attempt stands."""
        return self._state

    @property
    def key(self) -> ReleaseKey:
        """The key of the attempt begun last; `base_of` completes what a client must be told.

        Raises:
            LocalProtocolError: nothing was begun.
        """
        return self._log.attempt.key

    @property
    def reason(self) -> str:
        """Why the last attempt is void, or the run has failed; else empty."""
        return self._log.failure or (self._log.attempt.reason if self._log.begun else "")

    @property
    def next_step(self) -> Begin | Resume | Failed:
        """What to do now; after a crash: where to go on."""
        if self._state is RoundState.FAILED:
            return Failed(self._log.failure)
        if self._state in _LIVE:
            attempt = self._log.attempt
            return Resume(attempt.key, attempt.roster, None if attempt.survivors is None else tuple(attempt.survivors))
        return Begin(self._next_attempt())

    @property
    def waiting(self) -> frozenset[str]:
        """The clients that something is still expected of in this state."""
        if self._state is RoundState.OPEN:
            return self._roster - self._received.keys() - self._gone
        if self._state is RoundState.REFILL:
            return frozenset(self.survivors) - self._received.keys()
        if self._state is RoundState.UNMASKING:
            return frozenset(self._requests) - self._answered.keys() - self._gone
        return frozenset()

    @property
    def received(self) -> frozenset[str]:
        """The clients whose payloads are in the sum."""
        return frozenset(self._received)

    @property
    def survivors(self) -> tuple[str, ...]:
        """The clients whose payloads make the sum, sorted; known once the attempt is closed.

        Raises:
            LocalProtocolError: the attempt is open.
        """
        survivors = self._log.attempt.survivors
        if survivors is None:
            raise LocalProtocolError(f"run {self._run}: survivors are known once the attempt is closed")
        return tuple(survivors)

    @property
    def total(self) -> A:
        """The sum of exactly the survivors' payloads, unmasked.

        Raises:
            LocalProtocolError: it is not complete.
        """
        if self._state is not RoundState.SUMMED:
            raise LocalProtocolError(f"run {self._run}: no total in state {self._state.value}")
        return self._sum

    @property
    def committed(self) -> AttemptId | None:
        """The last attempt that was committed, or None. What comes after the round (an evaluation) goes under its name."""
        return max(self._log.bases.values(), default=None)

    def base_of(self, client: str) -> AttemptId | None:
        """The last attempt that was committed with this client in it: the `base` of the next request to it."""
        return self._log.bases.get(client)

    def record(self, round_number: int) -> bytes | None:
        """What `commit` was given for a round, or None."""
        return self._log.record(round_number)

    def begin(self, at: AttemptId, roster: Iterable[str], model_digest: str) -> ReleaseKey:
        """Journal the roster and the broadcast of a new attempt; then its clients may be asked.

        Args:
            at: what `next_step` said.
            roster: the clients that will be asked.
            model_digest: hex digest of what they are sent.

        Raises:
            LocalProtocolError: it is not the next attempt, or the roster is empty or names a client twice.
            LimitExceededError: the roster is too long.
        """
        self._log.check_usable()
        names = sorted(roster)
        if self._state in _LIVE or self._state is RoundState.FAILED or at != self._next_attempt():
            raise LocalProtocolError(
                f"run {self._run}: begin of {at} in state {self._state.value}, expected {self.next_step}"
            )
        if len(names) > self._policy.roster_limit:
            raise LimitExceededError(
                f"roster of {len(names)} clients, limit roster_limit is {self._policy.roster_limit}"
            )
        if len(names) < min(1, self._policy.min_survivors) or len(set(names)) != len(names):
            raise LocalProtocolError(
                f"run {self._run}: got a roster of {len(names)} with {len(set(names))} different names"
            )
        key = ReleaseKey(self._run, at.round, at.attempt, self._exchange, model_digest)
        self._log.opened(Attempt(key, tuple(names), None, RoundState.OPEN))
        self._go(RoundState.OPEN)
        self._empty()
        return key

    def receive(self, client: str, key: ReleaseKey, payload: P) -> Accepted | Duplicate | Rejected:
        """Take one client's payload. Nothing that arrives here can end the round or enter the sum twice."""
        self._log.check_usable()
        if client not in self._roster:
            return Rejected(Rejection.UNKNOWN_CLIENT, f"client {client!r} is not on the roster of run {self._run}")
        if key != self.key:
            return Rejected(Rejection.WRONG_KEY, f"client {client!r}: got {key}, expected {self.key}")
        checksum = self._checksum(payload)
        expected = self._received.get(client)
        if expected == checksum:
            return Duplicate()
        if expected is None and self._state is RoundState.REFILL:
            expected = (self._log.attempt.survivors or {}).get(client)
            if expected is None:
                return Rejected(Rejection.NOT_SURVIVOR, f"client {client!r}: the survivors of {key} stand without it")
        if expected is not None and expected != checksum:
            return Rejected(Rejection.CHANGED, f"client {client!r}: other bytes than it sent before for {key}")
        if self._state not in {RoundState.OPEN, RoundState.REFILL}:
            return Rejected(Rejection.CLOSED, f"client {client!r}: {key} is {self._state.value}")
        if (size := self._size(payload)) > self._policy.payload_limit_bytes:
            self._gone.add(client)
            return self._too_large(client, size)
        try:
            self._sum.add(client, payload)
        except (UpdateError, RemoteProtocolError) as error:
            self._gone.add(client)
            return Rejected(Rejection.INVALID, f"client {client!r}: {error.message}")
        self._received[client] = checksum
        if self._state is RoundState.REFILL and not self.waiting:
            self._unmask()
        return Accepted()

    def receive_sum(
        self, clients: Collection[str], key: ReleaseKey, checksum: str, merge: Callable[[A], None]
    ) -> Accepted | Duplicate | Rejected:
        """Take the sum of several clients' payloads, as a simulation makes it: all of them, or none.

        Args:
            clients: whose payloads are in it.
            key: as in `receive`.
            checksum: of the sum; it stands for each of its clients' payloads.
            merge: adds it to the accumulator, or raises and leaves that as it was.
        """
        self._log.check_usable()
        strangers = sorted(set(clients) - self._roster)
        if strangers or not clients:
            return Rejected(
                Rejection.UNKNOWN_CLIENT, f"sum: clients {strangers[:3]} are not on run {self._run}'s roster"
            )
        if key != self.key:
            return Rejected(Rejection.WRONG_KEY, f"sum: got {key}, expected {self.key}")
        before = {self._received.get(client) for client in clients}
        if before == {checksum}:
            return Duplicate()
        if self._state is RoundState.REFILL:
            survivors = self._log.attempt.survivors or {}
            before |= {None if survivors.get(client) == checksum else "" for client in clients}
        if before != {None}:
            return Rejected(Rejection.CHANGED, f"sum: other clients or bytes than before for {key}")
        if self._state not in {RoundState.OPEN, RoundState.REFILL}:
            return Rejected(Rejection.CLOSED, f"sum: {key} is {self._state.value}")
        try:
            merge(self._sum)
        except UpdateError as error:
            self._gone.update(clients)
            return Rejected(Rejection.INVALID, f"sum: {error.message}")
        self._received.update(dict.fromkeys(clients, checksum))
        if self._state is RoundState.REFILL and not self.waiting:
            self._unmask()
        return Accepted()

    def gone(self, client: str) -> None:
        """This client will send nothing more in this attempt: it refused, or it vanished.

        In REFILL, and in UNMASKING when nobody is left to wait for, the attempt is void.
        """
        self._log.check_usable()
        if self._state not in _LIVE or client not in self.waiting:
            return
        self._gone.add(client)
        if self._state is RoundState.REFILL:
            self.void(f"survivor {client!r} cannot send its payload again after the coordinator's restart")
        elif self._state is RoundState.UNMASKING and not self.waiting:
            self.void("too few survivors answered the unmask request")

    def close(self) -> RoundState:
        """Stop taking payloads: journal the survivors, or give the attempt up if they are too few.

        Returns:
            SUMMED, UNMASKING (send `unmask_requests`), VOID or FAILED.
        """
        self._log.check_usable()
        self._expect(RoundState.OPEN, "close")
        if len(self._received) < self._policy.min_survivors:
            sent, asked = len(self._received), len(self._roster)
            return self.void(f"{sent} of {asked} clients sent, at least {self._policy.min_survivors} needed")
        self._log.closed(replace(self._log.attempt, survivors=dict(sorted(self._received.items()))))
        self._unmask()
        return self._state

    def unmask_requests(self) -> tuple[ReleaseKey, dict[str, bytes]]:
        """The key and, by client, the body of what must be answered before the sum can be read."""
        self._expect(RoundState.UNMASKING, "unmask_requests")
        return replace(self.key, exchange=UNMASK), dict(self._requests)

    def unmasked(self, client: str, key: ReleaseKey, answer: bytes) -> Accepted | Duplicate | Rejected:
        """Take one client's answer to an unmask request."""
        self._log.check_usable()
        if client not in self._requests:
            return Rejected(Rejection.UNKNOWN_CLIENT, f"client {client!r} was not asked to unmask in run {self._run}")
        if key != replace(self.key, exchange=UNMASK):
            return Rejected(
                Rejection.WRONG_KEY, f"client {client!r}: got {key}, expected the {UNMASK} exchange of {self.key}"
            )
        if client in self._answered:
            if self._answered[client] == checksum_of(answer):
                return Duplicate()
            return Rejected(
                Rejection.CHANGED, f"client {client!r}: another answer than before to the same unmask request"
            )
        if self._state is not RoundState.UNMASKING:
            return Rejected(Rejection.CLOSED, f"client {client!r}: {key} is {self._state.value}")
        if len(answer) > self._policy.payload_limit_bytes:
            self._gone.add(client)
            return self._too_large(client, len(answer))
        try:
            self._masking.answer(client, answer)
        except (UpdateError, RemoteProtocolError) as error:
            self._gone.add(client)
            return Rejected(Rejection.INVALID, f"client {client!r}: {error.message}")
        self._answered[client] = checksum_of(answer)
        self._open_sum()
        return Accepted()

    def commit(self, record: bytes, extra: Changes | None = None) -> None:
        """Journal the round's record; the round is over, and every survivor's base is this attempt.

        Args:
            record: what the server rule made of the total: opaque here.
            extra: records of the caller's own to be written in the same transaction.
        """
        self._log.check_usable()
        self._expect(RoundState.SUMMED, "commit")
        self._log.committed(replace(self._log.attempt, state=RoundState.COMMITTED), record, extra or {})
        self._go(RoundState.COMMITTED)
        self._empty()

    def void(self, reason: str) -> RoundState:
        """Give the attempt up. Its charges stand at the sites.

        Returns:
            VOID: the next attempt may begin. FAILED: it was the last one that the policy allows.
        """
        self._log.check_usable()
        if self._state not in _LIVE:
            raise LocalProtocolError(f"run {self._run}: void in state {self._state.value}")
        attempt = replace(self._log.attempt, state=RoundState.VOID, reason=reason)
        number, times = attempt.key.at
        last = times >= self._policy.max_attempts
        failure = f"round {number} was void {times} times, the limit; the last time: {reason}" if last else ""
        self._log.voided(attempt, failure)
        self._go(RoundState.FAILED if last else RoundState.VOID)
        self._empty()
        return self._state

    def fail(self, reason: str) -> None:
        """End the run without a model: stopped, or impossible. Repeats are ignored."""
        self._log.check_usable()
        if self._state is RoundState.FAILED:
            return
        self._log.failed(reason or "no reason was given")
        self._go(RoundState.FAILED)
        self._empty()

    def _unmask(self) -> None:
        try:
            self._requests.update(self._masking.requests(self.key, self._log.attempt.roster, self.survivors))
        except (UpdateError, RemoteProtocolError) as error:
            self.void(f"the sum cannot be unmasked: {error.message}")
            return
        self._go(RoundState.UNMASKING if self._requests else RoundState.SUMMED)
        self._open_sum()

    def _open_sum(self) -> None:
        if self._state is not RoundState.UNMASKING or not self._masking.ready():
            return
        try:
            self._masking.unmask(self._sum)
        except (UpdateError, RemoteProtocolError) as error:
            self.void(f"the sum cannot be unmasked: {error.message}")
            return
        self._go(RoundState.SUMMED)

    def _empty(self) -> None:
        """Forget what is in memory of an attempt."""
        self._sum = self._make_sum()
        self._masking = self._make_masking()
        self._received: dict[str, str] = {}
        self._requests: dict[str, bytes] = {}
        self._answered: dict[str, str] = {}
        self._gone: set[str] = set()
        self._roster = frozenset(self._log.attempt.roster if self._log.begun else ())

    def _next_attempt(self) -> AttemptId:
        if not self._log.begun:
            return AttemptId(1, 1)
        at = self._log.attempt.key.at
        return (
            AttemptId(at.round + 1, 1) if self._state is RoundState.COMMITTED else AttemptId(at.round, at.attempt + 1)
        )

    def _too_large(self, client: str, size: int) -> Rejected:
        limit = self._policy.payload_limit_bytes
        return Rejected(Rejection.TOO_LARGE, f"client {client!r}: {size} bytes, limit payload_limit_bytes is {limit}")

    def _expect(self, state: RoundState, what: str) -> None:
        if self._state is not state:
            raise LocalProtocolError(f"run {self._run}: {what} in state {self._state.value}, expected {state.value}")

    def _go(self, state: RoundState) -> None:
        if state not in ROUND_TRANSITIONS[self._state]:
            raise LocalProtocolError(f"run {self._run}: no way from {self._state.value} to {state.value}")
        self._state = state


def _state_of(log: RoundLog) -> RoundState:
    """Where a run stands after a crash: what was in memory is gone."""
    if log.failure:
        return RoundState.FAILED
    if not log.begun:
        return RoundState.IDLE
    if log.attempt.state is RoundState.OPEN and log.attempt.survivors is not None:
        return RoundState.REFILL
    return log.attempt.state
