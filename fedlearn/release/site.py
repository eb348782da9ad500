"""The site's gate: nothing derived from the data leaves before its charge and its finished bytes are durable together.

A release goes `reserve` -> (compute, outside) -> `commit` -> `release` -> `settle`. The rules:

1. *Charge first.* `commit` writes charge, finished bytes and the client's new state in one transaction. A crash before it
   leaves no byte outside and no charge; a crash after it leaves the charge and the same bytes. So the recorded cost is
   never below what was released. A reservation is held in memory only: no byte leaves before the commit, so when the
   process dies nothing is owed and the reservation is dropped.
2. *One key, one payload.* Whoever asks again with the same key gets the same bytes, free. The same exchange of the same
   attempt for another broadcast or another request is refused; whose updates are in a sum is signed for, and a sum is
   opened, for one set of survivors only, ever.
3. *Forward only.* An attempt that is earlier than one already asked for is refused, except as rule 2's resend.
4. *A void stays charged.* An attempt that was followed by another attempt at the same round, or that the coordinator
   calls void, is counted against the policy's cap; its charge stands. A round that went on without this client
   is *missed*: charged, not counted as void, since a slow site would lock itself out.
5. *State follows the committed model.* The state after an attempt is a candidate. Every request names its `base`: the last
   attempt that the coordinator committed with this client in it, or None. The candidate of that attempt becomes the
   state, all other candidates are dropped, and the new attempt starts from there. `base` is absolute, so a lost message
   changes nothing, and no round's state is applied twice.
6. *One opening a round.* After this site helped to open a sum, no update of the same round leaves it under a later
   attempt: two sums over sets that differ by one client would give that client's update away. Whoever opens a sum is in
   it, so those who opened one are together in every combination of the round's sums, or not at all. Exempt are updates
   whose own noise is charged for each attempt (`noisy`), and sites whose policy says `reopen`.

There is no I/O here besides the journal, which belongs to one gate at a time. Calls must not overlap.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from fedlearn.errors import LocalProtocolError, StateError
from fedlearn.release.charge import Book, Charge, Charger
from fedlearn.release.journal import Changes, Journal, pack, unpack
from fedlearn.release.keys import AGREE, TRAIN, UNMASK, AttemptId, ReleaseKey, admission_key, record_key
from fedlearn.release.records import (
    STATUS_TRANSITIONS,
    Finished,
    InProgress,
    Refusal,
    Refused,
    Release,
    Reserved,
    SitePolicy,
    Status,
)
from fedlearn.release.site_run import DROPPED, Hold, SiteRun, check_base, mismatch, outcome


class SiteGate:
    """The gate of one site over one journal, for all runs.

    Args:
        journal: where releases are committed; a gate opened on it knows all that was committed before.
        charger: weighs charges against the site's budgets.
        policy: the site's other limits.
        book: the site's ledger. A charge that the journal has and the ledger lacks (it was damaged) is entered again.

    Raises:
        StateError: the journal is damaged. Also raised by every later call once a write has failed: it is then unknown
            what is on the disk, and only a gate opened anew may go on.
    """

    def __init__(
        self, journal: Journal, charger: Charger, policy: SitePolicy | None = None, book: Book | None = None
    ) -> None:
        self._journal = journal
        self._charger = charger
        self._policy = policy if policy is not None else SitePolicy()
        self._book = book
        self._runs: defaultdict[str, SiteRun] = defaultdict(SiteRun)
        self._failed = False
        for name, data in journal.scan("release/"):
            release = Release.from_record(data, what=name)
            run = self._runs[release.key.run]
            run.releases[release.key.at, release.key.exchange] = release
            run.latest = max(run.latest, release.key.at)
        for name, data in journal.scan("base/"):
            fields = unpack(data, "run", "base", "state_at", what=name)
            run = self._runs[str(fields["run"])]
            run.base = AttemptId.from_pair(fields["base"], what=name)
            run.state_at = None if fields["state_at"] is None else AttemptId.from_pair(fields["state_at"], what=name)
        if book is not None:
            _reconcile(self.releases(), book)

    def admit(self, run: str, charge: Charge) -> Refused | None:
        """Charge a whole run before its first round, where sampling is accounted over all rounds whether or not this client is drawn.

        Admitting a run again with the same charge is free. Its releases are then reserved without a charge of their own.

        Raises:
            LocalProtocolError: there is no ledger to charge.
        """
        self._check_usable()
        if self._book is None:
            raise LocalProtocolError(f"admit {run}: this gate has no ledger")
        key = admission_key(run, charge)
        if self._book.has(key):
            return None
        if (refused := self._weigh(key, charge)) is None:
            self._enter(key, charge)
            return None
        return self._noted(key, charge, refused)

    def foresee(self, run: str, charge: Charge) -> Refused | None:
        """Whether a run's charge would fit now, before anything is asked of the run. A refusal is noted; nothing is charged or reserved.

        Args:
            run: the run's name.
            charge: what its first release will cost, or the whole run's.
        """
        self._check_usable()
        key = admission_key(run, charge)
        if self._book is not None and self._book.has(key):
            return None
        refused = self._weigh(key, charge)
        return None if refused is None else self._noted(key, charge, refused)

    def fits(self, charge: Charge) -> bool:
        """Whether a charge has room now. Nothing is noted: nobody has asked for it."""
        self._check_usable()
        return self._charger.weigh(self.spent(charge.account), charge).allowed

    def reserve(
        self,
        key: ReleaseKey,
        *,
        base: AttemptId | None = None,
        charge: Charge | None = None,
        request: bytes = b"",
        noisy: bool = False,
    ) -> Reserved | Finished | InProgress | Refused:
        """Ask for one release, before anything is computed.

        Args:
            key: the release's name.
            base: the last attempt of the run that the coordinator committed with this client in it.
            charge: what the release will cost; None in a run without a privacy plan.
            request: what else the answer depends on (for `AGREE` and `UNMASK`: the canonical request). Bound to the key for good.
            noisy: its noise is its own, drawn and charged for each attempt; see rule 6.

        Returns:
            `Reserved`: compute and `commit`. `Finished`: answered before; send these bytes. `InProgress`: wait for the
            commit of the first call. `Refused`: nothing is charged, nothing may leave.
        """
        self._check_usable()
        answer = self._reserve(key, base, charge, request, noisy)
        return self._noted(key, charge, answer) if isinstance(answer, Refused) else answer

    def _reserve(
        self, key: ReleaseKey, base: AttemptId | None, charge: Charge | None, request: bytes, noisy: bool
    ) -> Reserved | Finished | InProgress | Refused:
        run = self._runs[key.run]
        asked = hashlib.sha256(request).hexdigest() if request else ""
        if (refused := mismatch(run, key, asked)) is not None:
            return refused
        if (known := run.releases.get((key.at, key.exchange))) is not None:
            return self._again(known)
        if (key.at, key.exchange) in run.holds:
            return InProgress(key)
        if self._book is not None and self._book.closed(key.run):
            return Refused(Refusal.CLOSED, f"{key}: the run was closed, and what it had not used was given back")
        if key.at < run.latest:
            return Refused(Refusal.STALE, f"{key}: {run.latest} was already asked for")
        if Status.VOID in run.statuses(key.at):
            return Refused(Refusal.VOID, f"{key}: the attempt is void")
        if (refused := self.settle(key.run, base, upto=key.at)) is not None:
            return refused
        run.advance(key.at)
        if run.voids() > self._policy.max_voids_per_run:
            return Refused(
                Refusal.VOID_CAP,
                f"{key}: {run.voids()} attempts of this run were given up after an update had left; the site's policy allows "
                f"max_voids_per_run = {self._policy.max_voids_per_run}",
            )
        if key.exchange == TRAIN and not noisy and (refused := self.reopened(key.run, key.at)) is not None:
            return refused
        if key.exchange in {AGREE, UNMASK} and (key.at, TRAIN) not in run.releases:
            return Refused(Refusal.NOTHING_TO_UNMASK, f"{key}: no update of this attempt left this site")
        if charge is not None and (refused := self._weigh(key, charge)) is not None:
            return refused
        run.holds[key.at, key.exchange] = Hold(key, asked, charge)
        return Reserved(key, self.state(key.run))

    def reopened(self, run: str, at: AttemptId) -> Refused | None:
        """Why no update of this attempt may leave by rule 6, unless its noise is its own; None where it may."""
        self._check_usable()
        opened = self._runs[run].opened(at)
        if opened is None or self._policy.reopen:
            return None
        return Refused(
            Refusal.OPENED,
            f"{run}: this site helped to open the sum of {opened}; with one of {at} beside it, an update could be told from the rest",
        )

    def commit(self, key: ReleaseKey, payload: bytes, *, state: bytes | None = None) -> Finished | Refused:
        """Make charge, finished bytes and new state durable in one transaction.

        Args:
            key: a reserved release.
            payload: the finished bytes: clipped, noised, quantised and masked as they will leave.
            state: the client's state after this attempt; None if the exchange does not change it.

        Returns:
            `Finished`: the bytes may leave. `Refused`: the attempt was given up meanwhile, or a limit is exceeded; the
            reservation is gone, the bytes must be dropped.

        Raises:
            LocalProtocolError: the key was never reserved, or two exchanges of one attempt change the state.
        """
        self._check_usable()
        run = self._runs[key.run]
        slot = (key.at, key.exchange)
        hold = run.holds.get(slot)
        if hold is None or hold.key != key:
            if key.at < run.latest:
                return Refused(Refusal.STALE, f"{key}: the attempt was given up while it was computed")
            raise LocalProtocolError(f"commit of {key}: it is not reserved", hint="call reserve first, commit once")
        if self._book is not None and self._book.closed(key.run):
            del run.holds[slot]
            return Refused(Refusal.CLOSED, f"{key}: the run was closed while it was computed")
        for what, data, limit in (
            ("payload", payload, self._policy.payload_limit_bytes),
            ("state", state or b"", self._policy.state_limit_bytes),
        ):
            if len(data) > limit:
                del run.holds[slot]
                refused = Refused(Refusal.TOO_LARGE, f"{key}: {what} of {len(data)} bytes, the site allows {limit}")
                return self._noted(key, hold.charge, refused)
        if state is not None and (run.base == key.at or run.has_state(key.at)):
            raise LocalProtocolError(f"commit of {key}: the client's state after {key.at} already stands")
        digest = hashlib.sha256(payload).hexdigest()
        release = Release(
            key, hold.request_sha256, hold.charge, digest, len(payload), state is not None, Status.COMMITTED
        )
        changes = {_place("release", key): release.to_record(), _place("payload", key): payload}
        if state is not None:
            changes[_state_place(key.run, key.at)] = state
        if hold.charge is not None and self._book is not None:
            self._enter(key, hold.charge)
        self._write(changes)
        del run.holds[slot]
        run.releases[slot] = release
        return Finished(key, payload)

    def release(self, key: ReleaseKey) -> bytes:
        """The committed bytes, which may leave.

        Raises:
            LocalProtocolError: the release is not committed, or its bytes are no longer needed by anyone.
        """
        self._check_usable()
        known = self._runs[key.run].releases.get((key.at, key.exchange))
        if known is None or known.key != key or known.status is not Status.COMMITTED:
            raise LocalProtocolError(f"release of {key}: it is {known.status.value if known else 'not committed'}")
        return self._payload(known)

    def abandon(self, key: ReleaseKey) -> None:
        """Give a reservation back: the computation failed and nothing left. Unknown keys are ignored, as is one that was refused because another has its place."""
        holds, slot = self._runs[key.run].holds, (key.at, key.exchange)
        if (hold := holds.get(slot)) is not None and hold.key == key:
            del holds[slot]

    def acknowledged(self, key: ReleaseKey) -> None:
        """The coordinator will never ask for these bytes again: prune them and keep the record. Repeats are ignored."""
        self._check_usable()
        known = self._runs[key.run].releases.get((key.at, key.exchange))
        if known is not None and known.key == key and known.status is Status.COMMITTED:
            self._move([(known, Status.ACKNOWLEDGED)], {})

    def voided(self, run: str, at: AttemptId) -> Refused | None:
        """The coordinator gave an attempt up. What was committed in it stays charged and is counted against the cap."""
        self._check_usable()
        known = self._runs[run]
        if known.base == at:
            return Refused(Refusal.CONTRADICTION, f"{run}: {at} was called committed before it was called void")
        known.advance(AttemptId(at.round, at.attempt + 1))
        moves = [
            (r, Status.VOID) for (when, _), r in known.releases.items() if when == at and STATUS_TRANSITIONS[r.status]
        ]
        self._move(moves, {})
        return None

    def settle(self, run: str, base: AttemptId | None, *, upto: AttemptId | None = None) -> Refused | None:
        """Learn what became of earlier attempts; called by `reserve`, and by the agent when a run ends.

        Args:
            run: the run's name.
            base: the last attempt that the coordinator committed with this client in it, or None.
            upto: the attempt now asked for; None when the run is over and every attempt is settled.

        Returns:
            None, or why the server's word cannot be true; then nothing is changed.
        """
        self._check_usable()
        known = self._runs[run]
        if (refused := check_base(known, run, base, upto)) is not None:
            return refused
        moves = [
            (release, status)
            for (at, _), release in known.releases.items()
            if STATUS_TRANSITIONS[release.status] and (status := outcome(at, known.base, base, upto)) is not None
        ]
        changes: dict[str, bytes | None] = {}
        state_at = known.state_at
        if base is not None and base != known.base:
            if known.has_state(base):
                if state_at is not None:
                    changes[_state_place(run, state_at)] = None
                state_at = base
            changes[record_key("base", run)] = pack({"run": run, "base": base, "state_at": state_at})
        self._move(moves, changes)
        known.base, known.state_at = base, state_at
        return None

    def state(self, run: str) -> bytes | None:
        """The client's state after the last attempt known to be committed with it, or None."""
        at = self._runs[run].state_at
        return None if at is None else self._need(_state_place(run, at))

    def spent(self, account: str) -> tuple[Charge, ...]:
        """Every charge of the account, over all runs: committed ones, then open reservations."""
        if self._book is not None:
            committed: list[Charge | None] = [*self._book.charges(account)]
        else:
            committed = [r.charge for run in self._runs.values() for r in run.releases.values()]
        held = [hold.charge for run in self._runs.values() for hold in run.holds.values()]
        return tuple(c for c in (*committed, *held) if c is not None and c.account == account)

    def releases(self, run: str | None = None) -> Iterator[Release]:
        """The record of every release, in order of run, attempt and exchange; of one run if it is named."""
        for name in sorted(self._runs) if run is None else [run]:
            yield from (release for _, release in sorted(self._runs[name].releases.items(), key=lambda item: item[0]))

    def _again(self, known: Release) -> Finished | Refused:
        if known.status is Status.COMMITTED:
            return Finished(known.key, self._payload(known))
        if known.status is Status.VOID:
            return Refused(Refusal.VOID, f"{known.key}: the attempt is void")
        return Refused(Refusal.GONE, f"{known.key}: the bytes are {known.status.value} and were deleted")

    def _payload(self, known: Release) -> bytes:
        return self._need(_place("payload", known.key))

    def _need(self, place: str) -> bytes:
        data = self._journal.get(place)
        if data is None:
            raise StateError(f"journal: record {place!r} is missing", hint="restore the folder from a backup")
        return data

    def _move(self, moves: list[tuple[Release, Status]], changes: dict[str, bytes | None]) -> None:
        """Write new statuses with `changes`; prune bytes and candidates that nobody can ask for."""
        moved = [release.moved_to(status) for release, status in moves]
        for release in moved:
            changes[_place("release", release.key)] = release.to_record()
            changes[_place("payload", release.key)] = None
            if release.has_state and release.status in DROPPED:
                changes[_state_place(release.key.run, release.key.at)] = None
        if changes:
            self._write(changes)
        for release in moved:
            self._runs[release.key.run].releases[release.key.at, release.key.exchange] = release
            if self._book is not None and release.charge is not None and release.status is Status.VOID:
                self._book.void(release.key)

    def _weigh(self, key: ReleaseKey, charge: Charge) -> Refused | None:
        weighing = self._charger.weigh(self.spent(charge.account), charge)
        if weighing.allowed:
            return None
        return Refused(
            Refusal.BUDGET,
            weighing.in_words(charge.account, key.work),
            weighing,
            hint="whoever answers for the data may raise that budget in the site's policy file and start the site again; else go on without the site",
        )

    def _noted(self, key: ReleaseKey, charge: Charge | None, refused: Refused) -> Refused:
        if charge is not None and self._book is not None:
            self._book.refuse(key, charge, refused.reason.value, refused.message)
        return refused

    def _enter(self, key: ReleaseKey, charge: Charge) -> None:
        assert self._book is not None
        try:
            self._book.charge(key, charge)
        except BaseException:
            self._failed = True
            raise

    def _write(self, changes: Changes) -> None:
        try:
            self._journal.write(changes)
        except BaseException:
            self._failed = True
            raise

    def _check_usable(self) -> None:
        if self._failed:
            raise StateError(
                "the gate's journal or ledger failed to write: what is on the disk is unknown, so nothing more may leave",
                hint="check the disk (full? read-only?) and restart the client; it goes on from what is durable",
            )


def _reconcile(releases: Iterable[Release], book: Book) -> None:
    """Enter what the journal knows and the book lost."""
    for release in releases:
        if release.charge is not None and not book.has(release.key):
            book.charge(release.key, release.charge)
        if release.charge is not None and release.status is Status.VOID:
            book.void(release.key)


def _place(kind: str, key: ReleaseKey) -> str:
    return record_key(kind, key.run, key.round, key.attempt, key.exchange)


def _state_place(run: str, at: AttemptId) -> str:
    return record_key("state", run, at.round, at.attempt)
