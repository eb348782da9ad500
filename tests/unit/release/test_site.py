"""Every transition and every refusal of the site's gate."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from fedlearn.errors import LocalProtocolError, StateError
from fedlearn.release import (
    UNMASK,
    AttemptId,
    Charge,
    CostCharger,
    Finished,
    InProgress,
    MemoryDisk,
    MemoryJournal,
    Refusal,
    Refused,
    ReleaseKey,
    Reserved,
    SiteGate,
    SitePolicy,
    Status,
)
from fedlearn.release.journal import Changes
from fedlearn.release.keys import AGREE
from fedlearn.release.records import STATUS_TRANSITIONS

KEY = ReleaseKey("run", 1, 1, "train", "model-1")
RETRY = replace(KEY, attempt=2)
NEXT = replace(KEY, round=2, model_digest="model-2")
COST = Charge("heart", "1")


class PowerCutError(Exception):
    pass


class Disk(MemoryDisk):
    """Fails at the next operation of a given name."""

    fail_at: str | None = None

    def step(self, operation: str) -> None:
        if operation == self.fail_at:
            self.fail_at = None
            raise PowerCutError


class Site:
    """A gate on a disk that can lose its power."""

    def __init__(self, budget: str = "100", policy: SitePolicy | None = None) -> None:
        self.disk = Disk()
        self.budget, self.policy = budget, policy
        self.restart()

    def restart(self, keep_unsynced_bytes: int = 0) -> SiteGate:
        self.disk.crash(keep_unsynced_bytes)
        charger = CostCharger({"heart": Decimal(self.budget)}, unit="epsilon")
        self.gate = SiteGate(MemoryJournal(self.disk), charger, self.policy)
        return self.gate

    def train(
        self, key: ReleaseKey, payload: bytes, *, state: bytes | None = None, base: AttemptId | None = None
    ) -> None:
        answer = self.gate.reserve(key, base=base, charge=COST)
        assert isinstance(answer, Reserved), answer
        assert self.gate.commit(key, payload, state=state) == Finished(key, payload)

    def spent(self) -> int:
        return len(self.gate.spent("heart"))


@pytest.fixture
def site() -> Site:
    return Site()


def refusal(answer: object) -> Refusal:
    assert isinstance(answer, Refused), answer
    assert answer.message
    return answer.reason


class TestOneRelease:
    def test_reserve_commit_release(self, site: Site) -> None:
        assert site.gate.reserve(KEY, charge=COST) == Reserved(KEY, None)
        assert site.gate.commit(KEY, b"bytes") == Finished(KEY, b"bytes")
        assert site.gate.release(KEY) == b"bytes"
        assert site.spent() == 1

    def test_a_resend_is_identical_and_free_also_after_a_restart(self, site: Site) -> None:
        site.train(KEY, b"bytes")
        for gate in (site.gate, site.restart()):
            assert gate.reserve(KEY, charge=COST) == Finished(KEY, b"bytes")
            assert gate.release(KEY) == b"bytes"
            assert site.spent() == 1

    def test_a_resend_needs_no_budget(self) -> None:
        site = Site(budget="1")
        site.train(KEY, b"bytes")
        assert site.gate.reserve(KEY, charge=COST) == Finished(KEY, b"bytes")
        assert refusal(site.gate.reserve(NEXT, charge=COST)) is Refusal.BUDGET

    def test_a_run_without_a_privacy_plan_charges_nothing(self, site: Site) -> None:
        site.gate.reserve(KEY)
        site.gate.commit(KEY, b"bytes")
        assert site.spent() == 0
        assert next(site.gate.releases()).charge is None

    def test_twice_the_same_request_is_computed_once(self, site: Site) -> None:
        site.gate.reserve(KEY, charge=COST)
        assert site.gate.reserve(KEY, charge=COST) == InProgress(KEY)
        assert site.spent() == 1

    def test_an_abandoned_reservation_gives_its_charge_back(self, site: Site) -> None:
        site.gate.reserve(KEY, charge=COST)
        site.gate.abandon(KEY)
        site.gate.abandon(KEY)
        assert site.spent() == 0
        assert site.gate.reserve(KEY, charge=COST) == Reserved(KEY, None)

    def test_nothing_is_released_before_the_commit(self, site: Site) -> None:
        with pytest.raises(LocalProtocolError, match="not committed"):
            site.gate.release(KEY)
        site.gate.reserve(KEY)
        with pytest.raises(LocalProtocolError, match="not committed"):
            site.gate.release(KEY)

    def test_nothing_is_committed_that_was_not_reserved(self, site: Site) -> None:
        with pytest.raises(LocalProtocolError, match="not reserved"):
            site.gate.commit(KEY, b"bytes")
        site.train(KEY, b"bytes")
        with pytest.raises(LocalProtocolError, match="not reserved"):
            site.gate.commit(KEY, b"other bytes")
        assert site.gate.release(KEY) == b"bytes"

    def test_the_record_of_a_release(self, site: Site) -> None:
        site.train(KEY, b"bytes", state=b"s")
        (known,) = site.restart().releases("run")
        assert (known.key, known.charge, known.size_bytes, known.has_state) == (KEY, COST, 5, True)
        assert known.payload_sha256 == "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"

    def test_payloads_and_states_stay_out_of_reprs(self, site: Site) -> None:
        site.gate.reserve(KEY)
        assert "secret" not in repr(site.gate.commit(KEY, b"secret", state=b"secret too"))
        site.gate.settle("run", KEY.at)
        assert "secret" not in repr(site.gate.reserve(NEXT, base=KEY.at))


def test_what_is_refused_for_good_is_the_runs_and_not_an_attempts() -> None:
    permanent = {refusal.value for refusal in Refusal if refusal.permanent}
    assert permanent == {"budget", "void-cap", "closed", "too-large", "unknown-base", "contradiction"}


class TestBudget:
    def test_the_refusal_has_the_numbers(self) -> None:
        site = Site(budget="1.5")
        site.train(KEY, b"bytes")
        answer = site.gate.reserve(NEXT, charge=COST)
        assert refusal(answer) is Refusal.BUDGET
        assert isinstance(answer, Refused)
        assert answer.weighing is not None
        assert (answer.weighing.spent, answer.weighing.after, answer.weighing.budget) == (1, 2, Decimal("1.5"))
        assert answer.message == "epsilon 1 of 1.5 is spent on 'heart', and round 2 would make it 2"
        assert site.spent() == 1

    def test_an_open_reservation_counts(self) -> None:
        site = Site(budget="1")
        site.gate.reserve(KEY, charge=COST)
        assert refusal(site.gate.reserve(replace(KEY, run="another"), charge=COST)) is Refusal.BUDGET

    def test_runs_share_an_account(self) -> None:
        site = Site(budget="1")
        site.train(KEY, b"bytes")
        site.restart()
        assert refusal(site.gate.reserve(replace(KEY, run="another"), charge=COST)) is Refusal.BUDGET

    def test_accounts_are_apart(self) -> None:
        site = Site(budget="1")
        site.train(KEY, b"bytes")
        assert refusal(site.gate.reserve(NEXT, charge=Charge("unknown", "1"))) is Refusal.BUDGET
        assert site.gate.reserve(NEXT) == Reserved(NEXT, None)


class TestCrash:
    def test_a_crash_between_reserve_and_commit_owes_nothing(self, site: Site) -> None:
        """No byte left before the commit, so the reservation is dropped: nothing on the disk speaks of it."""
        site.gate.reserve(KEY, charge=COST)
        assert site.disk.read() == b""
        site.restart()
        assert site.spent() == 0
        assert site.gate.reserve(KEY, charge=COST) == Reserved(KEY, None)

    @pytest.mark.parametrize("fail_at", ["write", "written", "synced"])
    @pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
    def test_a_crash_in_the_commit_leaves_all_of_it_or_nothing(self, site: Site, fail_at: str, kept: float) -> None:
        site.gate.reserve(KEY, charge=COST)
        site.disk.fail_at = fail_at
        with pytest.raises(PowerCutError):
            site.gate.commit(KEY, b"bytes", state=b"state")
        survives = fail_at == "synced" or (fail_at == "written" and kept == 1.0)
        gate = site.restart(int(kept * site.disk.unsynced()))
        answer = gate.reserve(KEY, charge=COST)
        assert answer == (Finished(KEY, b"bytes") if survives else Reserved(KEY, None))
        assert gate.settle("run", KEY.at if survives else None) is None
        assert gate.state("run") == (b"state" if survives else None)

    def test_after_a_failed_write_nothing_goes_on(self, site: Site) -> None:
        site.gate.reserve(KEY, charge=COST)
        site.disk.fail_at = "written"
        with pytest.raises(PowerCutError):
            site.gate.commit(KEY, b"bytes")
        for call in (
            lambda: site.gate.release(KEY),
            lambda: site.gate.reserve(NEXT),
            lambda: site.gate.commit(KEY, b"bytes"),
            lambda: site.gate.acknowledged(KEY),
            lambda: site.gate.voided("run", KEY.at),
            lambda: site.gate.settle("run", None),
        ):
            with pytest.raises(StateError, match="failed to write"):
                call()

    def test_a_damaged_record_stops_the_gate(self) -> None:
        for damaged in (b"not json", b"[]", b"{}", b'{"key": {}}'):
            journal = MemoryJournal()
            journal.write({"release/run/1/1/train": damaged})
            with pytest.raises(StateError, match="damaged"):
                SiteGate(journal, CostCharger({}))

    def test_a_missing_payload_is_named(self, site: Site) -> None:
        site.train(KEY, b"bytes")
        MemoryJournal(site.disk).write({"payload/run/0000000001/0000000001/train": None})
        with pytest.raises(StateError, match="missing"):
            site.restart().release(KEY)


class TestOneKeyOnePayload:
    @pytest.mark.parametrize("committed", [False, True])
    def test_another_model_under_the_same_name(self, site: Site, committed: bool) -> None:
        site.gate.reserve(KEY, charge=COST)
        if committed:
            site.gate.commit(KEY, b"bytes")
        other = replace(KEY, model_digest="model-x")
        assert refusal(site.gate.reserve(other, charge=COST)) is Refusal.OTHER_MODEL
        assert site.spent() == 1

    def test_who_is_refused_for_it_gives_back_nothing_of_the_first(self, site: Site) -> None:
        other = replace(KEY, model_digest="other")
        site.gate.reserve(KEY, charge=COST)
        assert refusal(site.gate.reserve(other, charge=COST)) is Refusal.OTHER_MODEL
        site.gate.abandon(other)
        assert site.spent() == 1
        assert isinstance(site.gate.commit(KEY, b"bytes"), Finished)

    def test_a_commit_under_another_model(self, site: Site) -> None:
        site.gate.reserve(KEY)
        with pytest.raises(LocalProtocolError, match="not reserved"):
            site.gate.commit(replace(KEY, model_digest="model-x"), b"bytes")

    def test_other_exchanges_of_the_attempt_are_their_own_releases(self, site: Site) -> None:
        site.train(KEY, b"bytes")
        evaluate = replace(KEY, exchange="evaluate", model_digest="model-2")
        site.train(evaluate, b"scores", base=KEY.at)
        assert site.gate.release(evaluate) == b"scores"
        assert site.spent() == 2


class TestForwardOnly:
    @pytest.mark.parametrize("restart", [False, True])
    def test_an_earlier_attempt_is_refused(self, site: Site, restart: bool) -> None:
        site.train(NEXT, b"bytes")
        if restart:
            site.restart()
        assert refusal(site.gate.reserve(KEY)) is Refusal.STALE
        assert refusal(site.gate.reserve(replace(KEY, attempt=9))) is Refusal.STALE

    def test_an_attempt_given_up_while_it_is_computed_is_not_committed(self, site: Site) -> None:
        site.gate.reserve(KEY, charge=COST)
        site.gate.reserve(RETRY, charge=COST)
        assert refusal(site.gate.commit(KEY, b"bytes")) is Refusal.STALE
        assert site.spent() == 1
        assert site.gate.commit(RETRY, b"bytes") == Finished(RETRY, b"bytes")

    def test_runs_do_not_hinder_each_other(self, site: Site) -> None:
        site.train(NEXT, b"bytes")
        assert site.gate.reserve(replace(KEY, run="run/2")) == Reserved(replace(KEY, run="run/2"), None)


class TestAcknowledged:
    def test_the_bytes_go_and_the_record_stays(self, site: Site) -> None:
        site.train(KEY, b"bytes" * 100)
        site.gate.acknowledged(KEY)
        site.gate.acknowledged(KEY)
        for gate in (site.gate, site.restart()):
            assert refusal(gate.reserve(KEY, charge=COST)) is Refusal.GONE
            assert [r.status for r in gate.releases()] == [Status.ACKNOWLEDGED]
            assert site.spent() == 1
            with pytest.raises(LocalProtocolError, match="acknowledged"):
                gate.release(KEY)
        assert list(MemoryJournal(site.disk).scan("payload/")) == []

    def test_what_was_never_committed_is_ignored(self, site: Site) -> None:
        site.gate.acknowledged(KEY)
        assert list(site.gate.releases()) == []

    def test_its_attempt_may_still_be_counted_or_void(self, site: Site) -> None:
        site.train(KEY, b"bytes", state=b"after 1")
        site.gate.acknowledged(KEY)
        assert site.gate.settle("run", KEY.at) is None
        assert site.gate.state("run") == b"after 1"


class TestVoids:
    @pytest.mark.parametrize("told", [True, False])
    def test_a_void_stays_charged(self, site: Site, told: bool) -> None:
        site.train(KEY, b"bytes", state=b"lost")
        if told:
            assert site.gate.voided("run", KEY.at) is None
            assert refusal(site.gate.reserve(KEY)) is (Refusal.VOID)
        site.train(RETRY, b"fresh bytes", state=b"kept")
        for gate in (site.gate, site.restart()):
            assert [r.status for r in gate.releases("run")] == [Status.VOID, Status.COMMITTED]
            assert site.spent() == 2
            assert refusal(gate.reserve(KEY)) is Refusal.VOID

    @pytest.mark.parametrize("restart", [False, True])
    def test_a_void_attempt_takes_no_other_exchange(self, site: Site, restart: bool) -> None:
        site.train(KEY, b"bytes")
        site.gate.voided("run", KEY.at)
        if restart:
            site.restart()
        evaluate = replace(KEY, exchange="evaluate")
        assert refusal(site.gate.reserve(evaluate)) in {Refusal.VOID, Refusal.STALE}

    def test_a_void_reservation_is_dropped(self, site: Site) -> None:
        site.gate.reserve(KEY, charge=COST)
        site.gate.voided("run", KEY.at)
        assert site.spent() == 0
        assert refusal(site.gate.commit(KEY, b"bytes")) is Refusal.STALE

    def test_the_cap(self) -> None:
        site = Site(policy=SitePolicy(max_voids_per_run=1))
        site.train(KEY, b"1")
        site.train(RETRY, b"2")
        third = replace(KEY, attempt=3)
        assert refusal(site.gate.reserve(third, charge=COST)) is Refusal.VOID_CAP
        site.restart()
        assert refusal(site.gate.reserve(third, charge=COST)) is Refusal.VOID_CAP
        assert refusal(site.gate.reserve(NEXT, charge=COST)) is Refusal.VOID_CAP
        assert site.spent() == 2
        assert isinstance(site.gate.reserve(replace(KEY, run="another"), charge=COST), Reserved)

    def test_an_attempt_that_left_nothing_is_not_counted(self) -> None:
        site = Site(policy=SitePolicy(max_voids_per_run=0))
        for attempt in (1, 2, 3):
            site.gate.reserve(replace(KEY, attempt=attempt))
            site.gate.voided("run", AttemptId(1, attempt))
        site.train(replace(KEY, attempt=4), b"bytes")

    def test_a_round_that_went_on_without_this_site_is_missed_not_void(self) -> None:
        site = Site(policy=SitePolicy(max_voids_per_run=0))
        for number in (1, 2, 3):
            site.train(replace(KEY, round=number), b"late")
        assert [r.status for r in site.gate.releases()] == [Status.MISSED, Status.MISSED, Status.COMMITTED]
        assert refusal(site.gate.reserve(KEY)) is Refusal.GONE
        assert site.spent() == 3

    def test_a_committed_attempt_cannot_become_void(self, site: Site) -> None:
        site.train(KEY, b"bytes")
        site.gate.settle("run", KEY.at)
        assert refusal(site.gate.voided("run", KEY.at)) is Refusal.CONTRADICTION


class TestState:
    def test_state_follows_the_committed_attempt(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1/1")
        assert site.gate.state("run") is None
        assert site.gate.reserve(NEXT, base=KEY.at) == Reserved(NEXT, b"after 1/1")
        assert site.restart().state("run") == b"after 1/1"

    def test_a_retry_starts_from_the_state_before_the_round(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        site.train(NEXT, b"2", state=b"after 2/1", base=KEY.at)
        retry = replace(NEXT, attempt=2)
        assert site.gate.reserve(retry, base=KEY.at) == Reserved(retry, b"after 1")

    def test_a_missed_round_does_not_change_it(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        site.train(NEXT, b"2", state=b"after 2, too late", base=KEY.at)
        third = replace(KEY, round=3)
        assert site.gate.reserve(third, base=KEY.at) == Reserved(third, b"after 1")

    def test_an_exchange_without_a_new_state_keeps_the_old_one(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        site.train(NEXT, b"2", base=KEY.at)
        third = replace(KEY, round=3)
        assert site.gate.reserve(third, base=NEXT.at) == Reserved(third, b"after 1")

    def test_at_the_end_of_a_run_the_last_attempt_is_settled(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        assert site.gate.settle("run", KEY.at) is None
        assert site.gate.settle("run", KEY.at) is None
        assert site.restart().state("run") == b"after 1"
        assert [r.status for r in site.gate.releases()] == [Status.COUNTED]

    def test_an_evaluation_after_the_round_sees_the_new_state(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        evaluate = replace(KEY, exchange="evaluate", model_digest="model-2")
        assert site.gate.reserve(evaluate, base=KEY.at) == Reserved(evaluate, b"after 1")
        site.gate.commit(evaluate, b"scores")
        site.gate.reserve(NEXT, base=KEY.at)
        assert [r.status for r in site.gate.releases()] == [Status.COUNTED, Status.COUNTED]

    def test_old_states_are_removed(self, site: Site) -> None:
        base = None
        for number in range(1, 6):
            key = replace(KEY, round=number)
            site.train(key, b"bytes", state=b"state", base=base)
            base = key.at
        places = [key for key, _ in MemoryJournal(site.disk).scan("state/")]
        assert places == [f"state/run/{number:010d}/{1:010d}" for number in (4, 5)]
        assert len(list(MemoryJournal(site.disk).scan("payload/"))) == 1

    def test_only_one_exchange_changes_the_state(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        second = replace(KEY, exchange="second")
        site.gate.reserve(second)
        with pytest.raises(LocalProtocolError, match="already stands"):
            site.gate.commit(second, b"2", state=b"again")

    def test_state_is_settled_before_a_refusal_too(self) -> None:
        site = Site(budget="1")
        site.train(KEY, b"1", state=b"after 1")
        assert refusal(site.gate.reserve(NEXT, base=KEY.at, charge=COST)) is Refusal.BUDGET
        assert site.restart().state("run") == b"after 1"


class TestWhatTheServerSays:
    def test_a_base_that_was_never_committed_here(self, site: Site) -> None:
        assert refusal(site.gate.reserve(NEXT, base=KEY.at)) is Refusal.UNKNOWN_BASE
        site.gate.reserve(KEY)
        assert refusal(site.gate.reserve(NEXT, base=KEY.at)) is Refusal.UNKNOWN_BASE

    def test_a_base_later_than_what_is_asked_for(self, site: Site) -> None:
        site.train(KEY, b"1")
        assert refusal(site.gate.reserve(replace(KEY, exchange="x"), base=AttemptId(1, 2))) is Refusal.CONTRADICTION

    @pytest.mark.parametrize("base", [None, AttemptId(1, 1)])
    def test_a_base_that_goes_back(self, site: Site, base: AttemptId | None) -> None:
        site.train(KEY, b"1")
        site.train(NEXT, b"2", base=KEY.at)
        third = replace(KEY, round=3)
        site.train(third, b"3", base=NEXT.at)
        assert refusal(site.gate.reserve(replace(KEY, round=4), base=base)) is Refusal.CONTRADICTION

    def test_a_base_that_was_void(self, site: Site) -> None:
        site.train(KEY, b"1")
        site.train(RETRY, b"2")
        assert refusal(site.gate.reserve(NEXT, base=KEY.at)) is Refusal.CONTRADICTION

    def test_a_contradiction_changes_nothing(self, site: Site) -> None:
        site.train(KEY, b"1", state=b"after 1")
        before = site.disk.read()
        site.gate.reserve(NEXT, base=AttemptId(1, 2))
        assert site.disk.read() == before
        assert site.gate.reserve(KEY) == Finished(KEY, b"1")


class TestUnmask:
    ASK = replace(KEY, exchange=UNMASK)

    def test_without_an_update_there_is_nothing_to_unmask(self, site: Site) -> None:
        assert refusal(site.gate.reserve(self.ASK, request=b"a,b")) is Refusal.NOTHING_TO_UNMASK

    @pytest.mark.parametrize("restart", [False, True])
    def test_one_request_is_answered_ever(self, site: Site, restart: bool) -> None:
        site.train(KEY, b"masked")
        assert site.gate.reserve(self.ASK, request=b"a,b") == Reserved(self.ASK, None)
        assert refusal(site.gate.reserve(self.ASK, request=b"a")) is Refusal.OTHER_REQUEST
        site.gate.commit(self.ASK, b"shares")
        if restart:
            site.restart()
        assert site.gate.reserve(self.ASK, request=b"a,b") == Finished(self.ASK, b"shares")
        for other in (b"a", b""):
            assert refusal(site.gate.reserve(self.ASK, request=other)) is Refusal.OTHER_REQUEST

    def test_before_the_answer_is_committed_nothing_is_bound(self, site: Site) -> None:
        site.train(KEY, b"masked")
        site.gate.reserve(self.ASK, request=b"a,b")
        site.restart()
        assert site.gate.reserve(self.ASK, request=b"a") == Reserved(self.ASK, None)

    def test_a_void_attempt_is_not_unmasked(self, site: Site) -> None:
        site.train(KEY, b"masked")
        site.gate.voided("run", KEY.at)
        assert refusal(site.gate.reserve(self.ASK, request=b"a,b")) in {Refusal.VOID, Refusal.STALE}


@pytest.mark.parametrize(("payload", "state"), [(b"12345", None), (b"1234", b"12345")])
def test_what_exceeds_a_limit_does_not_leave(payload: bytes, state: bytes | None) -> None:
    site = Site(policy=SitePolicy(payload_limit_bytes=4, state_limit_bytes=4))
    site.gate.reserve(KEY, charge=COST)
    assert refusal(site.gate.commit(KEY, payload, state=state)) is Refusal.TOO_LARGE
    assert site.spent() == 0
    assert site.disk.read() == b""


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("to", Status)
def test_the_table_is_what_happens(site: Site, status: Status, to: Status) -> None:
    site.train(KEY, b"bytes")
    release = replace(next(site.gate.releases()), status=status)
    if to in STATUS_TRANSITIONS[status]:
        assert release.moved_to(to).status is to
    else:
        with pytest.raises(StateError, match="cannot go"):
            release.moved_to(to)


def test_one_transaction_a_commit() -> None:
    writes: list[Changes] = []

    class Counting(MemoryJournal):
        def write(self, changes: Changes) -> None:
            writes.append(changes)
            super().write(changes)

    gate = SiteGate(Counting(), CostCharger({"heart": Decimal(1)}))
    gate.reserve(KEY, charge=COST)
    gate.commit(KEY, b"bytes", state=b"state")
    assert [sorted(key.split("/")[0] for key in changes) for changes in writes] == [["payload", "release", "state"]]


class TestOneOpeningARound:
    """Rule 6: two sums of one round over sets that differ by one client give that client's update away."""

    OPENING = replace(KEY, exchange=UNMASK)

    def opened(self, policy: SitePolicy | None = None, key: ReleaseKey = KEY) -> Site:
        site = Site(policy=policy)
        site.train(key, b"masked")
        unmask = replace(key, exchange=UNMASK)
        assert isinstance(site.gate.reserve(unmask, request=b"survivors"), Reserved)
        site.gate.commit(unmask, b"shares")
        return site

    def test_no_update_of_the_round_leaves_again(self) -> None:
        site = self.opened()
        assert refusal(site.gate.reserve(RETRY)) is Refusal.OPENED
        assert refusal(site.gate.reopened("run", RETRY.at)) is Refusal.OPENED
        site.restart()
        assert refusal(site.gate.reserve(RETRY)) is Refusal.OPENED
        assert refusal(site.gate.reserve(replace(RETRY, attempt=3))) is Refusal.OPENED
        assert isinstance(site.gate.reserve(NEXT), Reserved)

    def test_the_same_attempt_is_answered_as_before(self) -> None:
        site = self.opened()
        assert site.gate.reserve(KEY) == Finished(KEY, b"masked")
        assert site.gate.reserve(self.OPENING, request=b"survivors") == Finished(self.OPENING, b"shares")

    def test_what_has_noise_of_its_own_may_leave_again(self) -> None:
        assert isinstance(self.opened().gate.reserve(RETRY, charge=COST, noisy=True), Reserved)

    def test_the_policy_may_allow_it(self) -> None:
        site = self.opened(SitePolicy(reopen=True))
        assert site.gate.reopened("run", RETRY.at) is None
        assert isinstance(site.gate.reserve(RETRY), Reserved)

    def test_an_agreement_opens_nothing(self, site: Site) -> None:
        site.train(KEY, b"masked")
        agree = replace(KEY, exchange=AGREE)
        site.gate.reserve(agree, request=b"survivors")
        site.gate.commit(agree, b"signature")
        assert isinstance(site.gate.reserve(RETRY), Reserved)

    def test_an_opening_that_a_retry_overtakes_does_not_leave(self, site: Site) -> None:
        site.train(KEY, b"masked")
        site.gate.reserve(self.OPENING, request=b"survivors")
        assert isinstance(site.gate.reserve(RETRY), Reserved)
        assert refusal(site.gate.commit(self.OPENING, b"shares")) is Refusal.STALE


def test_survivors_are_signed_once(site: Site) -> None:
    agree = replace(KEY, exchange=AGREE)
    assert refusal(site.gate.reserve(agree, request=b"survivors")) is Refusal.NOTHING_TO_UNMASK
    site.train(KEY, b"masked")
    site.gate.reserve(agree, request=b"survivors")
    site.gate.commit(agree, b"signature")
    for _ in range(2):
        assert site.gate.reserve(agree, request=b"survivors") == Finished(agree, b"signature")
        assert refusal(site.gate.reserve(agree, request=b"others")) is Refusal.OTHER_REQUEST
        site.restart()
