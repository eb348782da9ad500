"""Hints that name what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(got: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint with the known name that is most like a given one.

    Args:
        got: what was written.
        known: what could have been.
        otherwise: the hint where nothing is like it.
    """
    near = difflib.get_close_matches(got, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def nearest_choice(error: Mapping[str, Any]) -> str:
    """The same for a pydantic error about a value that is none of a few; no hint for another error."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    choices: list[str] = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    return nearest(error["input"], choices)
