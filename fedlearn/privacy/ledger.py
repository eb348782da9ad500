"""The site's ledger: one append-only, hash-chained, signed file per data set, which outlives runs, upgrades and crashes.

A charge is on the disk before the gate commits the bytes that it pays for, so a crash can only overstate what was spent. What follows
from that when the file is opened again:

torn last record    Its append never returned, so its bytes never left. It is set aside and noted; if it can still be read as a charge it is charged
                    all the same. Should it have been damaged later, the gate enters it again from its journal.
damage elsewhere    The ledger is refused: no budget can be trusted.
an older copy       Shorter than a head that the site signed, which the server remembers or the site's own file beside the ledger: refused
                    (`check_remembered`). With the file, so is a last record that was damaged after its append had returned.
another site's      Refused, as is another data set's.
two agents          The second is refused by the lock.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import StateError, StudyError
from fedlearn.privacy.chain import (
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    START,
    BadRecordError,
    ClosedRun,
    Kind,
    Record,
    SignedHead,
    make_line,
    public_text,
    read_line,
    signed_head,
    verify,
)
from fedlearn.privacy.events import Cost, Repeated, leaves
from fedlearn.privacy.ledger_head import NEWEST_COPY
from fedlearn.release.charge import Charge
from fedlearn.release.keys import ADMISSION

if TYPE_CHECKING:
    from fedlearn.privacy.budget import Budget
    from fedlearn.privacy.chain import SiteKey
    from fedlearn.privacy.ledger_head import HeadMemory
    from fedlearn.release.keys import ReleaseKey

MAX_REFUSALS_PER_RUN: Final = 200
"""Refusals of one run beyond this are not written: a server must not be able to fill the site's disk."""
_VERSION: Final = 1
_LINE_START: Final = b'{"record":{"body":'


class Disk(Protocol):
    """An append-only file. `fedlearn.release.journal.MemoryDisk` is one that can crash."""

    def append(self, data: bytes) -> None: ...
    def sync(self) -> None: ...
    def read(self) -> bytes: ...
    def truncate(self, size: int) -> None: ...


class Ledger:
    """A `fedlearn.release.charge.Book` over one append-only file.

    Args:
        disk: holds the file.
        site: whose data it is; fixed when the ledger is made.
        data_set: which data; fixed when the ledger is made.
        key: signs every record; a key that is new to the ledger is noted.
        clock: of the records' times.
        set_aside: takes the bytes of a torn last record, before they are cut off.
        head: keeps the head after each record; the ledger must go on from the one that it has.

    Raises:
        StateError: the file is damaged, does not go on from its head, or belongs to another site or data set. It is left as it was.
    """

    def __init__(
        self,
        disk: Disk,
        site: str,
        data_set: str,
        key: SiteKey,
        *,
        clock: Clock | None = None,
        set_aside: Callable[[bytes], object] | None = None,
        head: HeadMemory | None = None,
    ) -> None:
        self._disk, self._key, self._head = disk, key, head
        self._clock = clock if clock is not None else SystemClock()
        self.site, self.data_set = site, data_set
        self._charges: defaultdict[str, list[Charge]] = defaultdict(list)
        self._known: set[str] = set()
        self._void: set[str] = set()
        self._admissions: dict[str, tuple[str, int]] = {}  # key's digest to account and place among its charges
        self._closed: dict[str, int] = {}  # run to rounds
        self._refusals: Counter[str] = Counter()
        self._refused: set[tuple[str, str]] = set()
        self._hashes: list[str] = []
        self._keys: list[str] = []
        self._budgets: Mapping[str, Any] = {}
        self._noted: dict[str, Any] = {}  # of every account that ever had one, its last
        self._last: Record | None = None
        self._failed = False
        records, torn, size = split(disk.read())
        for record in records:
            self._take(record)
        if head is not None and (kept := head.read()) is not None:
            self._check_own(kept)
        if torn:
            if set_aside is not None:
                set_aside(torn)
            disk.truncate(size)
        self._begin(torn)

    def charges(self, account: str) -> Sequence[Charge]:
        return tuple(self._charges[account])

    @property
    def accounts(self) -> tuple[str, ...]:
        """Every account that was ever charged."""
        return tuple(sorted(name for name, found in self._charges.items() if found))

    def has(self, key: ReleaseKey) -> bool:
        return key.digest() in self._known

    def charge(self, key: ReleaseKey, charge: Charge) -> None:
        self._append(Kind.CHARGE, _charge_body(key, charge))

    def refuse(self, key: ReleaseKey, charge: Charge, reason: str, message: str) -> None:
        again = (key.digest(), reason)
        if again in self._refused or self._refusals[key.run] >= MAX_REFUSALS_PER_RUN:
            return
        last = self._refusals[key.run] + 1 == MAX_REFUSALS_PER_RUN
        body = {**_charge_body(key, charge), "reason": reason, "message": message[:1000]}
        self._append(Kind.REFUSAL, {**body, "more_are_not_written": True} if last else body)

    def void(self, key: ReleaseKey) -> None:
        if key.digest() not in self._void:
            self._append(Kind.VOID, {"key": key.__dict__, "key_sha256": key.digest()})

    def closed(self, run: str) -> bool:
        return run in self._closed

    def close(self, key: ReleaseKey, closed: ClosedRun, coordinator_key: str, *, released: int) -> None:
        """Give back what a run that was charged whole did not use. No release of the run is admitted after this.

        Args:
            key: the run's admission.
            closed: the coordinator's word; this record is the site's own, signed too.
            coordinator_key: public key that the site has pinned, as `chain.public_text` gives it.
            released: attempts in which this site itself released something (`SiteGate.releases`): there cannot have been fewer rounds.

        Raises:
            StateError: the run was not charged whole here, is closed with another count, the signature is not the coordinator's, or the count
                does not fit the charge. Nothing is given back.
        """
        if self._closed.get(key.run) == closed.rounds:
            return
        found = self._admissions.get(key.digest())
        if found is None or key.run != closed.run or key.run in self._closed:
            raise StateError(f"close {closed.run}: this ledger has no open run of that name that was charged whole")
        if not verify(coordinator_key, closed.message(), closed.signature):
            raise StateError(f"close {closed.run}: the round count is not signed by the coordinator")
        cost = Cost.from_text(self._charges[found[0]][found[1]].cost)
        counts = leaves(cost.event)
        if released > closed.rounds:
            raise StateError(
                f"close {closed.run}: {closed.rounds} rounds, and this site released something in {released}"
            )
        if len(counts) != 1 or not 0 <= closed.rounds <= counts.total():
            raise StateError(
                f"close {closed.run}: {closed.rounds} rounds do not fit the charge of {counts.total()} releases"
            )
        used = Cost(Repeated(next(iter(counts)), closed.rounds), cost.relation)
        body = {**_charge_body(key, Charge(found[0], used.to_text())), "rounds": closed.rounds}
        signed = {"coordinator_key": coordinator_key, "coordinator_signature": closed.signature.hex()}
        self._append(Kind.CLOSED, {**body, **signed})

    def override(self, who: str, what: str, why: str) -> None:
        """Note what a person at the site decided against the ledger's own rules. It changes no charge."""
        self._append(Kind.OVERRIDE, {"who": who[:200], "what": what[:1000], "why": why[:1000]})

    def note_budgets(self, budgets: Mapping[str, Budget]) -> None:
        """Note the budgets of the site's policy, where they are not those last noted.

        Raises:
            StateError: a budget adds up by another rule, or at another order, than what was charged before; then nothing is noted.
        """
        for name, budget in budgets.items():
            if not self._charges.get(name) or name not in self._noted:
                continue
            then, now = noted_budget(self._noted[name]).adds_up_by, budget.adds_up_by
            if then != now:
                raise StateError(
                    f"ledger of {self.data_set!r}: account {name!r} was charged under {then}, the policy says {now}: "
                    "whoever changes that after releases were seen chooses by them",
                    hint=f"write into the policy's budget: {then}",
                )
        body = {name: {**b.__dict__, "rule": b.rule.value} for name, b in sorted(budgets.items())}
        if body != self._budgets:
            self._append(Kind.BUDGETS, body)

    def head(self) -> SignedHead:
        """How far this ledger has come, for the server to remember."""
        assert self._last is not None
        return signed_head(self.site, self.data_set, self._last, self._key)

    def owns(self, head: SignedHead) -> bool:
        """Whether a head is of this ledger, by a key that signed it: nobody but this site can have made it."""
        return (head.site, head.data_set) == (self.site, self.data_set) and any(
            verify(key, head.message(), head.signature) for key in self._keys
        )

    def check_remembered(self, head: SignedHead) -> None:
        """Compare with a head that the server remembers.

        Raises:
            StateError: this ledger is older than the head, or has another history: an old copy was put back. Or the head is not of
                this site's making: then the server is wrong, and the ledger is as good as before.
        """
        if not self.owns(head):
            raise StateError(
                f"ledger head: not signed by this site for {self.data_set!r}; it says nothing about this ledger"
            )
        self._check_goes_on(head)

    def _check_own(self, head: SignedHead) -> None:
        """As `check_remembered`, for the head that this site keeps itself: perhaps under a key whose record is what was cut off."""
        mine = (head.site, head.data_set) == (self.site, self.data_set)
        if not mine or not any(
            verify(key, head.message(), head.signature) for key in (*self._keys, public_text(self._key))
        ):
            raise StateError(
                f"ledger of {self.data_set!r}: the head beside it is not signed by this site for it", hint=NEWEST_COPY
            )
        self._check_goes_on(head)

    def _check_goes_on(self, head: SignedHead) -> None:
        if not 0 <= head.seq < len(self._hashes) or self._hashes[head.seq] != head.sha256:
            raise StateError(
                f"ledger of {self.data_set!r}: it has {len(self._hashes)} records, and this site has signed number {head.seq} of another "
                "history: an old copy was put back, or records were cut off or damaged",
                hint=NEWEST_COPY,
            )

    def _begin(self, torn: bytes) -> None:
        mine = {"public_key": public_text(self._key)}
        if self._last is None:
            self._append(Kind.OPEN, {"site": self.site, "data_set": self.data_set, "version": _VERSION, **mine})
        elif self._keys[-1] != mine["public_key"]:
            self._append(Kind.KEY, mine)
        if torn:
            seen = {"size_bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            self._append(Kind.REPAIR, seen)
            body = _legible_charge(torn)
            if body is not None:
                self._append(Kind.CHARGE, {**body, "from_torn_record": True})

    def _append(self, kind: Kind, body: Mapping[str, Any]) -> None:
        if self._failed:
            raise StateError(
                f"ledger of {self.data_set!r}: it failed to write, so it is unknown what is on the disk",
                hint="check the disk (full? read-only?) and restart",
            )
        prev = START if self._last is None else self._last.sha256
        line = make_line(len(self._hashes), prev, self._clock.wall(), kind, body, self._key)
        self._failed = True
        try:
            self._disk.append(line)
            self._disk.sync()
            record = read_line(line[:-1], len(self._hashes), prev)
            if self._head is not None:
                self._head.write(signed_head(self.site, self.data_set, record, self._key))
        except OSError as error:
            raise StateError(
                f"ledger of {self.data_set!r}: cannot be written: {error}", hint="check the disk"
            ) from error
        self._failed = False
        self._take(record)

    def _take(self, record: Record) -> None:
        """Learn what a record says."""
        body = record.body
        try:
            match record.kind:
                case Kind.OPEN:
                    found = (body["site"], body["data_set"], body["version"])
                    if found != (self.site, self.data_set, _VERSION):
                        raise StateError(
                            f"ledger: it is of site {found[0]!r}, data set {found[1]!r}, version {found[2]}; "
                            f"expected {self.site!r}, {self.data_set!r}, {_VERSION}",
                            hint="every data set of every site has a ledger of its own",
                        )
                    self._keys.append(str(body["public_key"]))
                case Kind.KEY:
                    self._keys.append(str(body["public_key"]))
                case Kind.BUDGETS:
                    self._budgets = body
                    self._noted |= body
                case Kind.CHARGE:
                    charge = Charge(str(body["account"]), str(body["cost"]))
                    self._charges[charge.account].append(charge)
                    self._known.add(str(body["key_sha256"]))
                    if body["key"]["exchange"] == ADMISSION:
                        place = charge.account, len(self._charges[charge.account]) - 1
                        self._admissions[str(body["key_sha256"])] = place
                case Kind.CLOSED:
                    account, at = self._admissions[str(body["key_sha256"])]
                    self._charges[account][at] = Charge(account, str(body["cost"]))
                    self._closed[str(body["key"]["run"])] = int(body["rounds"])
                case Kind.REFUSAL:
                    self._refusals[str(body["key"]["run"])] += 1
                    self._refused.add((str(body["key_sha256"]), str(body["reason"])))
                case Kind.VOID:
                    self._void.add(str(body["key_sha256"]))
        except (KeyError, TypeError) as error:
            raise StateError(f"ledger: record {record.seq} ({record.kind.value}) is damaged: {error!r}") from None
        self._hashes.append(record.sha256)
        self._last = record


def split(data: bytes) -> tuple[list[Record], bytes, int]:
    """The records of a ledger's bytes, what follows the last whole one, and the size of the whole ones.

    Raises:
        StateError: a record before the last line is damaged.
    """
    records: list[Record] = []
    prev, position = START, 0
    while position < len(data):
        end = data.find(b"\n", position)
        if len(records) >= MAX_RECORDS:
            raise StateError(f"ledger: more than MAX_RECORDS = {MAX_RECORDS} records")
        try:
            record = read_line(data[position : len(data) if end < 0 else end], len(records), prev)
        except BadRecordError as error:
            _check_torn(data[position:], len(records), error)
            break
        if end < 0:  # all but its newline
            break
        records.append(record)
        prev, position = record.sha256, end + 1
    return records, data[position:], position


def noted_budget(fields: Any) -> Budget:
    """A budget as a ledger has it.

    Raises:
        StateError: it is damaged.
    """
    from fedlearn.privacy.budget import Budget, StopRule

    try:
        return Budget(**{**fields, "rule": StopRule(fields["rule"])})
    except (KeyError, TypeError, ValueError, StudyError) as error:
        raise StateError(f"ledger: a noted budget is damaged: {error}") from None


def _check_torn(rest: bytes, seq: int, error: BadRecordError) -> None:
    """Refuse what no power cut does to an append: damage that lines follow, and a file that never was a ledger."""
    end = rest.find(b"\n")
    if end >= 0 and b"\n" in rest[end + 1 :]:
        raise StateError(
            f"ledger: record {seq} is damaged: {error}; more lines follow it",
            hint="the file was changed or the disk lost data: restore it from a backup, and look into how this came to be",
        )
    if seq == 0 and rest.strip(b"\0") and not rest.startswith(_LINE_START[: len(rest)]):
        raise StateError("ledger: the file is no ledger", hint="name another folder")


def _charge_body(key: ReleaseKey, charge: Charge) -> dict[str, Any]:
    return {"account": charge.account, "cost": charge.cost, "key": dict(key.__dict__), "key_sha256": key.digest()}


def _legible_charge(torn: bytes) -> dict[str, Any] | None:
    """The body of a charge at the start of a torn record. Keys are sorted, so the body comes first and the kind after it."""
    if not torn.startswith(_LINE_START):
        return None
    try:
        text = torn[len(_LINE_START) : MAX_RECORD_BYTES].decode("ascii", errors="replace")
        body, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(body, dict) and all(isinstance(body.get(x), str) for x in ("account", "cost", "key_sha256"))
    if not whole or "reason" in body:
        return None
    return {name: body[name] for name in ("account", "cost", "key", "key_sha256") if name in body}
