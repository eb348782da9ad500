"""The ledger: what is written stays, and what was changed shows."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.clock import MockClock
from fedlearn.errors import LimitExceededError, StateError
from fedlearn.privacy import chain
from fedlearn.privacy.budget import Budget, EpsilonCharger, StopRule, spent_epsilon
from fedlearn.privacy.chain import ClosedRun, Kind, SignedHead, public_text
from fedlearn.privacy.events import Cost, Gaussian, Repeated
from fedlearn.privacy.ledger import MAX_REFUSALS_PER_RUN, Ledger, split
from fedlearn.privacy.ledger_file import LEDGER_FILE, LedgerFolder, account_states, read_records, verify_ledger
from fedlearn.privacy.ledger_head import HeadFile
from fedlearn.release import TRAIN, AttemptId, Charge, MemoryDisk, MemoryJournal, ReleaseKey, Reserved, SiteGate
from fedlearn.release.keys import admission_key
from fedlearn.release.records import Finished, Refused, SitePolicy
from fedlearn.release.sqlite import SqliteJournal

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
COORDINATOR = ec.derive_private_key(777, ec.SECP256R1())
COST = Cost(Repeated(Gaussian(10.0), 5))
ACCOUNT = "heart/record"
CHARGE = Charge(ACCOUNT, COST.to_text())
BUDGETS = {ACCOUNT: Budget(3.0, 1e-5)}


def key(number: int, attempt: int = 1, run: str = "r") -> ReleaseKey:
    return ReleaseKey(run, number, attempt, TRAIN, "m")


def opened(disk: MemoryDisk, signer=KEY, site: str = "cleveland", data_set: str = "heart") -> Ledger:
    return Ledger(disk, site, data_set, signer, clock=MockClock())


def kinds(disk: MemoryDisk) -> list[str]:
    return [record.kind.value for record in split(disk.read())[0]]


def test_charges_survive_and_add_up():
    disk = MemoryDisk()
    ledger = opened(disk)
    assert ledger.accounts == ()
    for number in range(3):
        ledger.charge(key(number), CHARGE)
    again = opened(disk)
    assert again.charges(ACCOUNT) == (CHARGE,) * 3
    assert again.accounts == (ACCOUNT,)
    assert again.charges("heart/group") == ()
    assert again.has(key(2))
    assert not again.has(key(3))
    assert kinds(disk) == ["open", "charge", "charge", "charge"]


def test_the_same_record_gives_the_same_bytes():
    first, second = MemoryDisk(), MemoryDisk()
    for disk in (first, second):
        opened(disk).charge(key(1), CHARGE)
    assert first.read() == second.read()


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (Budget(3.0, 1e-5, StopRule.FIXED), "rule"),
        (Budget(3.0, 1e-5, order=9.0), "order"),
        (Budget(30.0, 1e-5), "order"),
    ],
    ids=["rule", "order", "an order that follows from the budget"],
)
def test_an_account_keeps_its_rule_and_its_order_for_life(other, names):
    # A Renyi filter is valid at an order that was fixed in advance, and the exact rule for what is of one kind in advance.
    disk = MemoryDisk()
    ledger = opened(disk)
    ledger.note_budgets(BUDGETS)
    ledger.note_budgets({ACCOUNT: other})  # nothing was charged yet
    ledger.note_budgets(BUDGETS)
    ledger.charge(key(1), CHARGE)
    ledger.note_budgets({})
    before = disk.read()
    for again in (ledger, opened(disk)):
        with pytest.raises(StateError, match=f"charged under .* the policy says .*{names}"):
            again.note_budgets({ACCOUNT: other})
    assert disk.read() == before
    raised = Budget(30.0, 1e-5, order=BUDGETS[ACCOUNT].used_order)
    opened(disk).note_budgets({ACCOUNT: raised})
    assert account_states(split(disk.read())[0])[0].budget == raised


@pytest.mark.parametrize("signer", [KEY, ec.derive_private_key(12345, ec.SECP256R1())], ids=["ed25519", "p256"])
def test_every_record_is_signed(tmp_path, signer):
    with LedgerFolder(tmp_path / "l", "cleveland", "heart", signer) as ledger:
        ledger.charge(key(1), CHARGE)
    found = verify_ledger(tmp_path / "l")
    assert (found.problems, found.records, found.site, found.data_set) == ((), 2, "cleveland", "heart")


def test_a_ledger_of_another_site_or_data_set_is_refused():
    disk = MemoryDisk()
    opened(disk)
    with pytest.raises(StateError, match="of site 'cleveland'"):
        opened(disk, site="zurich")
    with pytest.raises(StateError, match="data set 'heart'"):
        opened(disk, data_set="smears")


def test_a_new_key_is_noted_and_old_signatures_stay_good(tmp_path):
    disk = MemoryDisk()
    head = opened(disk).head()
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    ledger = opened(disk, other)
    assert kinds(disk) == ["open", "key"]
    ledger.check_remembered(head)
    file = tmp_path / LEDGER_FILE
    file.write_bytes(disk.read())
    assert verify_ledger(file, head).problems == ()


def test_refusals_and_voids_and_overrides_are_records():
    disk = MemoryDisk()
    ledger = opened(disk)
    ledger.charge(key(1), CHARGE)
    for _ in range(2):
        ledger.void(key(1))
        ledger.refuse(key(2), CHARGE, "budget", "would reach 3.2")
    ledger.override("ada", "budget raised from 3 to 5", "the ethics board agreed")
    ledger.note_budgets(BUDGETS)
    again = opened(disk)
    again.void(key(1))
    again.refuse(key(2), CHARGE, "budget", "would reach 3.2")
    again.note_budgets(BUDGETS)
    assert kinds(disk) == ["open", "charge", "void", "refusal", "override", "budgets"]
    assert again.charges(ACCOUNT) == (CHARGE,)
    (state,) = account_states(split(disk.read())[0])
    assert (state.charges, state.refusals, state.voids, state.runs) == (1, 1, 1, {"r": 1})
    assert state.epsilon == spent_epsilon([COST], BUDGETS[ACCOUNT])


def test_a_server_cannot_fill_the_disk_with_refusals():
    disk = MemoryDisk()
    ledger = opened(disk)
    for number in range(MAX_REFUSALS_PER_RUN + 50):
        ledger.refuse(key(number), CHARGE, "budget", "x" * 5000)
    ledger.refuse(key(1, run="other"), CHARGE, "budget", "no")
    assert kinds(disk).count("refusal") == MAX_REFUSALS_PER_RUN + 1
    last = [r for r in split(disk.read())[0] if r.body.get("key", {}).get("run") == "r"][-1]
    assert last.body["more_are_not_written"]


def test_a_head_is_the_sites_own_word():
    disk = MemoryDisk()
    ledger = opened(disk)
    ledger.charge(key(1), CHARGE)
    head = SignedHead.from_text(ledger.head().to_text())
    copy = disk.read()
    ledger.charge(key(2), CHARGE)
    ledger.check_remembered(head)
    newest = ledger.head()

    old = MemoryDisk()
    old.append(copy)
    old.sync()
    put_back = opened(old)
    put_back.check_remembered(head)
    with pytest.raises(StateError, match="an old copy was put back"):
        put_back.check_remembered(newest)
    put_back.charge(key(3), CHARGE)  # as long again, with another history
    with pytest.raises(StateError, match="an old copy was put back"):
        put_back.check_remembered(newest)


def test_a_server_cannot_make_up_a_head_and_lock_the_site_out():
    ledger = opened(MemoryDisk())
    mallory = opened(MemoryDisk(), Ed25519PrivateKey.from_private_bytes(bytes(32)))
    for number in range(9):
        mallory.charge(key(number), CHARGE)
    with pytest.raises(StateError, match="not signed by this site"):
        ledger.check_remembered(mallory.head())
    with pytest.raises(StateError, match="not signed by this site"):
        ledger.check_remembered(opened(MemoryDisk(), data_set="smears").head())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"seq":1}', "null"])
def test_a_head_that_is_none_is_refused(text):
    with pytest.raises(StateError, match="ledger head"):
        SignedHead.from_text(text)


def whole(count: int = 3) -> bytes:
    disk = MemoryDisk()
    ledger = opened(disk)
    for number in range(count):
        ledger.charge(key(number), CHARGE)
    return disk.read()


def disk_of(data: bytes) -> MemoryDisk:
    disk = MemoryDisk()
    disk.append(data)
    disk.sync()
    return disk


def test_a_record_cut_anywhere_is_repaired_and_never_forgotten_when_it_can_be_read():
    data = whole()
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    cost_read = 0
    for size in range(last + 1, len(data), 7):
        disk = disk_of(data[:size])
        aside: list[bytes] = []
        ledger = Ledger(disk, "cleveland", "heart", KEY, clock=MockClock(), set_aside=aside.append)
        assert aside == [data[last:size]]
        assert kinds(disk)[:4] == ["open", "charge", "charge", "repair"]
        assert len(ledger.charges(ACCOUNT)) >= 2
        cost_read += len(ledger.charges(ACCOUNT)) == 3
        ledger.charge(key(9), CHARGE)
        assert opened(disk).has(key(9))
    assert cost_read > 10


def test_a_file_of_nothing_but_a_torn_beginning_starts_anew():
    first = whole(0)
    for size in (0, 5, len(first) - 1):
        assert opened(disk_of(first[:size])).charges(ACCOUNT) == ()
    assert opened(disk_of(bytes(300))).charges(ACCOUNT) == ()  # a file system that grew the file and lost its data


def test_a_file_that_is_no_ledger_is_left_alone():
    for data in (b"hello", b"hello\n", b"PK\x03\x04"):
        disk = disk_of(data)
        with pytest.raises(StateError, match="no ledger"):
            opened(disk)
        assert disk.read() == data


def test_a_changed_record_is_refused_wherever_it_stands():
    data = whole(4)
    starts = [0, *(i + 1 for i, byte in enumerate(data[:-1]) if byte == 10)]
    for start in starts[:-2]:
        changed = data[: start + 40] + bytes([data[start + 40] ^ 1]) + data[start + 41 :]
        with pytest.raises(StateError, match="damaged"):
            opened(disk_of(changed))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3), (0, 1, 1, 2, 3), (1, 2, 3)])
def test_records_that_are_moved_left_out_or_doubled_are_refused(order):
    lines = whole(3).splitlines(keepends=True)
    with pytest.raises(StateError, match="damaged"):
        opened(disk_of(b"".join(lines[i] for i in order) + b'{"x":1}\n{"x":1}\n'))


def test_verify_names_what_is_wrong(tmp_path):
    file = tmp_path / LEDGER_FILE
    file.write_bytes(whole())
    assert verify_ledger(tmp_path).problems == ()
    file.write_bytes(whole()[:-5])
    assert "torn" in verify_ledger(tmp_path).problems[0]
    lines = whole().splitlines(keepends=True)
    tree = json.loads(lines[-1])
    tree["signature"] = json.loads(lines[-2])["signature"]
    file.write_bytes(b"".join(lines[:-1]) + json.dumps(tree).encode() + b"\n")
    assert "signature" in verify_ledger(tmp_path).problems[0]
    file.write_bytes(b"x\n" + whole())
    assert "damaged" in verify_ledger(tmp_path).problems[0]
    with pytest.raises(StateError, match="cannot be read"):
        verify_ledger(tmp_path / "nowhere")


def test_verify_compares_with_a_remembered_head(tmp_path):
    disk = MemoryDisk()
    ledger = opened(disk)
    ledger.charge(key(1), CHARGE)
    file = tmp_path / LEDGER_FILE
    file.write_bytes(disk.read())
    ledger.charge(key(2), CHARGE)
    assert "old copy" in verify_ledger(file, ledger.head()).problems[0]
    stranger = opened(MemoryDisk(), Ed25519PrivateKey.from_private_bytes(bytes(32))).head()
    assert "not signed by this site" in verify_ledger(file, stranger).problems[0]


def test_two_agents_are_excluded(tmp_path):
    held = LedgerFolder(tmp_path / "l", "cleveland", "heart", KEY)
    with pytest.raises(StateError, match="in use by a ledger's agent"):
        LedgerFolder(tmp_path / "l", "cleveland", "heart", KEY)
    held.close()
    with LedgerFolder(tmp_path / "l", "cleveland", "heart", KEY):
        pass


def test_a_torn_record_is_kept_as_evidence(tmp_path):
    (tmp_path / LEDGER_FILE).write_bytes(whole()[:-9])
    with LedgerFolder(tmp_path, "cleveland", "heart", KEY) as ledger:
        assert len(ledger.charges(ACCOUNT)) == 3
    (kept,) = tmp_path.glob("torn-*")
    assert whole().startswith(whole(2) + kept.read_bytes())
    assert verify_ledger(tmp_path).problems == ()
    assert (tmp_path / LEDGER_FILE).stat().st_mode & 0o077 == 0


class Full(MemoryDisk):
    def append(self, data: bytes) -> None:
        super().append(data[:10])
        raise OSError(28, "No space left on device")


def test_a_ledger_that_failed_to_write_charges_nothing_more():
    ledger = opened(MemoryDisk())
    ledger._disk = Full()
    for _ in range(2):
        with pytest.raises(StateError, match=r"cannot be written|failed to write"):
            ledger.charge(key(1), CHARGE)


# With the gate.


def gate_of(journal_disk: MemoryDisk, ledger_disk: MemoryDisk, epsilon: float = 3.0, **policy) -> SiteGate:
    charger = EpsilonCharger({ACCOUNT: Budget(epsilon, 1e-5)})
    return SiteGate(MemoryJournal(journal_disk), charger, SitePolicy(**policy), opened(ledger_disk))


def release(gate: SiteGate, at: ReleaseKey, base: AttemptId | None = None):
    answer = gate.reserve(at, base=base, charge=CHARGE)
    return gate.commit(at, b"noised") if isinstance(answer, Reserved) else answer


def test_the_gate_stops_a_run_by_what_the_ledger_holds():
    ledger_disk = MemoryDisk()
    allowed = 0
    while spent_epsilon([COST] * (allowed + 1), BUDGETS[ACCOUNT]) <= 3.0:
        allowed += 1
    gate, base, answers = gate_of(MemoryDisk(), ledger_disk), None, []
    for number in range(1, allowed + 3):
        at = key(number)
        answers.append(release(gate, at, base))
        base = at.at if isinstance(answers[-1], Finished) else base
    assert [type(a) for a in answers] == [Finished] * allowed + [Refused] * 2
    assert answers[-1].reason.value == "budget"
    assert "would make it" in answers[-1].message
    assert kinds(ledger_disk).count("charge") == allowed
    assert kinds(ledger_disk).count("refusal") == 2
    # Another run, another journal, the same data: nothing is left.
    assert isinstance(release(gate_of(MemoryDisk(), ledger_disk), key(1, run="new")), Refused)


def test_a_resend_is_free_and_a_void_stays_charged():
    journal_disk, ledger_disk = MemoryDisk(), MemoryDisk()
    gate = gate_of(journal_disk, ledger_disk)
    for _ in range(3):
        assert isinstance(release(gate, key(1)), Finished)
    gate.voided("r", AttemptId(1, 1))
    assert isinstance(release(gate, key(1, attempt=2)), Finished)
    assert kinds(ledger_disk) == ["open", "charge", "void", "charge"]
    assert gate_of(journal_disk, ledger_disk).spent(ACCOUNT) == (CHARGE,) * 2


def test_a_charge_that_only_the_journal_has_is_entered_again():
    journal_disk, ledger_disk = MemoryDisk(), MemoryDisk()
    gate = gate_of(journal_disk, ledger_disk)
    release(gate, key(1))
    gate.voided("r", AttemptId(1, 1))
    lost = MemoryDisk()
    again = gate_of(journal_disk, lost)
    assert again.spent(ACCOUNT) == (CHARGE,)
    assert kinds(lost) == ["open", "charge", "void"]


def test_a_whole_run_is_charged_on_admission():
    journal_disk, ledger_disk = MemoryDisk(), MemoryDisk()
    gate = gate_of(journal_disk, ledger_disk)
    run = Charge(ACCOUNT, Cost(Repeated(Gaussian(10.0), 40)).to_text())
    assert gate.admit("r", run) is None
    assert gate.admit("r", run) is None
    assert gate_of(journal_disk, ledger_disk).admit("r", run) is None
    assert kinds(ledger_disk) == ["open", "charge"]
    refused = gate.admit("r2", Charge(ACCOUNT, Cost(Repeated(Gaussian(10.0), 400)).to_text()))
    assert refused.reason.value == "budget"
    assert kinds(ledger_disk) == ["open", "charge", "refusal"]


def closing(rounds: int, run: str = "r", signer=None) -> ClosedRun:
    return ClosedRun.signed(run, rounds, signer or COORDINATOR)


def test_what_a_closed_run_did_not_use_comes_back_and_nothing_more_leaves(tmp_path):
    journal_disk, ledger_disk = MemoryDisk(), MemoryDisk()
    gate = gate_of(journal_disk, ledger_disk)
    run = Charge(ACCOUNT, Cost(Repeated(Gaussian(10.0), 40)).to_text())
    gate.admit("r", run)
    assert isinstance(gate.reserve(key(1)), Reserved)
    gate.commit(key(1), b"noised")
    ledger = opened(ledger_disk)
    ledger.close(admission_key("r", run), closing(7), public_text(COORDINATOR), released=1)
    ledger.close(admission_key("r", run), closing(7), public_text(COORDINATOR), released=1)
    seven = Charge(ACCOUNT, Cost(Repeated(Gaussian(10.0), 7)).to_text())
    again = opened(ledger_disk)
    assert again.charges(ACCOUNT) == (seven,)
    assert kinds(ledger_disk) == ["open", "charge", "closed"]
    later = gate_of(journal_disk, ledger_disk)
    assert later.admit("r", run) is None
    refused = later.reserve(key(8))
    assert refused.reason.value == "closed"
    assert isinstance(later.reserve(key(1)), Finished)  # a resend is free, still
    again.note_budgets(BUDGETS)
    (state,) = account_states(split(ledger_disk.read())[0])
    assert state.epsilon == spent_epsilon([Cost(Repeated(Gaussian(10.0), 7))], BUDGETS[ACCOUNT])


@pytest.mark.parametrize(
    ("run", "closed", "says"),
    [
        ("r", lambda: closing(41), "do not fit"),
        ("r", lambda: closing(-1), "released something in 1"),
        ("r", lambda: closing(7, signer=KEY), "not signed"),
        ("r", lambda: ClosedRun("r", 6, closing(7).signature), "not signed"),
        ("r", lambda: closing(7, run="other"), "no open run"),
        ("other", lambda: closing(7, run="other"), "no open run"),
        ("r", lambda: closing(0), "released something in 1"),
    ],
)
def test_nothing_comes_back_without_the_coordinators_word(run, closed, says):
    disk = MemoryDisk()
    ledger = opened(disk)
    whole_run = Charge(ACCOUNT, Cost(Repeated(Gaussian(10.0), 40)).to_text())
    ledger.charge(admission_key("r", whole_run), whole_run)
    ledger.charge(key(3), CHARGE)
    with pytest.raises(StateError, match=says):
        ledger.close(admission_key(run, whole_run), closed(), public_text(COORDINATOR), released=1)
    with pytest.raises(StateError, match="no open run"):
        ledger.close(key(3), closing(1), public_text(COORDINATOR), released=1)
    ledger.close(admission_key("r", whole_run), closing(9), public_text(COORDINATOR), released=1)
    with pytest.raises(StateError, match="no open run"):
        ledger.close(admission_key("r", whole_run), closing(3), public_text(COORDINATOR), released=1)
    assert kinds(disk) == ["open", "charge", "charge", "closed"]


def test_what_was_being_computed_when_a_run_closed_does_not_leave():
    journal_disk, ledger_disk = MemoryDisk(), MemoryDisk()
    ledger = opened(ledger_disk)
    gate = SiteGate(MemoryJournal(journal_disk), EpsilonCharger(BUDGETS), None, ledger)
    run = Charge(ACCOUNT, Cost(Repeated(Gaussian(10.0), 40)).to_text())
    gate.admit("r", run)
    assert isinstance(gate.reserve(key(1)), Reserved)
    ledger.close(admission_key("r", run), closing(0), public_text(COORDINATOR), released=len([*gate.releases("r")]))
    assert gate.commit(key(1), b"noised").reason.value == "closed"
    assert [*gate.releases("r")] == []


def test_a_record_of_a_newer_version_is_not_cut_off():
    data = whole(1)
    last = split(data)[0][-1]
    record = {"seq": last.seq + 1, "prev": last.sha256, "time": 1.0, "kind": "hologram", "body": {}}
    line = {"record": record, "sha256": chain._digest(record), "signature": ""}
    disk = disk_of(data + chain._canonical(line).encode() + b"\n")
    before = disk.read()
    with pytest.raises(StateError, match="newer fedlearn"):
        opened(disk)
    assert disk.read() == before


def test_evidence_is_on_the_disk_before_the_ledger_is_cut():
    seen = []
    disk = disk_of(whole()[:-9])
    size = len(disk.read())
    Ledger(disk, "cleveland", "heart", KEY, clock=MockClock(), set_aside=lambda torn: seen.append(len(disk.read())))
    assert seen == [size]


def test_a_payload_too_large_is_a_recorded_refusal():
    ledger_disk = MemoryDisk()
    gate = gate_of(MemoryDisk(), ledger_disk, payload_limit_bytes=3)
    assert isinstance(release(gate, key(1)), Refused)
    assert kinds(ledger_disk) == ["open", "refusal"]


def test_open_reservations_count():
    gate = gate_of(MemoryDisk(), MemoryDisk())
    assert isinstance(gate.reserve(key(1), charge=CHARGE), Reserved)
    assert gate.spent(ACCOUNT) == (CHARGE,)
    gate.abandon(key(1))
    assert gate.spent(ACCOUNT) == ()


def test_a_gate_without_room_for_one_round_refuses_the_first():
    assert isinstance(release(gate_of(MemoryDisk(), MemoryDisk(), epsilon=0.4), key(1)), Refused)


KILLS = int(os.environ.get("FEDLEARN_LEDGER_KILLS", "40"))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def agent(folder: Path) -> None:
    """A site that releases as fast as it can, until it is killed. What left stands in the file `wire`."""
    with LedgerFolder(folder / "ledger", "cleveland", "heart", KEY) as ledger:
        charger = EpsilonCharger({ACCOUNT: Budget(500.0, 1e-5)})
        gate = SiteGate(SqliteJournal(folder / "releases"), charger, SitePolicy(10**6), ledger)
        number = max((r.key.round for r in gate.releases("r")), default=0)
        out = os.open(folder / "wire", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        while True:
            number += 1
            gate.reserve(key(number), charge=CHARGE)
            gate.commit(key(number), b"noised")
            gate.release(key(number))
            os.write(out, b"%d\n" % number)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # newer Pythons warn of forks; the child does nothing with threads
def test_kill_9_never_leaves_the_ledger_below_what_left(tmp_path):
    chance, left_at_all, overstated = random.Random(1), 0, 0
    for life in range(-(-KILLS // 10)):
        folder = tmp_path / str(life)
        folder.mkdir()
        for _ in range(min(10, KILLS)):
            child = os.fork()
            if child == 0:
                try:
                    agent(folder)
                finally:
                    os._exit(1)
            wire = folder / "wire"
            before, give_up = size_of(wire), time.monotonic() + 10
            early = (
                chance.random() < 0.1
            )  # mostly after something left in this life, now and then while it still starts
            while not early and size_of(wire) == before and time.monotonic() < give_up:
                os.sched_yield()
            time.sleep(chance.uniform(0.0, 0.02))  # where it then is, is chance
            os.kill(child, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
            left = {int(line) for line in wire.read_text().splitlines()} if wire.exists() else set()
            file = folder / "ledger" / LEDGER_FILE
            records = read_records(file) if file.exists() else []
            charged = [r.body["key"]["round"] for r in records if r.kind is Kind.CHARGE]
            assert left <= set(charged)
            head = HeadFile(folder / "ledger").read()
            named = records[: head.seq + 1] if head is not None else []
            assert left <= {r.body["key"]["round"] for r in named if r.kind is Kind.CHARGE}, "a head comes first"
        left_at_all += len(left)
        overstated += len(charged) - len(left)
    assert left_at_all > KILLS / 2
    assert 0 <= overstated <= KILLS  # at most one charge a kill without its bytes


def test_a_record_too_long_is_refused_before_it_is_written():
    disk = MemoryDisk()
    ledger = opened(disk)
    with pytest.raises((StateError, LimitExceededError), match="MAX_RECORD_BYTES"):
        ledger.charge(key(1), Charge(ACCOUNT, "x" * 100_000))
    ledger.charge(key(1), CHARGE)
    assert kinds(disk) == ["open", "charge"]


def test_the_fixed_rule_stops_at_the_exact_accountants_number():
    budget = Budget(1.0, 1e-5, StopRule.FIXED)
    charger = EpsilonCharger({ACCOUNT: budget})
    gate, base, done = SiteGate(MemoryJournal(), charger, None, opened(MemoryDisk())), None, 0
    while isinstance(release(gate, key(done + 1), base), Finished):
        done += 1
        base = key(done).at
    assert spent_epsilon([COST] * done, budget) <= 1.0 < spent_epsilon([COST] * (done + 1), budget)
