"""The head that a site keeps beside its ledger: what was cut off shows, and no crash is taken for that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.errors import StateError
from fedlearn.privacy.chain import SignedHead
from fedlearn.privacy.events import Cost, Gaussian
from fedlearn.privacy.ledger import Ledger
from fedlearn.privacy.ledger_file import LEDGER_FILE, LedgerFolder, read_records, verify_ledger
from fedlearn.privacy.ledger_head import HEAD_FILE, HeadFile
from fedlearn.release import TRAIN, Charge, MemoryDisk, ReleaseKey

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
CHARGE = Charge("heart/record", Cost(Gaussian(10.0)).to_text())


def opened(folder: Path, key: Ed25519PrivateKey = KEY, data_set: str = "heart") -> LedgerFolder:
    return LedgerFolder(folder, "cleveland", data_set, key)


def charge(folder: Path, *rounds: int, key: Ed25519PrivateKey = KEY, data_set: str = "heart") -> None:
    with opened(folder, key, data_set) as ledger:
        for number in rounds:
            ledger.charge(ReleaseKey("r", number, 1, TRAIN, "m"), CHARGE)


def all_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


def cut(file: Path, records: int) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-records]))


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def test_a_sound_ledger_says_what_it_was_compared_with(tmp_path):
    charge(tmp_path, 1, 2)
    found = verify_ledger(tmp_path)
    assert (found.problems, found.compared_with) == ((), ("the agent's own head, at record 2",))
    assert verify_ledger(tmp_path / LEDGER_FILE) == found
    assert (tmp_path / HEAD_FILE).stat().st_mode & 0o077 == 0
    copy = shutil.copy(tmp_path / LEDGER_FILE, tmp_path / "copy.jsonl")
    assert verify_ledger(Path(copy)).compared_with == ()
    kept = SignedHead.from_text((tmp_path / HEAD_FILE).read_text())
    charge(tmp_path, 3)
    both = ("the remembered head, at record 2", "the agent's own head, at record 3")
    assert verify_ledger(tmp_path, kept).compared_with == both


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: cut(file, 1),
        lambda file: cut(file, 3),
        tear,  # no torn append: the head says that it had returned
        Path.unlink,
    ],
    ids=["a record", "all but the first", "half a record", "all"],
)
def test_what_is_missing_at_the_end_shows_and_nothing_more_is_written(tmp_path, harm: Callable[[Path], None]):
    charge(tmp_path, 1, 2, 3)
    harm(tmp_path / LEDGER_FILE)
    if (tmp_path / LEDGER_FILE).exists():
        assert any("does not go on from record 3" in problem for problem in verify_ledger(tmp_path).problems)
    before = all_files(tmp_path)
    with pytest.raises(StateError, match="old copy was put back, or records were cut off") as caught:
        opened(tmp_path)
    assert "newest copy" in caught.value.hint
    assert {name: data for name, data in all_files(tmp_path).items() if data} == before


def test_a_ledger_cut_before_its_renewed_key_is_no_strangers(tmp_path):
    charge(tmp_path, 1)
    charge(tmp_path, key=OTHER)
    cut(tmp_path / LEDGER_FILE, 1)
    with pytest.raises(StateError, match="records were cut off"):
        opened(tmp_path, OTHER)


class Interrupted(HeadFile):
    """A process that dies after its record is on the disk, before the head is."""

    def write(self, head: SignedHead) -> None:
        raise OSError(28, "No space left on device")


def test_a_crash_between_record_and_head_is_nothing_to_refuse(tmp_path):
    charge(tmp_path, 1)
    disk = MemoryDisk()
    disk.append((tmp_path / LEDGER_FILE).read_bytes())
    ledger = Ledger(disk, "cleveland", "heart", KEY, head=Interrupted(tmp_path))
    for number in (2, 3):  # of which the second is not tried: what is on the disk is unknown
        with pytest.raises(StateError, match="No space left" if number == 2 else "it failed to write"):
            ledger.charge(ReleaseKey("r", number, 1, TRAIN, "m"), CHARGE)
    (tmp_path / LEDGER_FILE).write_bytes(disk.read())
    assert verify_ledger(tmp_path).problems == ()
    charge(tmp_path)
    assert len(read_records(tmp_path)) == 3
    charge(tmp_path, 3)
    assert verify_ledger(tmp_path).compared_with == ("the agent's own head, at record 3",)


def test_a_ledger_without_a_head_gets_one_with_its_next_record(tmp_path):
    charge(tmp_path, 1)
    (tmp_path / HEAD_FILE).unlink()
    assert verify_ledger(tmp_path).compared_with == ()
    charge(tmp_path, 2)
    assert verify_ledger(tmp_path).compared_with == ("the agent's own head, at record 2",)


@pytest.mark.parametrize("text", ["", "[]", '{"seq": 1}', "\x00" * 100, "x" * 200_000])
def test_what_is_no_head_is_said_and_refused(tmp_path, text):
    charge(tmp_path, 1)
    (tmp_path / HEAD_FILE).write_text(text)
    assert "expected a signed head" in verify_ledger(tmp_path).problems[0]
    with pytest.raises(StateError, match="expected a signed head"):
        opened(tmp_path)


@pytest.mark.parametrize(("key", "data_set"), [(OTHER, "heart"), (KEY, "blood")])
def test_another_ledgers_head_is_refused(tmp_path, key, data_set):
    charge(tmp_path / "a", 1)
    charge(tmp_path / "b", 1, key=key, data_set=data_set)
    shutil.copy(tmp_path / "b" / HEAD_FILE, tmp_path / "a" / HEAD_FILE)
    assert verify_ledger(tmp_path / "a").problems
    with pytest.raises(StateError, match="not signed by this site"):
        opened(tmp_path / "a")
