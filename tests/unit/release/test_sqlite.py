"""The journal in SQLite: its files, its owner, its failures, and `kill -9` at random moments."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fedlearn.errors import StateError
from fedlearn.release import CostCharger, SiteGate, Status
from fedlearn.release.sqlite import INLINE_LIMIT_BYTES, SqliteJournal

LARGE = b"\x01" * (INLINE_LIMIT_BYTES + 1)
KILLS = 20


def files(folder: Path) -> list[Path]:
    return sorted((folder / "files").iterdir())


def test_large_values_are_files_and_go_with_their_records(tmp_path: Path) -> None:
    with closing(SqliteJournal(tmp_path)) as journal:
        journal.write({"small": LARGE[:-1], "large": LARGE})
        (first,) = files(tmp_path)
        assert first.stat().st_size == len(LARGE)
        journal.write({"large": LARGE[::-1]})
        assert len(files(tmp_path)) == 1
        assert files(tmp_path) != [first]
        journal.write({"large": b"small now"})
        assert files(tmp_path) == []
        journal.write({"large": LARGE})
        journal.write({"large": None})
        assert files(tmp_path) == []


def test_what_was_deleted_is_in_no_file_once_it_is_closed(tmp_path: Path) -> None:
    """A run's noise key is deleted with its last round."""
    secret = hashlib.sha256(b"a key").digest()
    with closing(SqliteJournal(tmp_path)) as journal:
        journal.write({"other": b"other"})
        journal.write({"key": secret})
        journal.write({"key": None})
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_a_file_that_no_record_names_is_removed(tmp_path: Path) -> None:
    with closing(SqliteJournal(tmp_path)) as journal:
        journal.write({"large": LARGE})
    (tmp_path / "files" / "left by a crash").write_bytes(b"half")
    with closing(SqliteJournal(tmp_path)) as journal:
        assert journal.get("large") == LARGE
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", LARGE[:-1], LARGE[:-1] + b"\x02"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    with closing(SqliteJournal(tmp_path)) as journal:
        journal.write({"large": LARGE})
        files(tmp_path)[0].write_bytes(damage)
        with pytest.raises(StateError, match="'large' is damaged"):
            journal.get("large")


def test_a_missing_file_is_an_error_not_an_absent_record(tmp_path: Path) -> None:
    with closing(SqliteJournal(tmp_path)) as journal:
        journal.write({"large": LARGE})
        files(tmp_path)[0].unlink()
        with pytest.raises(StateError, match="cannot read"):
            journal.get("large")
        with pytest.raises(StateError, match="cannot read"):
            list(journal.scan(""))


def test_only_its_owner_can_read_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    with closing(SqliteJournal(folder)) as journal:
        journal.write({"large": LARGE})
        assert folder.stat().st_mode & 0o077 == 0
        assert files(folder)[0].stat().st_mode & 0o077 == 0


def test_it_waits_for_the_disk(tmp_path: Path) -> None:
    with closing(SqliteJournal(tmp_path)) as journal:
        connection = journal._connection()
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_another_process_is_excluded_until_it_is_closed(tmp_path: Path) -> None:
    program = "import sys; from fedlearn.release.sqlite import *; SqliteJournal(Path(sys.argv[1])).close()"
    with closing(SqliteJournal(tmp_path)):
        other = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert "StateError" in other.stderr
        assert "another process has it open" in other.stderr
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.db")) as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StateError, match="application and version"):
        SqliteJournal(tmp_path)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, but long enough to be read as one" * 100)
    with pytest.raises(StateError, match="cannot open"):
        SqliteJournal(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateError, match="cannot open"):
        SqliteJournal(tmp_path / "file" / "journal")


def test_a_transaction_that_fails_half_way_is_not_there(tmp_path: Path) -> None:
    with closing(SqliteJournal(tmp_path)) as journal:
        journal.write({"a": b"1"})
        refuse = "CREATE TRIGGER refuse BEFORE INSERT ON record WHEN new.key = 'c' BEGIN SELECT RAISE(ABORT, 'no'); END"
        journal._connection().execute(refuse)
        with pytest.raises(StateError, match="cannot write"):
            journal.write({"a": None, "b": LARGE, "c": b"3"})
        assert list(journal.scan("")) == [("a", b"1")]
    with closing(SqliteJournal(tmp_path)):
        assert files(tmp_path) == []


AGENT = """
import hashlib, os, signal, sys
from decimal import Decimal
from pathlib import Path
from fedlearn.release import *
from fedlearn.release.sqlite import SqliteJournal

gate = SiteGate(SqliteJournal(Path(sys.argv[1])), CostCharger({"heart": Decimal(10**6)}), SitePolicy(max_voids_per_run=10**6))
base = None
for known in gate.releases("run"):
    base = known.key.at
number = (base.round if base else 0) + 1
while True:
    key = ReleaseKey("run", number, 1, "train", "model")
    match gate.reserve(key, base=base, charge=Charge("heart", "1")):
        case Reserved(state=state):
            assert (state or b"0") == b"%d" % (number - 1), (state, number)
        case other:
            raise SystemExit(f"{other}")
    payload = os.urandom(100_000 if number % 2 else 1_000)
    gate.commit(key, payload, state=b"%d" % number)
    print(number, hashlib.sha256(gate.release(key)).hexdigest(), flush=True)
    if "once" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    base, number = key.at, number + 1
"""


def test_what_left_before_a_kill_is_on_the_disk(tmp_path: Path) -> None:
    """Killed in a loop: every line that came out is charged, once, and the newest bytes can be sent again.

    The last one kills itself as soon as its bytes are out, so that there is something to send again.
    """
    rng = random.Random(20)
    released: dict[int, str] = {}
    for last in [False] * KILLS + [True]:
        command = [sys.executable, "-c", AGENT, str(tmp_path), *(["once"] if last else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
            assert agent.stdout is not None
            assert agent.stderr is not None
            for _ in range(1 if last else rng.randint(1, 6)):
                line = agent.stdout.readline()
                assert line, agent.stderr.read()
                number, digest = line.split()
                assert int(number) not in released
                released[int(number)] = digest
            if not last:
                for _ in range(rng.randrange(100_000)):  # into the next commit, somewhere
                    pass
                agent.kill()
            for line in agent.stdout:
                if line.endswith("\n"):
                    number, digest = line.split()
                    released[int(number)] = digest
        with closing(SqliteJournal(tmp_path)) as journal:
            gate = SiteGate(journal, CostCharger({}))
            records = {r.key.round: r for r in gate.releases("run")}
            assert {number: records[number].payload_sha256 for number in released} == released
            assert sorted(records) == list(range(1, len(records) + 1))
            assert len(gate.spent("heart")) == len(records) <= len(released) + KILLS
            # Killed after the last release was settled and before the next one was committed, there is none to send.
            kept = [r for r in records.values() if r.status is Status.COMMITTED]
            assert [r.key.round for r in kept] == [len(records)] or (kept == [] and not last)
            assert all(hashlib.sha256(gate.release(r.key)).hexdigest() == r.payload_sha256 for r in kept)
            assert len(files(tmp_path)) == sum(r.size_bytes > INLINE_LIMIT_BYTES for r in kept)
