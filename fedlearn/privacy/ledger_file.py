"""The ledger on a local disk: opened by one agent at a time, read and verified by anybody."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedlearn.clock import Clock
from fedlearn.durable import sync_folder
from fedlearn.errors import StateError
from fedlearn.lock import FolderLock
from fedlearn.privacy.budget import Budget, spent_epsilon
from fedlearn.privacy.chain import Kind, Record, SignedHead, check_signature, verify
from fedlearn.privacy.events import Cost
from fedlearn.privacy.ledger import Ledger, noted_budget, split
from fedlearn.privacy.ledger_head import HeadFile
from fedlearn.release.charge import Charge

if TYPE_CHECKING:
    from fedlearn.privacy.chain import SiteKey

LEDGER_FILE: Final = "ledger.jsonl"
LEDGERS: Final = "ledgers"
"""The folder of an agent's ledgers in its state folder."""
MAX_LEDGER_BYTES: Final = 4 * 1024**3
"""A larger file is no ledger."""


class FileDisk:
    """An append-only file on a local disk; what `sync` has returned for survives a loss of power."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.fchmod(self._file, 0o600)
        sync_folder(path.parent)

    def append(self, data: bytes) -> None:
        """Write at the end, all of it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def sync(self) -> None:
        """Wait for the disk."""
        os.fsync(self._file)

    def read(self) -> bytes:
        """All of it."""
        return self._path.read_bytes()

    def truncate(self, size: int) -> None:
        """Cut it, durably."""
        os.ftruncate(self._file, size)
        os.fsync(self._file)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)


class LedgerFolder:
    """A ledger in a folder of its own, held by one process.

    Args:
        folder: made when missing.
        site: see `Ledger`.
        data_set: see `Ledger`.
        key: see `Ledger`.

    Raises:
        StateError: another process holds it, it is damaged, it belongs to somebody else, or the disk refuses.
    """

    def __init__(self, folder: Path, site: str, data_set: str, key: SiteKey, *, clock: Clock | None = None) -> None:
        self._folder = folder
        self._lock = FolderLock(folder, "a ledger's agent")
        try:
            self._disk = FileDisk(folder / LEDGER_FILE)
            try:
                self.ledger = Ledger(
                    self._disk, site, data_set, key, clock=clock, set_aside=self._keep, head=HeadFile(folder)
                )
            except BaseException:
                self._disk.close()
                raise
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise StateError(f"ledger {folder}: {error.strerror}", hint="check the folder and the disk") from error
            raise

    def _keep(self, torn: bytes) -> None:
        """Evidence, on the disk before the ledger is cut."""
        disk = FileDisk(self._folder / f"torn-{hashlib.sha256(torn).hexdigest()[:16]}")
        disk.append(torn)
        disk.sync()
        disk.close()

    def close(self) -> None:
        """Let go of file and lock."""
        self._disk.close()
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self.ledger

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Verification:
    """What a reader found. The ledger is sound when `problems` is empty.

    Args:
        site: whose ledger it says it is.
        data_set: of which data.
        records: whole ones.
        torn_bytes: after the last whole record.
        head: hash of the last whole record.
        keys: public keys that signed, in order.
        compared_with: the heads that it was compared with, in words. Without any, records cut off the end do not show.
        problems: in words.
    """

    site: str
    data_set: str
    records: int
    torn_bytes: int
    head: str
    keys: tuple[str, ...]
    compared_with: tuple[str, ...]
    problems: tuple[str, ...]


def verify_ledger(path: Path, remembered: SignedHead | None = None) -> Verification:
    """Check every hash and signature, and that the ledger goes on from the agent's own head beside it and from one remembered elsewhere.

    Args:
        path: the ledger's folder, or its file. A copy under another name has no head beside it.
        remembered: kept elsewhere.

    Raises:
        StateError: the file cannot be read, or is no ledger.
    """
    problems: list[str] = []
    heads: dict[str, SignedHead] = {} if remembered is None else {"the remembered head": remembered}
    if path.is_dir() or path.name == LEDGER_FILE:
        try:  # before the ledger: the agent may be writing, and the head follows
            if (own := HeadFile(path if path.is_dir() else path.parent).read()) is not None:
                heads["the agent's own head"] = own
        except StateError as error:
            problems.append(error.message)
    data = _read(path)
    try:
        records, torn, _ = split(data)
    except StateError as error:
        return Verification("", "", 0, 0, "", (), (), (error.message,))
    keys: list[str] = []
    site = data_set = ""
    for record in records:
        if record.kind in {Kind.OPEN, Kind.KEY}:
            keys.append(str(record.body.get("public_key", "")))
        if record.kind is Kind.OPEN:
            site, data_set = str(record.body.get("site", "")), str(record.body.get("data_set", ""))
            if record.seq:
                problems.append(f"record {record.seq}: a second beginning")
        if not keys or not check_signature(record, keys[-1]):
            problems.append(f"record {record.seq}: its signature is not of the site's key")
    if torn:
        problems.append(f"{len(torn)} bytes of a torn record at the end; the agent sets them aside when it starts")
    if not records:
        problems.append("it is empty")
    for name, one in heads.items():
        if not any(verify(key, one.message(), one.signature) for key in keys):
            problems.append(f"{name} is not signed by this site")
        elif not 0 <= one.seq < len(records) or records[one.seq].sha256 != one.sha256:
            problems.append(
                f"it does not go on from record {one.seq}, where {name} stands: records were cut off or changed, or an old copy was put back"
            )
    head = records[-1].sha256 if records else ""
    compared = tuple(f"{name}, at record {one.seq}" for name, one in heads.items())
    return Verification(site, data_set, len(records), len(torn), head, tuple(keys), compared, tuple(problems))


@dataclass(frozen=True)
class AccountState:
    """One account as its ledger tells it.

    Args:
        account: data set and unit.
        charges: how many.
        refusals: how many.
        voids: charged releases that were given up.
        epsilon: spent, by the budget's rule; None where the ledger names no budget, or its charges are no event trees.
        budget: last noted; None where none was.
        runs: charges of each run.
    """

    account: str
    charges: int
    refusals: int
    voids: int
    epsilon: float | None
    budget: Budget | None
    runs: Mapping[str, int]


def account_states(records: list[Record]) -> list[AccountState]:
    """Every account that the records name, in order of names."""
    costs = _costs(records)
    runs: defaultdict[str, Counter[str]] = defaultdict(Counter)
    refusals: Counter[str] = Counter()
    account_of: dict[str, str] = {}
    voids: Counter[str] = Counter()
    budgets: dict[str, Budget] = {}
    for record in records:
        body = record.body
        if record.kind is Kind.BUDGETS:
            budgets = {str(name): noted_budget(fields) for name, fields in body.items()}
        elif record.kind is Kind.CHARGE:
            runs[body["account"]][body["key"]["run"]] += 1
            account_of[body["key_sha256"]] = body["account"]
        elif record.kind is Kind.REFUSAL:
            refusals[body["account"]] += 1
        elif record.kind is Kind.VOID:
            voids[account_of.get(body["key_sha256"], "")] += 1
    names = sorted({*costs, *refusals, *budgets})
    return [
        AccountState(
            name,
            len(costs[name]),
            refusals[name],
            voids[name],
            _epsilon(costs[name], budgets.get(name)),
            budgets.get(name),
            dict(runs[name]),
        )
        for name in names
    ]


def charges_of(records: list[Record], account: str) -> list[Charge]:
    """What stands charged on an account: what closed runs gave back is off."""
    return [Charge(account, cost) for cost in _costs(records)[account]]


def _costs(records: list[Record]) -> defaultdict[str, list[str]]:
    """By account."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    place: dict[str, int] = {}
    for record in records:
        if record.kind is Kind.CHARGE:
            place[record.body["key_sha256"]] = len(found[record.body["account"]])
            found[record.body["account"]].append(record.body["cost"])
        elif record.kind is Kind.CLOSED:
            found[record.body["account"]][place[record.body["key_sha256"]]] = record.body["cost"]
    return found


def ledgers_in(path: Path) -> list[Path]:
    """The ledgers that a path names: itself, or every one in an agent's state folder.

    Raises:
        StateError: a folder without any.
    """
    if not path.is_dir() or (path / LEDGER_FILE).is_file():
        return [path]
    found = sorted(file.parent for file in (path / LEDGERS).glob(f"*/{LEDGER_FILE}"))
    if not found:
        raise StateError(
            f"ledger {path}: neither a ledger's folder nor the state folder of an agent that keeps one",
            hint=f"name the agent's state folder (--state), or a folder in its {LEDGERS}/; a policy without [budgets] keeps no ledger",
        )
    return found


def read_records(path: Path) -> list[Record]:
    """Every record of a ledger file, without taking its lock; a torn last one is left out.

    Raises:
        StateError: the file cannot be read, or is damaged before its last line.
    """
    return split(_read(path))[0]


def _read(path: Path) -> bytes:
    file = path / LEDGER_FILE if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_LEDGER_BYTES:
            raise StateError(f"ledger {file}: larger than MAX_LEDGER_BYTES = {MAX_LEDGER_BYTES}")
        return file.read_bytes()
    except OSError as error:
        below = sorted(str(found.parent) for found in (path / LEDGERS).glob(f"*/{LEDGER_FILE}"))
        raise StateError(
            f"ledger {file}: cannot be read: {error.strerror}",
            hint=f"name the ledger's folder{': ' + ' or '.join(below) if below else ''}",
        ) from None


def _epsilon(costs: list[str], budget: Budget | None) -> float | None:
    if budget is None:
        return None
    try:
        return spent_epsilon([Cost.from_text(text) for text in costs], budget)
    except StateError:
        return None
