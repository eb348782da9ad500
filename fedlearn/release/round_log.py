"""What the coordinator's round machine keeps on the disk: one run's attempts, records, bases and end."""

from __future__ import annotations

from fedlearn.errors import LocalProtocolError, StateError
from fedlearn.release.journal import Changes, Journal, pack, unpack
from fedlearn.release.keys import AttemptId, record_key
from fedlearn.release.round import Attempt, RoundState


class RoundLog:
    """The durable half of a `RoundMachine`. Every method writes first and remembers after.

    Args:
        journal: where the run is recorded.
        run: the run's name.

    Raises:
        StateError: the journal is damaged; or, of every call once a write has failed: open a new one.
    """

    def __init__(self, journal: Journal, run: str) -> None:
        self._journal = journal
        self._run = run
        self._write_failed = False
        self._attempt = self._load_attempt()
        failed = journal.get(self._place("failed"))
        self.failure = "" if failed is None else str(unpack(failed, "reason", what="failed")["reason"])
        self.bases: dict[str, AttemptId] = {}
        for name, data in journal.scan(self._place("base", "")):
            fields = unpack(data, "client", "base", what=name)
            self.bases[str(fields["client"])] = AttemptId.from_pair(fields["base"], what=name)

    @property
    def begun(self) -> bool:
        """True when there is an attempt."""
        return self._attempt is not None

    @property
    def attempt(self) -> Attempt:
        """The attempt that was begun last.

        Raises:
            LocalProtocolError: there is none.
        """
        if self._attempt is None:
            raise LocalProtocolError(f"run {self._run}: nothing was begun")
        return self._attempt

    def record(self, round_number: int) -> bytes | None:
        """What `committed` was given for a round, or None."""
        return self._journal.get(self._place("commit", round_number))

    def opened(self, attempt: Attempt) -> None:
        """A new attempt, before anyone is asked. Of a committed one before it, the round's record is what stays."""
        changes: dict[str, bytes | None] = {self._place("head"): pack({"at": attempt.key.at})}
        if self._attempt is not None and self._attempt.state is RoundState.COMMITTED:
            changes[self._place("attempt", *self._attempt.key.at)] = None  # rosters would pile up, a cohort a round
        self._move(attempt, changes)

    def closed(self, attempt: Attempt) -> None:
        """The attempt with its survivors, before anything is unmasked."""
        self._move(attempt, {})

    def committed(self, attempt: Attempt, record: bytes, extra: Changes) -> None:
        """The round's record, its survivors' new base, and the caller's own records, at once."""
        at = attempt.key.at
        survivors = attempt.survivors or {}
        bases = {self._place("base", client): pack({"client": client, "base": at}) for client in survivors}
        self._move(attempt, {**extra, self._place("commit", at.round): record, **bases})
        self.bases.update(dict.fromkeys(survivors, at))

    def voided(self, attempt: Attempt, failure: str) -> None:
        """The attempt is given up, and with a `failure` the run too."""
        self._move(attempt, {self._place("failed"): pack({"reason": failure})} if failure else {})
        self.failure = failure

    def failed(self, reason: str) -> None:
        """The run is over without a model."""
        self._write({self._place("failed"): pack({"reason": reason})})
        self.failure = reason

    def check_usable(self) -> None:
        """Refuse to go on after a failed write."""
        if self._write_failed:
            raise StateError(
                "the run's journal failed to write: what is on the disk is unknown",
                hint="check the disk (full? read-only?) and restart the server; it goes on from what is durable",
            )

    def _move(self, attempt: Attempt, changes: Changes) -> None:
        self._write({**changes, self._place("attempt", *attempt.key.at): attempt.to_record()})
        self._attempt = attempt

    def _write(self, changes: Changes) -> None:
        self.check_usable()
        try:
            self._journal.write(changes)
        except BaseException:
            self._write_failed = True
            raise

    def _load_attempt(self) -> Attempt | None:
        head = self._journal.get(self._place("head"))
        if head is None:
            return None
        place = self._place("attempt", *AttemptId.from_pair(unpack(head, "at", what="head")["at"], what="head"))
        data = self._journal.get(place)
        if data is None:
            raise StateError(f"journal: record {place!r} is missing", hint="restore the folder from a backup")
        return Attempt.from_record(data, what=place)

    def _place(self, kind: str, *parts: str | int) -> str:
        return record_key(kind, self._run, *parts)
