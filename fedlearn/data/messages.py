"""Messages by user, in the order of time: the Chit-Chat data set, or a device's own text file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from fedlearn.errors import DataError

PACKAGE: Final = "chitchat-dataset"
FILE: Final = "chitchat_dataset/dataset.json"
SHA256: Final = "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a"
"""Of the data file in version 0.9.0."""

MAX_FILE_BYTES: Final = 256 * 1024**2
OWN: Final = ""
"""The user of a file that names none."""


def chitchat() -> dict[str, list[str]]:
    """Each user's messages in the order of time (Brigham Young University, MIT licence); the package is not imported.

    Raises:
        DataError: the package is not installed, or its data file is another one.
    """
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
        raw = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        raise DataError(
            f"the Chit-Chat data set is not installed; expected the package {PACKAGE} 0.9.0",
            hint='pip install "fedlearn[text]", or name a text file of your own as the data',
        ) from None
    if (digest := hashlib.sha256(raw).hexdigest()) != SHA256:
        raise DataError(f"{path}: got a file with SHA-256 {digest[:16]}..., expected {SHA256[:16]}... (version 0.9.0)")
    stamped: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for conversation in json.loads(raw).values():
        for turn in conversation["messages"]:
            for message in turn:
                stamped[message["sender"]].append((message["timestamp"], message["text"]))
    # Time stamps are ISO 8601 in UTC, so their order as text is their order in time; the sort is stable.
    return {
        user: [text for _, text in sorted(messages, key=lambda m: m[0])] for user, messages in sorted(stamped.items())
    }


def read_messages(path: Path) -> dict[str, list[str]]:
    """A file of one's own: .txt, one message a line; or .jsonl, one object a line with "text" and perhaps "user" and "time".

    Lines are in the order of time, unless every object has a "time" (a number, or ISO 8601 text in one time zone).

    Returns:
        User to messages; without users, one entry under the name `OWN`.

    Raises:
        DataError: no such file, too large, not UTF-8, or a line that is not as expected. Messages are never quoted.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a .txt or a .jsonl file of messages") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DataError(f"{path}: cannot be read as text: {reason}") from None
    if path.suffix.lower() == ".txt":
        return {OWN: [line for line in text.splitlines() if line]}
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"{path}: got a file ending {path.suffix!r}, expected .txt or .jsonl")
    records = [_record(path, number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    times = [record.get("time") for record in records]
    if any(time is not None for time in times):
        kinds = {str if isinstance(time, str) else float if isinstance(time, int | float) else None for time in times}
        if len(kinds) > 1 or None in kinds:
            raise DataError(f"{path}: expected 'time' in every line, either always a number or always text")
        records.sort(key=lambda record: record["time"])
    messages: dict[str, list[str]] = defaultdict(list)
    for record in records:
        messages[record.get("user", OWN)].append(record["text"])
    if OWN in messages and len(messages) > 1:
        raise DataError(f"{path}: some lines have a 'user' and some do not; expected all or none")
    return dict(sorted(messages.items()))


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise DataError(f"{path}: line {number}: not a JSON object") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{path}: line {number}: expected an object with "text", such as {{"text": "on my way"}}')
    if "user" in record and (not isinstance(record["user"], str) or not record["user"]):
        raise DataError(f'{path}: line {number}: "user" is not a text, expected a name')
    return record
