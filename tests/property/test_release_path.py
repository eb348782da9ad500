"""The release path under 1,000 random schedules of crashes, losses, resends, reorderings, refusals and voids.

A failure names its seed; `run_schedule(seed)` plays it again. The second half breaks the machines on purpose: a harness
that does not notice a broken machine proves nothing about a whole one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fedlearn.release import Finished, RoundMachine, SiteGate, SitePolicy, Status
from fedlearn.release.records import Refused
from tests.support.release_world import CrashingDisk, Kinds, ViolationError, run_schedule

BLOCKS = 10
SCHEDULES_A_BLOCK = 100


def play(seed: int, kinds: Kinds | None = None) -> Counter[str]:
    try:
        return run_schedule(seed, kinds)
    except Exception as error:
        raise ViolationError(f"run_schedule({seed}): {type(error).__name__}: {error}") from error


@pytest.fixture(scope="module")
def happened() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_schedule_breaks_a_promise(block: int, happened: Counter[str]) -> None:
    for seed in range(block * SCHEDULES_A_BLOCK, (block + 1) * SCHEDULES_A_BLOCK):
        happened += play(seed)


def test_the_same_seed_plays_the_same_schedule() -> None:
    assert play(7) == play(7)


@pytest.mark.parametrize(
    ("what", "least"),
    [
        ("finished", 300),
        ("failed", 100),
        ("void", 300),
        ("refill", 100),
        ("resent", 1_000),
        ("keys lost", 50),
        ("hostile", 200),
        ("site vanished", 50),
        ("Site crashed", 1_000),
        ("Coordinator crashed", 1_000),
        ("crash at write", 300),
        ("crash at written", 300),
        ("crash at synced", 300),
        ("Duplicate", 500),
        ("Rejected: invalid", 20),
        ("Rejected: wrong-key", 50),
        ("Rejected: closed", 5),
        ("refused: budget", 500),
        ("refused: void-cap", 100),
        ("refused: stale", 100),
        ("refused: gone", 50),
        ("refused: void", 20),
        ("refused: other-model", 50),
        ("refused: other-request", 5),
        ("refused: nothing-to-unmask", 10),
        ("commit refused: stale", 20),
    ],
)
def test_the_schedules_are_hard_enough(what: str, least: int, happened: Counter[str]) -> None:
    if not happened:  # this test was asked for alone
        for seed in range(BLOCKS * SCHEDULES_A_BLOCK):
            happened += play(seed)
    assert happened[what] >= least, sorted(happened.items())


class CommitsAfterRelease(SiteGate):
    """The bytes may leave first; they are written when they are asked for again."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._early = {}

    def commit(self, key, payload, *, state=None):
        if key.exchange != "train":
            return super().commit(key, payload, state=state)
        self._early[key] = (payload, state)
        return Finished(key, payload)

    def release(self, key):
        return self._early[key][0] if key in self._early else super().release(key)

    def reserve(self, key, **kwargs):
        if key in self._early:
            payload, state = self._early.pop(key)
            if isinstance(refused := super().commit(key, payload, state=state), Refused):
                return refused
        return super().reserve(key, **kwargs)


class DoesNotSync(CrashingDisk):
    def sync(self) -> None:
        self.step("synced")


class RefundsVoids(SiteGate):
    """A void attempt's charge is given back."""

    def _move(self, moves, changes) -> None:
        super()._move([(replace(r, charge=None) if s is Status.VOID else r, s) for r, s in moves], changes)


class ComputesAgain(SiteGate):
    """A resend is computed anew."""

    def reserve(self, key, **kwargs):
        answer = super().reserve(key, **kwargs)
        if not isinstance(answer, Finished) or key.exchange != "train":
            return answer
        run = self._runs[key.run]
        del run.releases[key.at, key.exchange]
        return super().reserve(key, **kwargs)


class AnswersAnyUnmaskRequest(SiteGate):
    """An answer is given for whichever survivors are named."""

    def reserve(self, key, *, request=b"", **kwargs):
        return super().reserve(key, request=b"", **kwargs)


class AppliesStateAtOnce(SiteGate):
    """The state moves on with every attempt, committed by the coordinator or not."""

    def commit(self, key, payload, *, state=None):
        answer = super().commit(key, payload, state=state)
        if state is not None and isinstance(answer, Finished):
            self._latest = state
        return answer

    def state(self, run):
        return getattr(self, "_latest", None) or super().state(run)


class ForgetsVoids(SiteGate):
    """Voids are not counted."""

    def __init__(self, journal, charger, policy=None) -> None:
        super().__init__(journal, charger, SitePolicy(max_voids_per_run=10**6))


class SplitsTheTransaction(SiteGate):
    """The charge first, the bytes a moment later."""

    def _write(self, changes) -> None:
        later = {k: v for k, v in changes.items() if k.startswith("payload/")}
        for part in ({k: v for k, v in changes.items() if k not in later}, later):
            super()._write(part)


class SpendsWithoutLooking(SiteGate):
    """Only what is committed since the start counts against the budget."""

    def spent(self, account):
        return ()


class CountsDuplicates(RoundMachine):
    """A resend enters the sum again."""

    def receive(self, client, key, payload):
        if self._received.pop(client, None) is not None:
            self._gone.discard(client)
        return super().receive(client, key, payload)


class ForgetsSurvivors(RoundMachine):
    """The survivors are not journaled before the unmasking."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._log.closed = lambda attempt: setattr(self._log, "_attempt", attempt)


class ForgetsBases(RoundMachine):
    """Clients are not told what became of their last attempt."""

    def base_of(self, client):
        return None


class VoidsInMemory(RoundMachine):
    """A void is not made durable."""

    def void(self, reason):
        log = self._log
        journal, log._journal = log._journal, type("Nowhere", (), {"write": lambda _, changes: None})()
        try:
            return super().void(reason)
        finally:
            log._journal = journal


def _name(kinds: Kinds) -> str:
    whole = Kinds()
    return next(
        k.__name__ for k in (kinds.disk, kinds.gate, kinds.machine) if k not in {None, whole.gate, whole.machine}
    )


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (Kinds(gate=CommitsAfterRelease), "on the wire and not on the disk"),
        (Kinds(disk=DoesNotSync), "on the wire and not on the disk"),
        (Kinds(gate=RefundsVoids), "the ledger"),
        (Kinds(gate=SplitsTheTransaction), "is missing"),
        (Kinds(gate=ComputesAgain), "two different answers"),
        (Kinds(gate=AnswersAnyUnmaskRequest), "two different answers"),
        (Kinds(gate=AppliesStateAtOnce), "its state holds"),
        (Kinds(gate=ForgetsVoids), "voids, the site allows"),
        (Kinds(gate=SpendsWithoutLooking), "over its budget"),
        (Kinds(machine=CountsDuplicates), "the survivors sent"),
        (Kinds(machine=ForgetsSurvivors), "two sets of survivors"),
        (Kinds(machine=ForgetsBases), "its state holds"),
        (Kinds(machine=VoidsInMemory), "without a reason"),
    ],
    ids=lambda value: _name(value) if isinstance(value, Kinds) else None,
)
def test_a_broken_machine_is_caught(kinds: Kinds, says: str) -> None:
    caught = []
    for seed in range(300):
        try:
            run_schedule(seed, kinds)
        except Exception as error:
            caught.append(str(error))
            if says in str(error):
                return
    raise AssertionError(f"300 schedules, and nobody noticed {says!r}; noticed: {Counter(caught).most_common(3)}")
