from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from fedlearn import logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    kept = {
        n: (logging.getLogger(n).handlers, logging.getLogger(n).level, logging.getLogger(n).propagate)
        for n in ("fedlearn", "flwr")
    }
    yield
    for name, (handlers, level, propagate) in kept.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def written(json_lines: bool, debug: bool = False) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(json_lines=json_lines, debug=debug, stream=stream)
    return stream


def test_text_is_a_time_and_a_message_with_the_level_where_it_matters():
    stream = written(json_lines=False)
    log = logging.getLogger("fedlearn.x")
    log.info("round %d", 3)
    log.warning("slow")
    log.debug("hidden")
    first, second = stream.getvalue().splitlines()
    assert first[8:] == " round 3"
    assert second[8:] == " warning: slow"


def test_json_is_one_object_a_line_with_fields():
    stream = written(json_lines=True)
    logging.getLogger("fedlearn.x").info("two\nlines", extra={"fields": {"round": 3}})
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert (found["message"], found["level"], found["logger"], found["round"]) == (
        "two\nlines",
        "info",
        "fedlearn.x",
        3,
    )


@pytest.mark.parametrize("json_lines", [True, False])
def test_a_long_message_is_cut(json_lines: bool):
    stream = written(json_lines)
    logging.getLogger("fedlearn.x").info("x" * 1_000_000)
    assert len(stream.getvalue()) < logs.LINE_LIMIT + 300


def test_flower_is_quiet_unless_something_is_wrong():
    stream = written(json_lines=False)
    logging.getLogger("flwr").info("chatter")
    logging.getLogger("flwr").warning("trouble")
    assert "chatter" not in stream.getvalue()
    assert "trouble" in stream.getvalue()
