"""Gate, journal and ledger on two disks that crash anywhere: the ledger is never below what left."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.clock import MockClock
from fedlearn.privacy.budget import Budget, EpsilonCharger
from fedlearn.privacy.chain import Kind
from fedlearn.privacy.events import Cost, Gaussian
from fedlearn.privacy.ledger import Ledger, split
from fedlearn.release import (
    TRAIN,
    AttemptId,
    Charge,
    MemoryDisk,
    MemoryJournal,
    ReleaseKey,
    Reserved,
    SiteGate,
    SitePolicy,
)
from fedlearn.release.records import Finished

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ACCOUNT = "heart/record"
CHARGE = Charge(ACCOUNT, Cost(Gaussian(50.0)).to_text())
CRASHES = 300


class Crash(BaseException):
    pass


class CrashingDisk(MemoryDisk):
    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def step(self, operation: str) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Crash(operation)


def lives_until(seed: int, ledger_kind: type[Ledger] = Ledger, crashes: int = 10) -> Counter:
    """One site's life with some crashes; returns what happened. Raises AssertionError when more left than was charged."""
    chance = random.Random(seed)
    disks = {"journal": CrashingDisk(), "ledger": CrashingDisk()}
    left: set[ReleaseKey] = set()
    happened: Counter[str] = Counter()
    number, attempt = 1, 1
    for _ in range(crashes):
        victim = chance.choice(list(disks))
        disks[victim].left = chance.randrange(0, 40)
        try:
            ledger = ledger_kind(disks["ledger"], "cleveland", "heart", KEY, clock=MockClock())
            charger = EpsilonCharger({ACCOUNT: Budget(100.0, 1e-5)})
            gate = SiteGate(MemoryJournal(disks["journal"]), charger, SitePolicy(10**6), ledger)
            while True:
                key = ReleaseKey("r", number, attempt, TRAIN, "m")
                answer = gate.reserve(key, charge=CHARGE)
                if isinstance(answer, Reserved):
                    answer = gate.commit(key, chance.randbytes(8))
                if isinstance(answer, Finished):
                    gate.release(key)
                    left.add(key)
                    happened["left"] += 1
                if chance.random() < 0.2:
                    gate.voided("r", AttemptId(number, attempt))
                    happened["void"] += 1
                    attempt += 1
                else:
                    number, attempt = number + 1, 1
        except Crash as crash:
            happened[f"{victim} crashed at {crash}"] += 1
        for disk in disks.values():
            disk.left = None
            disk.crash(chance.randint(0, disk.unsynced()))
        happened["torn"] += bool(split(disks["ledger"].read())[1])
        check(disks, left)
    return happened


def check(disks: dict[str, CrashingDisk], left: set[ReleaseKey]) -> None:
    # A ledger opened beside the journal, as an agent does.
    copies = {name: CrashingDisk() for name in disks}
    for name, disk in disks.items():
        copies[name].append(disk.read())
        copies[name].sync()
    ledger = Ledger(copies["ledger"], "cleveland", "heart", KEY, clock=MockClock())
    assert all(ledger.has(key) for key in left), "more left than was charged"
    assert len(ledger.charges(ACCOUNT)) >= len(left)
    records, torn, _ = split(copies["ledger"].read())
    assert not torn
    assert sum(r.kind is Kind.CHARGE for r in records) == len(ledger.charges(ACCOUNT))


def test_whatever_crashes_the_ledger_is_never_below_what_left():
    happened: Counter[str] = Counter()
    for seed in range(CRASHES // 10):
        happened += lives_until(seed)
    assert sum(n for what, n in happened.items() if "crashed" in what) == CRASHES
    for what in ("ledger crashed at write", "ledger crashed at written", "ledger crashed at synced", "torn", "void"):
        assert happened[what] >= 10, happened
    for what in ("journal crashed at write", "journal crashed at written", "journal crashed at synced"):
        assert happened[what] >= 10, happened


class DoesNotSync(Ledger):
    """A charge is called durable before it is."""

    def __init__(self, disk, *args, **kwargs) -> None:
        class Lazy:
            append, read, truncate = disk.append, disk.read, disk.truncate

            def sync(self) -> None:
                """Not."""

        super().__init__(Lazy(), *args, **kwargs)


def test_a_ledger_that_does_not_sync_is_caught():
    def many_lives() -> None:
        for seed in range(50):
            lives_until(seed, DoesNotSync)

    with pytest.raises(AssertionError, match="more left than was charged"):
        many_lives()
