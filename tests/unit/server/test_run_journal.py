"""The coordinator's journal keeps the contract of every journal, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server import blobs
from server.run_state import RunJournal
from server.store import Store
from tests.contract.test_journals import JournalContract, Reopen


class TestRunJournal(JournalContract):
    @pytest.fixture
    def reopen(self, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reopen]:
        # Small parts, so that large values have many.
        monkeypatch.setattr(blobs, "PART_BYTES", 50_000)
        opened: list[Store] = []

        def make() -> RunJournal:
            while opened:
                opened.pop().close()
            opened.append(Store(database_url))
            return RunJournal(opened[-1], "a1")

        yield make
        while opened:
            opened.pop().close()
