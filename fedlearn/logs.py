"""How long-running processes log: one line for people, or one JSON object for machines, on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final, TextIO

ROOT: Final = "fedlearn"
LINE_LIMIT: Final = 16 * 1024
"""Longest message of one line, in characters; the rest is cut."""


def configure(*, json_lines: bool, debug: bool, stream: TextIO | None = None) -> None:
    """Set up the logger `fedlearn` and quieten Flower's. Safe to call again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else TextFormatter())
    for name, level in ((ROOT, logging.DEBUG if debug else logging.INFO), ("flwr", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


class TextFormatter(logging.Formatter):
    """`12:34:56 message`, with the level only where something is wrong."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return _cut(f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{record.getMessage()}") + (
            "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        )


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is passed as `extra={"fields": {...}}` becomes keys of it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, separators=(",", ":"), default=str)


def _cut(text: str) -> str:
    return text if len(text) <= LINE_LIMIT else f"{text[:LINE_LIMIT]} ... ({len(text)} characters)"
