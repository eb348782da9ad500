"""Every transition and every rejection of the coordinator's round machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from fedlearn.errors import (
    LimitExceededError,
    LocalProtocolError,
    RemoteProtocolError,
    StateError,
    UpdateError,
)
from fedlearn.release import (
    UNMASK,
    Accepted,
    AttemptId,
    Begin,
    Duplicate,
    Failed,
    MemoryJournal,
    NoMasking,
    Rejected,
    Rejection,
    ReleaseKey,
    Resume,
    RoundMachine,
    RoundPolicy,
    RoundState,
    checksum_of,
)
from fedlearn.release.journal import Changes
from fedlearn.release.round import ROUND_TRANSITIONS

FIRST = AttemptId(1, 1)
ROSTER = ("a", "b", "c")


class Total:
    """Sums numbers that are sent as text."""

    def __init__(self) -> None:
        self.value = 0
        self.clients: list[str] = []

    def add(self, client: str, payload: bytes) -> None:
        try:
            self.value += int(payload)
        except ValueError:
            raise UpdateError(f"not a number: {payload!r}") from None
        self.clients.append(client)


class Masks:
    """Each survivor tells its mask; two suffice."""

    def __init__(self) -> None:
        self.told: dict[str, int] = {}

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:
        if len(survivors) < 2:
            raise UpdateError("too few to hide in")
        return {client: f"{key.at}: {','.join(survivors)} of {','.join(roster)}".encode() for client in survivors}

    def answer(self, client: str, answer: bytes) -> None:
        if not answer.isdigit():
            raise RemoteProtocolError("not a mask")
        self.told[client] = int(answer)

    def ready(self) -> bool:
        return len(self.told) >= 2

    def unmask(self, total: Total) -> None:
        if sum(self.told.values()) == 13:
            raise RemoteProtocolError("a share does not fit")
        total.value -= sum(self.told.values())


class Run:
    """A machine on a journal, opened anew at will."""

    def __init__(self, policy: RoundPolicy | None = None, masking: Callable[[], object] = NoMasking) -> None:
        self.journal = MemoryJournal()
        self.policy, self.masking = policy, masking
        self.restart()

    def restart(self) -> RoundMachine[bytes, Total]:
        self.machine: RoundMachine[bytes, Total] = RoundMachine(
            self.journal, "run", Total, policy=self.policy, masking=self.masking
        )
        return self.machine

    def begin(self, *roster: str) -> ReleaseKey:
        step = self.machine.next_step
        assert isinstance(step, Begin)
        return self.machine.begin(step.at, roster or ROSTER, f"model-{step.at.round}")

    def send(self, *clients: str) -> None:
        for client in clients:
            assert self.machine.receive(client, self.machine.key, b"%d" % (ord(client) - 96)) == Accepted()


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def masked() -> Run:
    return Run(masking=Masks)


def rejection(answer: object) -> Rejection:
    assert isinstance(answer, Rejected), answer
    assert answer.message
    return answer.reason


class TestOneRound:
    def test_begin_receive_close_commit(self, run: Run) -> None:
        assert (run.machine.state, run.machine.next_step) == (RoundState.IDLE, Begin(FIRST))
        key = run.begin("c", "a", "b")
        assert key == ReleaseKey("run", 1, 1, "train", "model-1")
        assert run.machine.next_step == Resume(key, ROSTER, None)
        run.send("b", "a")
        assert (run.machine.waiting, run.machine.received) == ({"c"}, {"a", "b"})
        assert run.machine.close() is RoundState.SUMMED
        assert (run.machine.total.value, run.machine.survivors, run.machine.waiting) == (3, ("a", "b"), set())
        assert run.machine.committed is None
        run.machine.commit(b"record", {"mine": b"too"})
        assert run.machine.committed == run.restart().committed == FIRST
        for machine in (run.machine, run.restart()):
            assert (machine.state, machine.next_step) == (RoundState.COMMITTED, Begin(AttemptId(2, 1)))
            assert [machine.base_of(client) for client in ROSTER] == [FIRST, FIRST, None]
            assert (machine.record(1), machine.record(2), run.journal.get("mine")) == (b"record", None, b"too")

    def test_the_next_round_moves_the_survivors_bases_only(self, run: Run) -> None:
        for survivors in (("a", "b"), ("b", "c")):
            run.begin()
            run.send(*survivors)
            run.machine.close()
            run.machine.commit(b"")
        assert [run.machine.base_of(client) for client in ROSTER] == [FIRST, AttemptId(2, 1), AttemptId(2, 1)]
        assert [run.restart().base_of(client) for client in ROSTER] == [FIRST, AttemptId(2, 1), AttemptId(2, 1)]

    def test_the_journal_keeps_no_roster_of_a_round_that_is_over(self, run: Run) -> None:
        for _ in range(3):
            run.begin()
            run.send("a")
            run.machine.close()
            run.machine.commit(b"record")
        assert len(list(run.journal.scan("attempt/"))) == 1
        assert [run.restart().record(number) for number in (1, 2, 3)] == [b"record"] * 3

    def test_runs_in_one_journal_do_not_mix(self, run: Run) -> None:
        run.begin()
        run.send("a")
        run.machine.close()
        run.machine.commit(b"record")
        other: RoundMachine[bytes, Total] = RoundMachine(run.journal, "run/2", Total)
        assert (other.next_step, other.base_of("a"), other.record(1)) == (Begin(FIRST), None, None)


class TestBegin:
    @pytest.mark.parametrize("at", [AttemptId(1, 2), AttemptId(2, 1), AttemptId(0, 1)])
    def test_only_the_next_attempt(self, run: Run, at: AttemptId) -> None:
        with pytest.raises(LocalProtocolError, match="expected Begin"):
            run.machine.begin(at, ROSTER, "m")

    def test_not_while_another_is_under_way(self, run: Run) -> None:
        run.begin()
        with pytest.raises(LocalProtocolError, match="in state open"):
            run.machine.begin(AttemptId(1, 2), ROSTER, "m")

    @pytest.mark.parametrize("roster", [(), ("a", "a")])
    def test_a_roster_names_each_client_once(self, run: Run, roster: tuple[str, ...]) -> None:
        with pytest.raises(LocalProtocolError, match="roster"):
            run.machine.begin(FIRST, roster, "m")

    def test_the_roster_has_a_limit(self) -> None:
        run = Run(RoundPolicy(roster_limit=2))
        with pytest.raises(LimitExceededError, match="roster_limit is 2"):
            run.begin()
        assert run.restart().next_step == Begin(FIRST)

    def test_nothing_is_known_before(self, run: Run) -> None:
        for what in ("key", "survivors", "total"):
            with pytest.raises(LocalProtocolError):
                getattr(run.machine, what)
        assert (run.machine.waiting, run.machine.reason) == (set(), "")


class TestReceive:
    def test_a_duplicate_enters_once(self, run: Run) -> None:
        key = run.begin()
        run.send("a")
        assert run.machine.receive("a", key, b"1") == Duplicate()
        run.machine.close()
        assert run.machine.receive("a", key, b"1") == Duplicate()
        assert run.machine.total.clients == ["a"]

    def test_other_bytes_under_the_same_key(self, run: Run) -> None:
        key = run.begin()
        run.send("a")
        assert rejection(run.machine.receive("a", key, b"9")) is Rejection.CHANGED
        run.machine.close()
        assert run.machine.total.value == 1

    def test_a_stranger(self, run: Run) -> None:
        assert (
            rejection(run.machine.receive("a", ReleaseKey("run", 1, 1, "train", "m"), b"1")) is Rejection.UNKNOWN_CLIENT
        )
        key = run.begin()
        assert rejection(run.machine.receive("d", key, b"1")) is Rejection.UNKNOWN_CLIENT

    @pytest.mark.parametrize(
        "change",
        [{"run": "x"}, {"round": 2}, {"attempt": 2}, {"exchange": "evaluate"}, {"model_digest": "x"}],
        ids=str,
    )
    def test_another_key(self, run: Run, change: dict[str, object]) -> None:
        key = run.begin()
        assert rejection(run.machine.receive("a", replace(key, **change), b"1")) is Rejection.WRONG_KEY
        assert run.machine.waiting == set(ROSTER)

    def test_an_invalid_payload_costs_nothing_but_itself(self, run: Run) -> None:
        key = run.begin()
        run.send("a")
        answer = run.machine.receive("b", key, b"nan")
        assert rejection(answer) is Rejection.INVALID
        assert "not a number" in str(answer)
        assert run.machine.waiting == {"c"}
        run.send("c")
        assert run.machine.close() is RoundState.SUMMED
        assert (run.machine.total.value, run.machine.survivors) == (4, ("a", "c"))

    def test_too_large(self) -> None:
        run = Run(RoundPolicy(payload_limit_bytes=3))
        key = run.begin()
        assert rejection(run.machine.receive("a", key, b"1000")) is Rejection.TOO_LARGE
        assert run.machine.waiting == {"b", "c"}

    @pytest.mark.parametrize("end", ["close", "commit", "void", "fail"])
    def test_too_late(self, run: Run, end: str) -> None:
        key = run.begin()
        run.send("a")
        if end in {"close", "commit"}:
            run.machine.close()
        if end == "commit":
            run.machine.commit(b"")
        if end in {"void", "fail"}:
            getattr(run.machine, end)("reason")
        assert rejection(run.machine.receive("b", key, b"2")) is Rejection.CLOSED

    def test_who_was_given_up_may_still_come(self, run: Run) -> None:
        run.begin()
        run.machine.gone("a")
        run.machine.gone("nobody")
        assert run.machine.waiting == {"b", "c"}
        run.send("a")
        assert run.machine.received == {"a"}

    def test_payloads_of_any_type(self) -> None:
        class Longest:
            value = ""

            def add(self, client: str, payload: str) -> None:
                self.value = max(self.value, payload, key=len)

        machine: RoundMachine[str, Longest] = RoundMachine(
            MemoryJournal(), "run", Longest, checksum=lambda text: checksum_of(text.encode()), size=len
        )
        key = machine.begin(FIRST, ["a"], "m")
        assert machine.receive("a", key, "word") == Accepted()
        machine.close()
        assert machine.total.value == "word"


class TestVoid:
    def test_too_few_survivors(self) -> None:
        run = Run(RoundPolicy(min_survivors=2))
        run.begin()
        run.send("a")
        assert run.machine.close() is RoundState.VOID
        for machine in (run.machine, run.restart()):
            assert machine.next_step == Begin(AttemptId(1, 2))
            assert "1 of 3 clients sent, at least 2 needed" in machine.reason
        assert run.begin().attempt == 2
        assert run.machine.reason == ""

    def test_nobody_is_enough_where_the_policy_says_so(self) -> None:
        run = Run(RoundPolicy(min_survivors=0))
        run.begin()
        assert run.machine.close() is RoundState.SUMMED
        for machine in (run.machine, run.restart()):
            assert machine.state is RoundState.SUMMED, "nothing is missing of an empty sum"
            assert machine.survivors == ()
        run.machine.commit(b"noise alone")
        assert run.machine.next_step == Begin(AttemptId(2, 1))

    def test_the_cap_on_attempts(self) -> None:
        run = Run(RoundPolicy(max_attempts=2))
        run.begin()
        assert run.machine.void("first") is RoundState.VOID
        run.begin()
        assert run.machine.void("second") is RoundState.FAILED
        for machine in (run.machine, run.restart()):
            assert machine.state is RoundState.FAILED
            assert machine.next_step == Failed("round 1 was void 2 times, the limit; the last time: second")
            with pytest.raises(LocalProtocolError):
                machine.begin(AttemptId(1, 3), ROSTER, "m")

    def test_a_void_attempt_leaves_nothing_in_the_next_sum(self, run: Run) -> None:
        run.begin()
        run.send("a", "b")
        run.machine.void("")
        run.begin()
        run.send("c")
        run.machine.close()
        assert run.machine.total.value == 3

    def test_attempts_count_by_round(self) -> None:
        run = Run(RoundPolicy(max_attempts=2))
        for _ in range(3):
            run.begin()
            run.machine.void("")
            run.begin()
            run.send("a")
            run.machine.close()
            run.machine.commit(b"")
        assert run.machine.next_step == Begin(AttemptId(4, 1))

    @pytest.mark.parametrize("state", ["idle", "committed", "void"])
    def test_there_must_be_an_attempt(self, run: Run, state: str) -> None:
        if state != "idle":
            run.begin()
        if state == "committed":
            run.send("a")
            run.machine.close()
            run.machine.commit(b"")
        if state == "void":
            run.machine.void("")
        for call in (lambda: run.machine.void(""), run.machine.close, lambda: run.machine.commit(b"")):
            with pytest.raises(LocalProtocolError, match=f"in state {state}"):
                call()


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_is_stopped_stays_stopped(run: Run, begun: bool) -> None:
    if begun:
        run.begin()
    run.machine.fail("")
    run.machine.fail("again")
    for machine in (run.machine, run.restart()):
        assert machine.next_step == Failed("no reason was given")
        assert machine.waiting == set()


class TestCrash:
    def test_while_open_the_same_attempt_starts_over(self, run: Run) -> None:
        key = run.begin()
        run.send("a", "b")
        machine = run.restart()
        assert machine.next_step == Resume(key, ROSTER, None)
        assert (machine.state, machine.waiting) == (RoundState.OPEN, set(ROSTER))
        run.send("c", "a")
        machine.close()
        assert (machine.total.value, machine.survivors) == (4, ("a", "c"))

    def test_after_the_close_exactly_the_survivors_come_again(self, run: Run) -> None:
        key = run.begin()
        run.send("a", "b")
        run.machine.close()
        machine = run.restart()
        assert machine.next_step == Resume(key, ROSTER, ("a", "b"))
        assert (machine.state, machine.waiting) == (RoundState.REFILL, {"a", "b"})
        assert rejection(machine.receive("c", key, b"3")) is Rejection.NOT_SURVIVOR
        assert rejection(machine.receive("a", key, b"9")) is Rejection.CHANGED
        run.send("a")
        assert machine.receive("a", key, b"1") == Duplicate()
        with pytest.raises(LocalProtocolError):
            _ = machine.total
        run.send("b")
        assert (machine.state, machine.total.value, machine.survivors) == (RoundState.SUMMED, 3, ("a", "b"))

    def test_a_survivor_that_cannot_come_again_makes_it_void(self, run: Run) -> None:
        run.begin()
        run.send("a", "b")
        run.machine.close()
        machine = run.restart()
        machine.gone("c")
        assert machine.state is RoundState.REFILL
        machine.gone("b")
        assert machine.state is RoundState.VOID
        assert "'b' cannot send" in machine.reason

    def test_after_a_failed_write_nothing_goes_on(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        key = run.begin()
        run.send("a")

        def fail(changes: Changes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run.journal, "write", fail)
        with pytest.raises(OSError, match="No space"):
            run.machine.close()
        for call in (
            run.machine.close,
            lambda: run.machine.receive("b", key, b"2"),
            lambda: run.machine.void(""),
            lambda: run.machine.fail(""),
            lambda: run.machine.gone("b"),
        ):
            with pytest.raises(StateError, match="failed to write"):
                call()
        monkeypatch.undo()
        assert run.restart().state is RoundState.OPEN

    @pytest.mark.parametrize("place", ["head/run", "attempt/run/0000000001/0000000001"])
    @pytest.mark.parametrize("damaged", [b"{", b"{}", b"[1]", b'{"at":[1]}', b'{"at":"1/1"}', b'{"key":{}}'])
    def test_a_damaged_record_is_named(self, run: Run, place: str, damaged: bytes) -> None:
        run.begin()
        run.journal.write({place: damaged})
        with pytest.raises(StateError, match="damaged"):
            run.restart()

    def test_a_missing_record_is_named(self, run: Run) -> None:
        run.begin()
        run.journal.write({"attempt/run/0000000001/0000000001": None})
        with pytest.raises(StateError, match="missing"):
            run.restart()


class TestUnmasking:
    def close(self, run: Run, *survivors: str) -> ReleaseKey:
        run.begin()
        run.send(*survivors)
        run.machine.close()
        return replace(run.machine.key, exchange=UNMASK)

    def test_the_sum_is_read_after_enough_answers(self, masked: Run) -> None:
        key = self.close(masked, "a", "b", "c")
        machine = masked.machine
        assert machine.state is RoundState.UNMASKING
        assert machine.unmask_requests() == (key, dict.fromkeys("abc", b"round 1 attempt 1: a,b,c of a,b,c"))
        with pytest.raises(LocalProtocolError, match="no total"):
            _ = machine.total
        assert machine.unmasked("a", key, b"1") == Accepted()
        assert machine.unmasked("a", key, b"1") == Duplicate()
        assert machine.waiting == {"b", "c"}
        assert machine.unmasked("c", key, b"2") == Accepted()
        assert (machine.state, machine.total.value) == (RoundState.SUMMED, 3)
        assert rejection(machine.unmasked("b", key, b"9")) is Rejection.CLOSED
        assert machine.total.value == 3

    def test_after_a_crash_the_same_is_asked_again(self, masked: Run) -> None:
        self.close(masked, "a", "b")
        asked = masked.machine.unmask_requests()
        machine = masked.restart()
        assert machine.state is RoundState.REFILL
        masked.send("b", "a")
        assert machine.unmask_requests() == asked

    def test_what_is_rejected(self, masked: Run) -> None:
        key = self.close(masked, "a", "b")
        machine = masked.machine
        assert rejection(machine.unmasked("c", key, b"1")) is Rejection.UNKNOWN_CLIENT
        assert rejection(machine.unmasked("a", machine.key, b"1")) is Rejection.WRONG_KEY
        machine.unmasked("a", key, b"1")
        assert rejection(machine.unmasked("a", key, b"2")) is Rejection.CHANGED
        assert rejection(machine.unmasked("b", key, b"nonsense")) is Rejection.INVALID
        assert machine.waiting == set()

    def test_too_large_an_answer(self) -> None:
        run = Run(RoundPolicy(payload_limit_bytes=2), masking=Masks)
        key = self.close(run, "a", "b")
        assert rejection(run.machine.unmasked("a", key, b"123")) is Rejection.TOO_LARGE

    def test_nobody_left_to_answer_makes_it_void(self, masked: Run) -> None:
        self.close(masked, "a", "b")
        masked.machine.gone("a")
        assert masked.machine.state is RoundState.UNMASKING
        masked.machine.gone("b")
        assert masked.machine.state is RoundState.VOID

    def test_what_the_hook_will_not_ask_is_void(self, masked: Run) -> None:
        self.close(masked, "a")
        assert masked.machine.state is RoundState.VOID
        assert "too few to hide in" in masked.machine.reason

    def test_what_the_hook_cannot_open_is_void(self, masked: Run) -> None:
        key = self.close(masked, "a", "b")
        masked.machine.unmasked("a", key, b"6")
        masked.machine.unmasked("b", key, b"7")
        assert masked.machine.state is RoundState.VOID
        assert "a share does not fit" in masked.machine.reason

    def test_requests_are_for_this_state_only(self, run: Run) -> None:
        with pytest.raises(LocalProtocolError, match="unmask_requests in state idle"):
            run.machine.unmask_requests()
        assert (
            rejection(run.machine.unmasked("a", ReleaseKey("run", 1, 1, UNMASK, "m"), b"")) is Rejection.UNKNOWN_CLIENT
        )


class TestSums:
    """Blocks of a simulation's clients arrive as one sum."""

    @staticmethod
    def send(run: Run, *clients: str, checksum: str = "sum", value: int = 9) -> object:
        def merge(total: Total) -> None:
            if value < 0:
                raise UpdateError("below zero")
            total.value += value

        return run.machine.receive_sum(clients, run.machine.key, checksum, merge)

    def test_all_of_its_clients_are_in(self, run: Run) -> None:
        run.begin()
        assert self.send(run, "a", "b") == Accepted()
        assert run.machine.waiting == {"c"}
        run.send("c")
        assert run.machine.close() is RoundState.SUMMED
        assert (run.machine.total.value, run.machine.survivors) == (12, ROSTER)

    def test_a_repeat_is_not_added(self, run: Run) -> None:
        run.begin()
        self.send(run, "a", "b")
        assert self.send(run, "a", "b") == Duplicate()
        assert rejection(self.send(run, "a", "b", checksum="other")) is Rejection.CHANGED
        assert rejection(self.send(run, "b", "c")) is Rejection.CHANGED
        assert run.machine._sum.value == 9

    def test_what_is_refused(self, run: Run) -> None:
        key = run.begin()
        assert rejection(self.send(run, "a", "zoe")) is Rejection.UNKNOWN_CLIENT
        assert rejection(self.send(run)) is Rejection.UNKNOWN_CLIENT
        wrong = replace(key, model_digest="other")
        answer = run.machine.receive_sum(("a",), wrong, "sum", lambda total: None)
        assert rejection(answer) is Rejection.WRONG_KEY
        assert rejection(self.send(run, "a", "b", value=-1)) is Rejection.INVALID
        assert run.machine.waiting == {"c"}
        run.send("c")
        run.machine.close()
        assert rejection(self.send(run, "a", "b")) is Rejection.CLOSED

    def test_after_a_crash_exactly_the_survivors_sums(self, run: Run) -> None:
        run.begin()
        self.send(run, "a", "b")
        run.machine.close()
        run.restart()
        assert run.machine.state is RoundState.REFILL
        assert rejection(self.send(run, "a", "b", checksum="other")) is Rejection.CHANGED
        assert rejection(self.send(run, "a", "b", "c")) is Rejection.CHANGED
        assert self.send(run, "a", "b") == Accepted()
        assert (run.machine.state, run.machine.total.value) == (RoundState.SUMMED, 9)


def test_every_state_but_failed_has_a_way_on() -> None:
    assert set(ROUND_TRANSITIONS) == set(RoundState)
    assert [state for state, on in ROUND_TRANSITIONS.items() if not on] == [RoundState.FAILED]
    assert all(RoundState.FAILED in on for state, on in ROUND_TRANSITIONS.items() if state is not RoundState.FAILED)


def test_checksums_tell_where_one_part_ends() -> None:
    assert checksum_of(b"ab", b"c") != checksum_of(b"a", b"bc") != checksum_of(b"abc")
    assert checksum_of(b"ab") == checksum_of(bytearray(b"ab"))
