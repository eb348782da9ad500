"""What a run has committed so far, read from its journal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fedlearn.release.keys import record_key

if TYPE_CHECKING:
    from fedlearn.release.journal import Journal


def committed_rounds(journal: Journal, run: str) -> list[dict[str, Any]]:
    """One row for each committed round, with its evaluation where there was one: what `Federation.history` returns.

    The journal and not the events: a crash between a commit and its event loses the event.
    """
    rows: list[dict[str, Any]] = []
    while (record := journal.get(record_key("commit", run, len(rows) + 1))) is not None:
        number = len(rows) + 1
        evaluated = journal.get(record_key("evaluated", run, number))
        rows.append({"round": number, **json.loads(record), **(json.loads(evaluated) if evaluated else {})})
    return rows
