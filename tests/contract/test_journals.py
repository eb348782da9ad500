"""What every journal promises; each implementation inherits the same tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedlearn.errors import LimitExceededError, StateError
from fedlearn.release import journal as journal_module
from fedlearn.release.journal import Journal, MemoryDisk, MemoryJournal
from fedlearn.release.sqlite import SqliteJournal
from fedlearn.simulation.journal import GroupedJournal

Reopen = Callable[[], Journal]
LARGE = bytes(range(256)) * 1_000


class JournalContract:
    """`reopen()` closes what is open and opens the same journal again, as after a restart."""

    def test_a_record_is_there_after_a_restart(self, reopen: Reopen) -> None:
        reopen().write({"a": b"1", "b": b"", "c/large": LARGE})
        journal = reopen()
        assert [journal.get(k) for k in ("a", "b", "c/large", "d")] == [b"1", b"", LARGE, None]

    def test_one_transaction_puts_replaces_and_deletes(self, reopen: Reopen) -> None:
        journal = reopen()
        journal.write({"a": LARGE, "b": b"2", "c": b"3"})
        journal.write({"a": b"small", "b": None, "c": LARGE, "unknown": None})
        assert dict(journal.scan("")) == {"a": b"small", "c": LARGE}
        assert dict(reopen().scan("")) == {"a": b"small", "c": LARGE}

    def test_scan_is_by_prefix_and_in_order(self, reopen: Reopen) -> None:
        journal = reopen()
        journal.write(
            {"run/b": b"2", "run/a": b"1", "run": b"0", "run0": b"4", "runs/a": b"3", "q": b"5", "run/é": b"6"}
        )
        assert list(journal.scan("run/")) == [("run/a", b"1"), ("run/b", b"2"), ("run/é", b"6")]
        assert [key for key, _ in journal.scan("")] == ["q", "run", "run/a", "run/b", "run/é", "run0", "runs/a"]

    def test_a_scan_may_be_written_under(self, reopen: Reopen) -> None:
        journal = reopen()
        journal.write({f"a/{i}": b"x" for i in range(5)})
        for key, _ in list(journal.scan("a/")):
            journal.write({key: None})
        assert list(journal.scan("")) == []

    def test_an_empty_transaction_is_one(self, reopen: Reopen) -> None:
        reopen().write({})
        assert list(reopen().scan("")) == []

    @pytest.mark.parametrize("key", ["", "x" * (journal_module.KEY_LIMIT_BYTES + 1)])
    def test_a_key_over_the_limit_is_refused_and_nothing_is_written(self, reopen: Reopen, key: str) -> None:
        journal = reopen()
        with pytest.raises(LimitExceededError, match="KEY_LIMIT_BYTES"):
            journal.write({"a": b"1", key: b"2"})
        assert list(journal.scan("")) == []

    def test_a_value_over_the_limit_is_refused_and_nothing_is_written(
        self, reopen: Reopen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = reopen()
        monkeypatch.setattr(journal_module, "VALUE_LIMIT_BYTES", 10)
        with pytest.raises(LimitExceededError, match="VALUE_LIMIT_BYTES"):
            journal.write({"a": b"1", "b": b"x" * 11})
        assert list(journal.scan("")) == []


class TestMemoryJournal(JournalContract):
    @pytest.fixture
    def reopen(self) -> Reopen:
        disk = MemoryDisk()
        return lambda: MemoryJournal(disk)


class TestGroupedJournal(JournalContract):
    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Reopen]:
        opened: list[Journal] = []

        def again() -> Journal:
            for journal in opened:
                journal.close()
            opened.append(GroupedJournal(SqliteJournal(tmp_path / "journal"), every_s=1e9))
            return opened[-1]

        yield again
        for journal in opened:
            journal.close()


class TestSqliteJournal(JournalContract):
    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Reopen]:
        opened: list[SqliteJournal] = []

        def again() -> Journal:
            for journal in opened:
                journal.close()
            opened.append(SqliteJournal(tmp_path / "state" / "journal"))
            return opened[-1]

        yield again
        for journal in opened:
            journal.close()

    def test_two_owners_are_excluded(self, reopen: Reopen, tmp_path: Path) -> None:
        reopen().write({"a": b"1"})
        with pytest.raises(StateError, match="another process has it open"):
            SqliteJournal(tmp_path / "state" / "journal")

    def test_a_closed_journal_says_so(self, reopen: Reopen) -> None:
        journal = reopen()
        journal.close()
        journal.close()
        with pytest.raises(StateError, match="closed"):
            journal.get("a")
